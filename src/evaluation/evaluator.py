"""Evaluate a network on a split; every image counts exactly once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from mindspore import Tensor, nn

from src.build import accelerate, build_for_weights, build_preprocessing
from src.config import Config
from src.data import Preprocessing, Source, create_eval_loader
from src.data.transforms import pad_batch
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError
from src.evaluation.labels import (
    LabeledSplit,
    compare_with_run,
    open_labeled_split,
    with_class_names,
)
from src.evaluation.metrics import Metrics, Outcomes
from src.progress import progress_bar
from src.splits import resolve_classes
from src.weights import load_weights

logger = logging.getLogger("cvt")


@dataclass
class Result:
    """The result of an evaluation.

    Args:
        metrics: sums over the split.
        images_per_second: over all ranks, without compilation.
        outcomes: per image, in the order of the split; None unless requested.
    """

    metrics: Metrics
    images_per_second: float
    outcomes: Outcomes | None = None

    METRICS: ClassVar = ("top1", "top5", "loss", "images", "images_per_second")

    def to_dict(self) -> dict[str, float]:
        """Return the metrics that eval.py prints and writes."""
        return {
            "top1": self.metrics.top1,
            "top5": self.metrics.top5,
            "loss": self.metrics.loss,
            "images": self.metrics.images,
            "images_per_second": self.images_per_second,
        }


def inference(net: nn.Cell) -> Callable[[np.ndarray], np.ndarray]:
    """Set a network to evaluation mode and return a NumPy function that runs it.

    Returns:
        float32 images [B, 3, H, W] -> logits [B, num_classes]; compiled by the first call.
    """
    net.set_train(False)
    return lambda images: net(Tensor(images)).asnumpy()


class Evaluator:
    """Runs a network over a split in batches of one shape, so that the graph compiles once.

    Args:
        source: the split.
        preprocessing: applied to each image.
        batch_size: images per step on each rank. The last batch is padded; padding is not counted.
        workers: threads that prepare images; 0 means one per core.
        ranks: the ranks that divide the split; rank r evaluates images r, r + world, ...
        label_lists: the correct classes of each image; they replace the split's labels.
        keep_outcomes: return the outcome of each image, too.

    Raises:
        UserError: the split has no images.
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
            raise UserError(f"{source.title}: no images to evaluate; add some")
        self.graph_compiled = False
        self._image_size = preprocessing.image_size
        self.batch_size = min(batch_size, len(source))
        self.images = len(source)
        self.ranks = ranks
        self._label_lists = label_lists and label_lists[ranks.rank :: ranks.world]
        self._keep_outcomes = keep_outcomes
        self.batches = create_eval_loader(
            source,
            preprocessing.operations(source.encoded),
            self.batch_size,
            rank=ranks.rank,
            world=ranks.world,
            workers=workers,
        )

    def compile(self, net: nn.Cell) -> None:
        """Compile the network for this evaluator's batch shape and set it to evaluation mode."""
        inference(net)(np.zeros((self.batch_size, 3, *self._image_size), np.float32))
        self.graph_compiled = True

    def run(self, net: nn.Cell, stop: Callable[[], bool] = lambda: False) -> Result | None:
        """Evaluate a network and leave it in evaluation mode.

        Args:
            net: images -> logits.
            stop: called after every batch; True stops the evaluation.

        Returns:
            The result of all ranks, on every rank; None if any rank stopped early.

        Raises:
            UserError: an image cannot be read, or a logit is not finite.
        """
        run, metrics, outcomes = inference(net), Metrics(), []
        if not self.graph_compiled:  # compilation is not part of the measured time
            self.compile(net)
        start = time.perf_counter()
        bar = progress_bar(len(self.batches.source), "evaluate")
        for images, labels in self.batches.iterate(output_numpy=True):
            logits = run(pad_batch(images, self.batch_size))[: len(labels)]
            batch = metrics.update(logits, self._targets(metrics.images, labels))
            if self._keep_outcomes:
                outcomes.append(np.stack(batch))
            bar.update(len(labels))
            if stop():
                break
        bar.close()
        metrics = Metrics.from_sums(self.ranks.gather(metrics.sums))
        if metrics.images < self.images:
            return None
        speed = metrics.images / (time.perf_counter() - start)
        return Result(metrics, speed, self._gather(outcomes) if self._keep_outcomes else None)

    def _targets(self, start: int, labels: np.ndarray) -> np.ndarray | Sequence[Sequence[int]]:
        """Return the correct classes of a batch that begins at this rank's image `start`."""
        if self._label_lists is None:
            return labels
        return self._label_lists[start : start + len(labels)]

    def _gather(self, outcomes: list[np.ndarray]) -> Outcomes:
        """Gather the outcomes of all ranks and interleave them into the order of the split."""
        world, fields = self.ranks.world, len(Outcomes._fields)
        local = np.concatenate([np.zeros((fields, 0)), *outcomes], axis=1)
        padded = np.zeros((fields, -(-self.images // world)))  # ranks may differ by one image
        padded[:, : local.shape[1]] = local
        parts = self.ranks.gather(padded).reshape(world, *padded.shape)
        return Outcomes(*parts.transpose(1, 2, 0).reshape(fields, -1)[:, : self.images])


def evaluate_checkpoint(
    config: Config,
    checkpoint: str,
    ranks: Ranks = SINGLE_PROCESS,
    keep_outcomes: bool = False,
    keep_index: bool = False,
) -> tuple[Result, LabeledSplit]:
    """Evaluate a weight file on a configuration's validation split, on all ranks.

    Args:
        config: the recipe.
        checkpoint: the weight file.
        ranks: the ranks that divide the split.
        keep_outcomes: return the outcome of each image, too.
        keep_index: write the image index that `data.index` names.

    Returns:
        The result, and the split with its labels.

    Raises:
        UserError: the weights do not fit, or the data or labels are invalid.
    """
    config = with_class_names(config, checkpoint)
    preprocessing = build_preprocessing(config)
    compare_with_run(checkpoint, config, class_names=False)
    # If the number of classes is known, load the weights first: misfits fail before data is read.
    net = _load(config, checkpoint) if config.model.num_classes else None
    images = open_labeled_split(config, checkpoint, ranks, keep_index)
    config = resolve_classes(config, images.source)
    if net is None:
        net = _load(config, checkpoint)
    evaluator = Evaluator(
        images.source, preprocessing, config.evaluation.batch_size,
        config.data.workers, ranks, images.label_lists, keep_outcomes,
    )  # fmt: skip
    return evaluator.run(net), images


def _load(config: Config, checkpoint: str) -> nn.Cell:
    net = build_for_weights(config)
    logger.info("%s", load_weights(net, checkpoint))
    return accelerate(net, config.runtime)
