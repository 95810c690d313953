"""Evaluation of a network over a split: every image counts once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn

from src.command_line import run_config_of
from src.config import Config
from src.data import Preprocessing, Source, eval_batches
from src.errors import UserError
from src.evaluation.metrics import Metrics
from src.ranks import ALONE, Ranks
from src.recipe import build_model, build_preprocessing, open_checked, resolve_classes
from src.reporting.progress import progress_bar
from src.weights import load_weights

logger = logging.getLogger("cvt")


@dataclass
class Result:
    """Sums over a split, and how fast they were made (without compiling)."""

    metrics: Metrics
    images_per_second: float

    def to_dict(self) -> dict[str, float]:
        """The figures that eval.py reports."""
        return {
            "top1": self.metrics.top1,
            "top5": self.metrics.top5,
            "loss": self.metrics.loss,
            "images": self.metrics.images,
            "images_per_second": self.images_per_second,
        }


class Evaluator:
    """Runs a network over a split in batches of one shape, so that the graph compiles once.

    Args:
        source: the split.
        preprocessing: of each image.
        batch_size: images a step; the last batch is filled up and the filling not counted.
        workers: threads that prepare images; 0 takes one per core.
        ranks: those that share the images; each takes every so many-th.

    Raises:
        UserError: a split without images.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        batch_size: int,
        workers: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        if not len(source):
            raise UserError(f"{source.title}: no image to evaluate on; add some")
        self.compiled = False
        self._image_size = preprocessing.image_size
        self.batch_size = min(batch_size, len(source))
        self.images = len(source)
        self.ranks = ranks
        self.batches = eval_batches(
            source,
            preprocessing.operations(source.encoded),
            self.batch_size,
            rank=ranks.rank,
            world=ranks.world,
            workers=workers,
        )

    def compile(self, net: nn.Cell) -> None:
        """Compile the network for the batches to come; leaves it in evaluation mode."""
        net.set_train(False)
        net(Tensor(np.zeros((self.batch_size, 3, *self._image_size), np.float32))).asnumpy()
        self.compiled = True

    def run(self, net: nn.Cell, stop: Callable[[], bool] = lambda: False) -> Result | None:
        """Evaluate; leaves the network in evaluation mode. Every rank returns the whole result.

        Args:
            net: images -> logits.
            stop: asked behind every batch; True gives the evaluation up, with None on every rank.

        Raises:
            UserError: an image that can't be read, or an output that is not finite.
        """
        net.set_train(False)
        metrics = Metrics()
        if not self.compiled:  # before the clock starts
            self.compile(net)
        start = time.perf_counter()
        bar = progress_bar(len(self.batches.indices), "evaluate")
        for images, labels in self.batches.iterate(output_numpy=True):
            logits = net(Tensor(self._filled(images))).asnumpy()
            metrics.update(logits[: len(labels)], labels)
            bar.update(len(labels))
            if stop():
                break
        bar.close()
        metrics = Metrics.of(self.ranks.gather(metrics.sums))
        if metrics.images < self.images:
            return None
        return Result(metrics, metrics.images / (time.perf_counter() - start))

    def _filled(self, images: np.ndarray) -> np.ndarray:
        missing = self.batch_size - len(images)
        return np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images


def evaluate_checkpoint(config: Config, checkpoint: str, ranks: Ranks = ALONE) -> Result:
    """Evaluate a weight file on the held-out images of a configuration, over all ranks.

    Raises:
        UserError: weights that don't fit, or data that can't be read.
    """
    beside = run_config_of(checkpoint)
    source = open_checked(config, "val", ranks, beside and beside.parent, keep=False)
    config = resolve_classes(config, source)
    net = build_model(config)
    logger.info("%s", load_weights(net, checkpoint))
    evaluation = config.evaluation
    evaluator = Evaluator(
        source, build_preprocessing(config), evaluation.batch_size, config.data.workers, ranks
    )
    return evaluator.run(net)
