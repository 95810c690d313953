"""Make batches: which rank gets which image, in which order, with which random numbers."""

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

from src.cores import cpu_count
from src.data.base import Source
from src.data.images import decode
from src.data.per_sample import PerSampleOp
from src.data.records import RecordSource
from src.data.shards import why_unreadable
from src.data.transforms import remove_decoder_dumps
from src.errors import UserError

# With MindSpore's 16, dozens of bitmaps of 37 MB (12 million pixels) wait; 2 costs 8 % of speed.
SHORT_QUEUE = 2

logger = logging.getLogger("cvt")


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
    """Return this rank's part of the epoch's permutation of `range(count)`, int64 [~count / world].

    The permutation is the same on every rank, so over all ranks each sample occurs once per epoch.

    Args:
        count: number of samples.
        seed, epoch: determine the permutation.
        rank, world: this rank, and the number of ranks.
        repeats: occurrences of each sample in a row, dealt to the ranks in turn. The epoch keeps
            its length and contains 1 / repeats of the samples (repeated augmentation, Hoffer et
            al., 2020; DeiT's samplers.py).
        length: samples per epoch. Epochs are then consecutive pieces of one sequence of
            permutations: no sample recurs, even across epochs, before all others have occurred.
    """
    if length is None:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        return order[np.arange(count) // repeats][rank::world]
    turns = np.arange(epoch * length, (epoch + 1) * length) // repeats
    first, last = turns[0] // count, turns[-1] // count
    passes = [np.random.default_rng([seed, p]).permutation(count) for p in range(first, last + 1)]
    return np.concatenate(passes)[turns - first * count][rank::world]


def create_train_loader(
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
) -> DataLoader:
    """Create the loader of one epoch: shuffled, full batches only, equally many on each rank.

    The batches depend on the arguments alone. This includes the number of workers, because each of
    MindSpore's worker threads has its own random generator: to repeat a run on a machine with
    another number of cores, set `workers` (to no more than the cores of either).

    Args:
        source: the images of all ranks.
        operations: from `create_train_operations`. Random ones must be C++ operations of MindSpore
            or `PerSampleOp`, whose numbers do not depend on the number of workers.
        batch_size: images per batch.
        seed, epoch: determine the order and, with the rank, the augmentation's random numbers.
        rank, world: this rank, and the number of ranks.
        workers: threads that run `operations`; 0 means one per core, at most eight.
        skip_batches: batches to skip at the start, to resume an epoch. The others are bitwise the
            same, because the skipped ones are computed and dropped.
        repeats: as in `epoch_indices`.
        multiple: round the number of batches down to a multiple of this, for accumulation.
        batches: batches per epoch on each rank; None means one pass over the images.

    Raises:
        UserError: there is no full batch, or fewer than `skip_batches`.
    """
    length = None if batches is None else batches * batch_size * world
    if batches is None or not len(source):
        batches = len(source) // world // (batch_size * multiple) * multiple
    if not batches:
        needed = f"{batch_size * multiple * world}" + f" on {world} devices" * (world > 1)
        keys = f"training.batch_size ({batch_size})"
        keys += f" or training.accumulate ({multiple})" * (multiple > 1)
        raise UserError(
            f"{source.title}: fewer images ({len(source)}) than a step takes ({needed}); lower "
            f"{keys}, or add images"
        )
    if skip_batches > batches:
        raise UserError(
            f"{source.title}: cannot continue after batch {skip_batches} of {batches} per epoch; "
            "resume with the batch size, devices and data of the interrupted run"
        )
    order = epoch_indices(
        len(source), seed=seed, epoch=epoch, rank=rank, world=world, repeats=repeats, length=length
    )
    return DataLoader(
        source.subset(order[: batches * batch_size]),
        operations,
        batch_size,
        seed=int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0]),
        skip_batches=skip_batches,
        workers=workers,
    )


