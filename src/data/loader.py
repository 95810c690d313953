"""Batches from a source: who gets which image, in which order, and with which random numbers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import mindspore.dataset as ds
import numpy as np

from src.data.base import Source
from src.data.images import decode, prepare
from src.data.keyed import Keyed
from src.data.transforms import remove_dumps
from src.errors import UserError

_log = logging.getLogger("cvt")


def epoch_indices(
    count: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    repeats: int = 1,
    length: int | None = None,
) -> np.ndarray:
    """This rank's share of the epoch's permutation of `range(count)`, int64 [about count / world].

    The permutation is the same on every rank, so over the ranks each sample comes once an epoch.
    With `repeats`, each comes so often in a row, dealt out to the ranks one by one, and the epoch
    ends when it is as long as without: 1 / repeats of the samples are in it (repeated augmentation,
    Hoffer et al., 2020; DeiT's samplers.py).

    With `length`, epochs are pieces of so many samples of one sequence of permutations, in which
    each sample comes `repeats` times in a row: whatever the length, and across epochs, no sample
    comes another time before all have come.
    """
    if length is None:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        return order[np.arange(count) // repeats][rank::world]
    turns = np.arange(epoch * length, (epoch + 1) * length) // repeats
    first, last = turns[0] // count, turns[-1] // count
    passes = [np.random.default_rng([seed, p]).permutation(count) for p in range(first, last + 1)]
    return np.concatenate(passes)[turns - first * count][rank::world]


def train_batches(
    source: Source,
    operations: Sequence[Callable],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    skip_batches: int = 0,
    repeats: int = 1,
    multiple: int = 1,
    batches: int | None = None,
) -> Batches:
    """The batches of one epoch, shuffled, all of `batch_size`, as many on each rank.

    They depend on the arguments only, not on what ran before or runs beside. They do depend on the
    number of workers, because MindSpore gives each worker thread a random generator of its own: to
    repeat a run on a machine with another number of cores, set `workers` (to no more than it has).

    Args:
        operations: from `train_operations`; random ones must be MindSpore's C++ operations, or
            `Keyed`, which do not depend on the number of workers.
        seed, epoch: set the order and, with the rank, the augmentation's random numbers.
        workers: threads for `operations`; 0 takes one per core, eight at most.
        skip_batches: leave out the epoch's first batches, to go on after an interruption. The rest
            is the same to the last bit, because the skipped ones are computed and thrown away.
        repeats: as in `epoch_indices`.
        multiple: the number of batches is one of this, for steps of several batches.
        batches: of the epoch, on each rank; None takes as many as the images fill once.

    Raises:
        UserError: not one batch, or fewer than `skip_batches`.
    """
    length = None if batches is None else batches * batch_size * world
    if batches is None or not len(source):
        batches = len(source) // world // (batch_size * multiple) * multiple
    if not batches:
        parts = f"{multiple} batches" if multiple > 1 else "one batch"
        raise UserError(
            f"{source.title}: {len(source)} images are not {parts} of {batch_size} on each of "
            f"{world} device(s); lower the batch size or add images"
        )
    if skip_batches > batches:
        raise UserError(
            f"{source.title}: cannot go on after batch {skip_batches} of {batches} an epoch; "
            "resume with the batch size, devices and data of the interrupted run"
        )
    share = epoch_indices(
        len(source),
        seed=seed,
        epoch=epoch,
        rank=rank,
        world=world,
        repeats=repeats,
        length=length,
    )
    return Batches(
        source,
        operations,
        share[: batches * batch_size],
        batch_size,
        seed=int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0]),
        skip_batches=skip_batches,
        workers=workers,
    )


def eval_batches(
    source: Source,
    operations: Sequence[Callable],
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Batches:
    """Every image once, in order, this rank's share `[rank::world]`; the last batch may be smaller.

    The shares differ by an image where `world` does not divide the number of images, and a rank
    may have none: add up counts over the ranks, do not average averages.
    """
    indices = np.arange(len(source))[rank::world]
    return Batches(source, operations, indices, batch_size, workers=workers)


class Batches:
    """A pass over some items of a source; each iteration starts it anew and gives the same batches.

    A class and not a `mindspore.dataset.Dataset`, as MindSpore reads the seed when an *iterator*
    is made: with a bare dataset, whoever sets another seed in between changes the augmentation.

    Iterating yields (images, labels): Tensors of what the operations make, uint8 [B, H, W, 3] in
    training and float32 [B, 3, H, W] in evaluation, and int32 [B]; and, where `Erase` is among the
    operations, their boxes, int32 [B, 4].
    """

    def __init__(
        self,
        source: Source,
        operations: Sequence[Callable],
        indices: np.ndarray,
        batch_size: int,
        *,
        seed: int | None = None,
        skip_batches: int = 0,
        workers: int = 0,
    ):
        self.source = source
        self.indices = indices
        self.batch_size = batch_size
        self._operations = list(operations)
        self._seed = seed
        self._skip = skip_batches
        self._workers = choose_workers(workers)

    def __len__(self) -> int:
        """Batches to come, the skipped ones not counted."""
        return -(-len(self.indices) // self.batch_size) - self._skip

    def __iter__(self) -> Iterator[tuple]:
        return self.iterate()

    def pipeline(self) -> ds.Dataset:
        """The MindSpore pipeline with columns "image", "label" and, with `Erase`, "box".

        It knows the seed of `Keyed` operations only, not that of MindSpore's own.
        """
        keyed = any(isinstance(operation, Keyed) for operation in self._operations)
        # One reading thread: two are slower, they hand Python's lock to and fro (digits: 770 img/s,
        # not 17,000; flower photos: 520, not 850). Storage that takes 5 ms a file caps it at 190.
        images = self.source.image_dataset(self.indices, self._workers)
        dataset = ds.GeneratorDataset(
            _Selection(self.source, self.indices, self._seed if keyed else None, images is None),
            [*["image"] * (images is None), "label", *["key"] * keyed],
            shuffle=False,
            num_parallel_workers=1,
            python_multiprocessing=False,
        )
        if images is not None:
            dataset = ds.zip((images, dataset))
        made = []
        for takes_key, group in itertools.groupby(
            self._operations, lambda operation: isinstance(operation, Keyed)
        ):
            group = list(group)
            taken = ["image", "key"] if takes_key else ["image"]
            made = ["image", group[-1].output] if takes_key else ["image"]
            dataset = dataset.map(group, taken, made, num_parallel_workers=self._workers)
        dataset = dataset.project(["image", "label", *["box"] * ("box" in made)])
        return dataset.batch(self.batch_size).skip(self._skip)

    def iterate(self, *, output_numpy: bool = False) -> Iterator[tuple]:
        """Yield as iterating does, numpy arrays instead of Tensors if asked to.

        Raises:
            UserError: an image cannot be read; the message names the file. Other failures of the
                pipeline pass through unchanged.
        """
        if not len(self):
            return
        with _pipeline_seed(self._seed):
            batches = self.pipeline().create_tuple_iterator(num_epochs=1, output_numpy=output_numpy)
        start = time.time()
        for done in range(len(self) + 1):
            try:
                item = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                remove_dumps(start)
                broken = find_broken(self.source, self._in_flight(done))
                if broken is None:
                    raise
                raise UserError(f"{broken}; remove or replace it") from error
            yield item

    def _in_flight(self, done: int) -> np.ndarray:
        """Items that the pipeline may have been at when it failed, `done` batches after the start.

        Its queues hold a few dozen batches; looking through all that follow would keep a user of
        ImageNet waiting for half an hour when the failure is of another kind.
        """
        first = (self._skip + done) * self.batch_size if done else 0
        last = (self._skip + done) * self.batch_size + 128 * max(self.batch_size, 32)
        return self.indices[first:last]


class _Selection:
    """`source[indices[k]]` for k = 0, 1, ..., the random access that GeneratorDataset wants.

    An item is image and label, and with a seed the key for `Keyed` operations, uint64 [2]: seed, k;
    without the image where MindSpore reads those itself.
    """

    def __init__(self, source: Source, indices: np.ndarray, seed: int | None, with_images: bool):
        self._source = source
        self._indices = indices
        self._seed = seed
        self._with_images = with_images

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> tuple:
        index = int(self._indices[position])
        item = self._source[index] if self._with_images else (self._source.labels[index],)
        if self._with_images and self._source.encoded:
            item = self._prepared(item[0], index), item[1]
        if self._seed is None:
            return item
        return (*item, np.array([self._seed, position], np.uint64))

    def _prepared(self, content: np.ndarray, index: int) -> np.ndarray:
        """Return `prepare(content)`, which from the second epoch on costs nothing for most files.

        A file of the size that it had is taken for the one that was looked at.
        """
        if self._source.straight[index] == len(content):
            return content
        prepared = prepare(content)
        if prepared is content:
            self._source.straight[index] = len(content)
        return prepared


@contextlib.contextmanager
def _pipeline_seed(seed: int | None):
    """Set the seed for the pipeline iterator made inside, and leave no trace.

    `ds.config.set_seed` also seeds the global generators of `random` and numpy.
    """
    if seed is None:
        yield
        return
    before = ds.config.get_seed(), random.getstate(), np.random.get_state()
    ds.config.set_seed(seed)
    try:
        yield
    finally:
        ds.config.set_seed(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


@functools.cache  # so that the warning comes once, not every epoch
def choose_workers(workers: int) -> int:
    """The number of worker threads; 0 takes one per core at hand, eight at most.

    MindSpore refuses more than the machine has cores, so more are cut down, with a warning.
    """
    cores = os.cpu_count() or 1
    if workers < 0:
        raise UserError(f"workers {workers} makes no sense; use 0 for one per core")
    if workers == 0:
        at_hand = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
        return min(at_hand, cores, 8)
    if workers > cores:
        _log.warning(
            "%d data workers asked for, %d taken: MindSpore allows no more than there are cores. "
            "The augmentation's random numbers depend on it.",
            workers, cores,
        )  # fmt: skip
    return min(workers, cores)


def find_broken(source: Source, indices: Iterable[int]) -> str | None:
    """The first of these items that can't be read or decoded: where it is, and what is wrong."""
    if not source.encoded:
        return None
    for index in indices:
        try:
            decode(source[int(index)][0])
        except (OSError, UserError) as error:
            reason = getattr(error, "strerror", None) or "not a readable image"
            reason = error if isinstance(error, UserError) else reason
            return f"{source.describe(int(index))}: {reason}"
    return None
