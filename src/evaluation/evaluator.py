"""Evaluation of a network over a split: every image counts once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from mindspore import Tensor, nn

from src.build import accelerate, build_model, build_preprocessing, resolve_classes
from src.config import Config
from src.data import Preprocessing, Source, eval_batches
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError
from src.evaluation.labels import Labelled, open_labelled
from src.evaluation.metrics import Metrics, Outcomes
from src.progress import progress_bar
from src.weights import load_weights

logger = logging.getLogger("cvt")


@dataclass
class Result:
    """Sums over a split, how fast they were made (without compiling), and what they are sums of.

    `outcomes` are those of all ranks in the order of the split, where they were asked for.
    """

    metrics: Metrics
    images_per_second: float
    outcomes: Outcomes | None = None

    FIGURES: ClassVar = ("top1", "top5", "loss", "images", "images_per_second")

    def to_dict(self) -> dict[str, float]:
        """The figures that eval.py reports."""
        return {
            "top1": self.metrics.top1,
            "top5": self.metrics.top5,
            "loss": self.metrics.loss,
            "images": self.metrics.images,
            "images_per_second": self.images_per_second,
        }


def inference(net: nn.Cell) -> Callable[[np.ndarray], np.ndarray]:
    """A network as evaluation runs it; leaves it in evaluation mode.

    Returns:
        float32 images [B, 3, H, W] -> logits [B, num_classes]; compiled at its first call.
    """
    net.set_train(False)
    return lambda images: net(Tensor(images)).asnumpy()


class Evaluator:
    """Runs a network over a split in batches of one shape, so that the graph compiles once.

    Args:
        source: the split.
        preprocessing: of each image.
        batch_size: images a step; the last batch is filled up and the filling not counted.
        workers: threads that prepare images; 0 takes one per core.
        ranks: those that share the images; each takes every so many-th.
        label_lists: the right classes of each image, instead of the split's labels.
        keep_outcomes: whether the result tells what became of each image.

    Raises:
        UserError: a split without images.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        batch_size: int,
        workers: int = 0,
        ranks: Ranks = SINGLE_PROCESS,
        label_lists: Sequence[Sequence[int]] | None = None,
        keep_outcomes: bool = False,
    ) -> None:
        if not len(source):
            raise UserError(f"{source.title}: no image to evaluate on; add some")
        self.compiled = False
        self._image_size = preprocessing.image_size
        self.batch_size = min(batch_size, len(source))
        self.images = len(source)
        self.ranks = ranks
        self._label_lists = label_lists
        self._keep_outcomes = keep_outcomes
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
        inference(net)(np.zeros((self.batch_size, 3, *self._image_size), np.float32))
        self.compiled = True

    def run(self, net: nn.Cell, stop: Callable[[], bool] = lambda: False) -> Result | None:
        """Evaluate; leaves the network in evaluation mode. Every rank returns the whole result.

        Args:
            net: images -> logits.
            stop: asked behind every batch; True gives the evaluation up, with None on every rank.

        Raises:
            UserError: an image that can't be read, or an output that is not finite.
        """
        run, metrics, outcomes = inference(net), Metrics(), []
        if not self.compiled:  # before the clock starts
            self.compile(net)
        start = time.perf_counter()
        bar = progress_bar(len(self.batches.indices), "evaluate")
        for images, labels in self.batches.iterate(output_numpy=True):
            logits = run(self._filled(images))
            done = metrics.update(
                logits[: len(labels)], self._right_classes(metrics.images, labels)
            )
            if self._keep_outcomes:
                outcomes.append(np.stack(done))
            bar.update(len(labels))
            if stop():
                break
        bar.close()
        metrics = Metrics.of(self.ranks.gather(metrics.sums))
        if metrics.images < self.images:
            return None
        speed = metrics.images / (time.perf_counter() - start)
        return Result(metrics, speed, self._gather(outcomes) if self._keep_outcomes else None)

    def _right_classes(
        self, start: int, labels: np.ndarray
    ) -> np.ndarray | Sequence[Sequence[int]]:
        """Of this rank's images from `start` on, whose labels in the split are `labels`."""
        if self._label_lists is None:
            return labels
        return [self._label_lists[k] for k in self.batches.indices[start : start + len(labels)]]

    def _gather(self, outcomes: list[np.ndarray]) -> Outcomes:
        """All ranks' outcomes in the split's order; rank r has every `world`-th from r on."""
        world, fields = self.ranks.world, len(Outcomes._fields)
        share = np.zeros((fields, -(-self.images // world)))  # ranks may differ by an image
        mine = np.concatenate([np.zeros((fields, 0)), *outcomes], axis=1)
        share[:, : mine.shape[1]] = mine
        parts = self.ranks.gather(share).reshape(world, *share.shape)
        return Outcomes(*parts.transpose(1, 2, 0).reshape(fields, -1)[:, : self.images])

    def _filled(self, images: np.ndarray) -> np.ndarray:
        missing = self.batch_size - len(images)
        return np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else images


def evaluate_checkpoint(
    config: Config,
    checkpoint: str,
    ranks: Ranks = SINGLE_PROCESS,
    keep_outcomes: bool = False,
    keep_index: bool = False,
) -> tuple[Result, Labelled]:
    """Evaluate a weight file on the held-out images of a configuration, over all ranks.

    Args:
        config: the recipe.
        checkpoint: the weight file.
        ranks: those that share the images.
        keep_outcomes: whether the result has each image's outcome.
        keep_index: whether to write the index of images that `data.index` names.

    Returns:
        The result, and the images with their labels.

    Raises:
        UserError: weights that don't fit, or data or labels that can't be used.
    """
    preprocessing = build_preprocessing(config)
    # Before the images are read, where the configuration knows the number of classes.
    net = _load(config, checkpoint) if config.model.num_classes else None
    images = open_labelled(config, checkpoint, ranks, keep_index)
    config = resolve_classes(config, images.source)
    if net is None:
        net = _load(config, checkpoint)
    evaluator = Evaluator(
        images.source, preprocessing, config.evaluation.batch_size,
        config.data.workers, ranks, images.label_lists, keep_outcomes,
    )  # fmt: skip
    return evaluator.run(net), images


def _load(config: Config, checkpoint: str) -> nn.Cell:
    net = accelerate(build_model(config), config.runtime)
    logger.info("%s", load_weights(net, checkpoint))
    return net