def create_eval_loader(
    source: Source,
    operations: Sequence[Callable],
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> DataLoader:
    """Create a loader of this rank's images `[rank::world]`, in order; the last batch may be short.

    Ranks may differ by one image, and a rank may have none: sum counts over the ranks instead of
    averaging averages.
    """
    indices = np.arange(len(source))[rank::world]
    return DataLoader(source.subset(indices), operations, batch_size, workers=workers)


class DataLoader:
    """Batches of a source, from its first image to its last; every iteration gives the same ones.

    This is not a `mindspore.dataset.Dataset`, because MindSpore reads the seed when an *iterator*
    is created: anyone who sets another seed in between would change a bare dataset's augmentation.

    Iterating yields (images, labels): Tensors of what the operations make, uint8 [B, H, W, 3] in
    training and float32 [B, 3, H, W] in evaluation, and int32 [B]. If `Erase` is among the
    operations, boxes, int32 [B, 4], follow.

    Args:
        source: the images in the order of the batches.
        operations: applied to each image.
        batch_size: images per batch.
        seed: of the random operations.
        skip_batches: batches to skip at the start.
        workers: threads that run `operations`; 0 means one per core, at most eight.
    """

    def __init__(
        self,
        source: Source,
        operations: Sequence[Callable],
        batch_size: int,
        *,
        seed: int | None = None,
        skip_batches: int = 0,
        workers: int = 0,
    ):
        self.source = source
        self.batch_size = batch_size
        self._operations = list(operations)
        self._seed = seed
        self._skip_batches = skip_batches
        self._workers = resolve_num_workers(workers)

    def __len__(self) -> int:
        """Return the number of batches, without the skipped ones."""
        return -(-len(self.source) // self.batch_size) - self._skip_batches

    def __iter__(self) -> Iterator[tuple]:
        return self.iterate()

    def pipeline(self) -> ds.Dataset:
        """Build the MindSpore pipeline with columns "image", "label" and, with `Erase`, "box".

        It contains the seed of `PerSampleOp` operations; `iterate` sets that of MindSpore's own.
        """
        keyed = any(isinstance(operation, PerSampleOp) for operation in self._operations)
        # One reading thread: two are slower, because they contend for Python's lock (digits: 770
        # img/s, not 17,000; flower photos: 520, not 850). With storage that takes 5 ms per file,
        # one thread reads at most 190 img/s.
        images = self.source.image_dataset(self._workers)
        operations, first = self._operations, []
        if images is None:
            first = list(itertools.takewhile(_is_in_reader, operations))
            operations = operations[len(first) :]
        dataset = ds.GeneratorDataset(
            _Rows(self.source, self._seed if keyed else None, images is None, first),
            [*["image"] * (images is None), "label", *["key"] * keyed],
            shuffle=False,
            num_parallel_workers=1,
            python_multiprocessing=False,
        )
        if images is not None:
            dataset = ds.zip((images, dataset))
        outputs = []
        for takes_key, group in itertools.groupby(
            operations, lambda operation: isinstance(operation, PerSampleOp)
        ):
            group = list(group)
            inputs = ["image", "key"] if takes_key else ["image"]
            outputs = ["image", group[-1].output] if takes_key else ["image"]
            dataset = dataset.map(group, inputs, outputs, num_parallel_workers=self._workers)
        dataset = dataset.project(["image", "label", *["box"] * ("box" in outputs)])
        return dataset.batch(self.batch_size).skip(self._skip_batches)

    def iterate(self, *, output_numpy: bool = False) -> Iterator[tuple]:
        """Yield the batches, as NumPy arrays instead of Tensors if `output_numpy`.

        Raises:
            UserError: an image cannot be read; the message names the file. Other failures of the
                pipeline pass through unchanged.
        """
        if not len(self):
            return
        with _pipeline_seed(self._seed), _queues(SHORT_QUEUE if self.source.inflated else None):
            pipeline = self.pipeline()
            try:
                batches = pipeline.create_tuple_iterator(num_epochs=1, output_numpy=output_numpy)
            except RuntimeError as error:
                if isinstance(self.source, RecordSource):
                    raise UserError(f"{self.source.title}: {why_unreadable(error)}") from error
                raise
        start = time.time()
        for done in range(len(self) + 1):
            try:
                item = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                remove_decoder_dumps(start)
                broken = find_broken_image(self.source, self._in_flight(done))
                if broken is None:
                    raise
                raise UserError(f"{broken}; remove or replace it") from error
            yield item

    def _in_flight(self, done: int) -> range:
        """Return the images that the pipeline may have been reading after `done` batches.

        Its queues hold a few dozen batches. Checking all of ImageNet would take half an hour, in
        vain if the failure is of another kind.
        """
        next_image = (self._skip_batches + done) * self.batch_size
        end = next_image + 128 * max(self.batch_size, 32)
        return range(next_image if done else 0, min(end, len(self.source)))


class _Rows:
    """The rows of the GeneratorDataset: image, label and key.

    Args:
        source: the images in their order.
        seed: adds the key of `PerSampleOp` operations, uint64 [2]: seed and position; None omits
            the key.
        with_images: whether a row has the image; False if MindSpore reads it itself.
        operations: applied to the image.
    """

    def __init__(
        self,
        source: Source,
        seed: int | None,
        with_images: bool,
        operations: Sequence[PerSampleOp] = (),
    ):
        self._source = source
        self._seed = seed
        self._with_images = with_images
        self._operations = operations

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> tuple:
        row = (self._source.labels[position],)
        if self._seed is not None:
            key = np.array([self._seed, position], np.uint64)
            row = (*row, key)
        if self._with_images:
            image = self._source.read_decodable(position)
            for operation in self._operations:
                image, _ = operation(image, key)
            row = (image, *row)
        return row


def _is_in_reader(operation: Callable) -> bool:
    return isinstance(operation, PerSampleOp) and operation.in_reader


@contextlib.contextmanager
def _pipeline_seed(seed: int | None) -> Iterator[None]:
    """Set the seed of a pipeline iterator created inside, and restore all generators.

    `ds.config.set_seed` also seeds the global generators of `random` and NumPy.
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


@contextlib.contextmanager
def _queues(size: int | None) -> Iterator[None]:
    """Set the length of the queues of a pipeline iterator created inside; None changes nothing."""
    before = ds.config.get_prefetch_size()
    ds.config.set_prefetch_size(size or before)
    try:
        yield
    finally:
        ds.config.set_prefetch_size(before)


@functools.cache  # warn once, not every epoch
def resolve_num_workers(workers: int) -> int:
    """Return the number of worker threads; 0 means one per usable core, at most eight.

    MindSpore accepts no more than the machine has cores; a larger number is reduced to that, with a
    warning.
    """
    cores = os.cpu_count() or 1
    if workers == 0:
        return min(cpu_count(), 8)
    if workers > cores:
        logger.warning(
            "data.workers %d: MindSpore allows one per core, so %d are used; the augmentation's "
            "random numbers depend on this number",
            workers, cores,
        )  # fmt: skip
    return min(workers, cores)


def find_broken_image(source: Source, indices: Iterable[int]) -> str | None:
    """Return the place and fault of the first of these images that can't be decoded, or None."""
    if not source.encoded:
        return None
    for index in indices:
        try:
            decode(source[index][0])
        except UserError as error:
            return f"{source.describe(index)}: {error}"
        except OSError as error:
            return f"{source.describe(index)}: {error.strerror or 'not a readable image'}"
    return None
