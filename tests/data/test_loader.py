"""Which image comes when, and with which random numbers."""

import logging
import os
import random
import re

import mindspore.dataset as ds
import numpy as np
import pytest

from src.data import base
from src.data.augment import create_train_operations
from src.data.base import ArraySource, FileSource
from src.data.images import make_decodable
from src.data.loader import (
    create_eval_loader,
    create_train_loader,
    epoch_indices,
    resolve_num_workers,
)
from src.data.transforms import Preprocessing
from src.errors import UserError
from tests.data.images import file_of, photo

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
EVAL = Preprocessing((8, 8), None, MEAN, STD)


def numbered(count, size=8):
    """Random pictures whose label is their number."""
    images = np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8)
    return ArraySource(images, np.arange(count), [str(i) for i in range(count)], "numbered")


def augment():
    return create_train_operations((8, 8), MEAN, encoded=False, scale=(0.2, 1.0))


def collect(batches):
    return [tuple(part.copy() for part in batch) for batch in batches.iterate(output_numpy=True)]


def equal(some, others):
    return len(some) == len(others) and all(
        np.array_equal(a, b) for x, y in zip(some, others) for a, b in zip(x, y)
    )


# order and shares


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_every_image_once(world):
    source, seen = numbered(1003), []
    for rank in range(world):
        batches = create_eval_loader(source, EVAL.operations(False), 64, rank=rank, world=world)
        got = collect(batches)
        labels = np.concatenate([labels for _, labels in got])
        assert labels.tolist() == list(range(rank, 1003, world))
        assert len(got) == len(batches) and all(len(labels) == 64 for _, labels in got[:-1])
        for images, numbers in got:
            assert images.dtype == np.float32 and numbers.dtype == np.int32
            assert np.array_equal(images[0], EVAL(source[numbers[0]][0]))
        seen += labels.tolist()
    assert sorted(seen) == list(range(1003))


def test_a_rank_without_images_gets_no_batch():
    batches = create_eval_loader(numbered(2), EVAL.operations(False), 4, rank=2, world=3)
    assert len(batches) == 0 and list(batches) == []


def test_tensors_come_out():
    images, labels = next(iter(create_eval_loader(numbered(5), EVAL.operations(False), 4)))
    assert images.shape == (4, 3, 8, 8) and str(images.dtype) == "Float32"
    assert labels.shape == (4,) and str(labels.dtype) == "Int32"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_is_a_permutation_over_the_ranks(world):
    shares = [epoch_indices(1003, seed=1, epoch=4, rank=r, world=world) for r in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(1003))
    whole = epoch_indices(1003, seed=1, epoch=4)
    assert all(np.array_equal(whole[r::world], share) for r, share in enumerate(shares))
    for other in ({"seed": 2, "epoch": 4}, {"seed": 1, "epoch": 5}, {"seed": 4, "epoch": 1}):
        assert not np.array_equal(whole, epoch_indices(1003, **other))


def test_ranks_train_on_equally_many_full_batches():
    """Of 101 images rank 0 has 51, rank 1 has 50: with batches of 17, only one could make three."""
    seen = []
    for rank in (0, 1):
        got = collect(
            create_train_loader(numbered(101), augment(), 17, seed=0, epoch=0, rank=rank, world=2)
        )
        assert [images.shape for images, _ in got] == [(17, 8, 8, 3)] * 2
        seen += np.concatenate([labels for _, labels in got]).tolist()
    assert len(set(seen)) == len(seen) == 68


@pytest.mark.parametrize("count, world, repeats", [(101, 3, 3), (64, 2, 2), (30, 1, 4), (5, 4, 3)])
def test_repeated_augmentation_as_in_deits_sampler(count, world, repeats):
    """DeiT's samplers.py, RASampler.__iter__, with an epoch of all images instead of whole 256s."""
    order = epoch_indices(count, seed=1, epoch=4).tolist()
    repeated = [index for index in order for _ in range(repeats)]
    for rank in range(world):
        reference = []
        for position, index in enumerate(repeated):
            if position % world == rank and len(reference) * world + rank < count:
                reference.append(index)
        share = epoch_indices(count, seed=1, epoch=4, rank=rank, world=world, repeats=repeats)
        assert share.tolist() == reference


def test_a_repeated_image_is_augmented_differently():
    """On two ranks and three times in a row, so rank 0 has the first and third of each image."""
    source, got = numbered(24), []
    for rank in (0, 1):
        batches = create_train_loader(
            source, augment(), 12, seed=0, epoch=0, rank=rank, world=2, repeats=3
        )
        got += [pair for images, labels in collect(batches) for pair in zip(labels, images)]
    assert sorted(np.bincount([label for label, _ in got], minlength=24)) == [0] * 16 + [3] * 8
    assert len({image.tobytes() for _, image in got}) == 24


@pytest.mark.parametrize("count, length", [(10, 4), (10, 25), (7, 7), (3, 8)])
def test_epochs_of_a_length_are_pieces_of_one_sequence_of_passes(count, length):
    epochs = [epoch_indices(count, seed=1, epoch=e, length=length) for e in range(9)]
    assert [len(epoch) for epoch in epochs] == [length] * 9
    sequence = np.concatenate(epochs)
    passes = [epoch_indices(count, seed=1, epoch=p) for p in range(-(-len(sequence) // count))]
    assert sequence.tolist() == np.concatenate(passes)[: len(sequence)].tolist()
    shares = [epoch_indices(count, seed=1, epoch=3, length=length, rank=r, world=2) for r in (0, 1)]
    assert [share.tolist() for share in shares] == [epochs[3][r::2].tolist() for r in (0, 1)]


@pytest.mark.parametrize("count, length, repeats", [(10, 4, 3), (10, 25, 2), (7, 7, 5), (3, 8, 4)])
def test_repeated_samples_do_not_come_again_before_all_have_come(count, length, repeats):
    """Also across epochs of a given length: one sequence of passes, each sample in a row."""
    keys = {"seed": 1, "length": length, "repeats": repeats}
    shares = [[epoch_indices(count, epoch=e, rank=r, world=2, **keys) for r in (0, 1)]
              for e in range(20)]  # fmt: skip
    sequence = []
    for epoch in shares:
        merged = np.empty(length, int)
        merged[0::2], merged[1::2] = epoch
        sequence += merged.tolist()
    passes = len(sequence) // (count * repeats)
    assert passes >= 1
    for k in range(passes):
        order = sequence[k * count * repeats : (k + 1) * count * repeats]
        assert sorted(order[::repeats]) == list(range(count))
        assert order == [index for index in order[::repeats] for _ in range(repeats)]


def test_a_huge_number_of_repeats_takes_no_memory():
    assert len(set(epoch_indices(1000, seed=0, epoch=0, repeats=10**12).tolist())) == 1


def test_an_epoch_of_a_number_of_batches():
    """Of 7 images, on two ranks, five batches of 4: each image 5 or 6 times, drawn anew."""
    seen, pictures = [], set()
    for rank in (0, 1):
        batches = create_train_loader(
            numbered(7), augment(), 4, seed=0, epoch=0, rank=rank, world=2, batches=5
        )
        got = collect(batches)
        assert [images.shape for images, _ in got] == [(4, 8, 8, 3)] * 5
        seen += np.concatenate([labels for _, labels in got]).tolist()
        pictures |= {image.tobytes() for images, _ in got for image in images}
    assert set(np.bincount(seen).tolist()) == {5, 6}
    assert len(pictures) == 40
    with pytest.raises(UserError, match=r"fewer images \(0\) than a step takes"):
        create_train_loader(numbered(0), augment(), 4, seed=0, epoch=0, batches=5)


def test_too_few_images_for_a_batch():
    def refused(count, words, **options):
        with pytest.raises(UserError, match=f"^{re.escape(words)}, or add images$"):
            create_train_loader(numbered(count), augment(), 4, seed=0, epoch=0, **options)

    start = "numbered: fewer images (1) than a step takes "
    refused(1, start + "(4); lower training.batch_size (4)")
    refused(1, start + "(8 on 2 devices); lower training.batch_size (4)", world=2)
    keys = "training.batch_size (4) or training.accumulate (3)"
    refused(1, start + f"(24 on 2 devices); lower {keys}", world=2, multiple=3)
    with pytest.raises(UserError, match="after batch 3 of 2"):
        create_train_loader(numbered(9), augment(), 4, seed=0, epoch=0, skip_batches=3)


# random numbers


@pytest.fixture(scope="module")
def source():
    return numbered(210)


def epoch(source, number, **keywords):
    return create_train_loader(source, augment(), 16, seed=3, epoch=number, **keywords)


def test_epochs_differ_but_do_not_depend_on_the_ones_before(source):
    alone = collect(epoch(source, 5))
    for number in range(5):
        assert not equal(collect(epoch(source, number)), alone)
    assert equal(collect(epoch(source, 5)), alone)


def test_augmentation_differs_between_epochs_and_ranks(source):
    """All images are the same here, so only the random numbers can make a difference."""
    same = ArraySource(np.tile(source[0][0], (64, 1, 1, 1)), np.arange(64), ["x"], "same")
    seen = [
        images.tobytes()
        for number in (0, 1)
        for rank in (0, 1)
        for images, _ in collect(epoch(same, number, rank=rank, world=2))
    ]
    assert len(set(seen)) == len(seen) == 8


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("skip", [0, 1, 7, 12, 13])
def test_skipping_gives_the_rest_to_the_last_bit(source, skip, workers):
    if workers > os.cpu_count():
        pytest.skip("one core")
    whole = collect(epoch(source, 2, workers=workers))
    assert len(whole) == 13
    rest = epoch(source, 2, workers=workers, skip_batches=skip)
    assert len(rest) == 13 - skip and equal(collect(rest), whole[skip:])


def keyed_epoch(source, number, **keywords):
    """All that has a key, and nothing of MindSpore's own random operations."""
    operations = create_train_operations(
        (8, 8), MEAN, encoded=False, crop="pad", padding=0, hflip=0.0,
        rand_augment="rand-m9-mstd0.5-p0.9-inc1", erasing_prob=0.9,
    )  # fmt: skip
    return create_train_loader(source, operations, 16, seed=3, epoch=number, **keywords)


def test_keyed_operations_repeat_to_the_last_bit_with_any_number_of_workers(source):
    whole = collect(keyed_epoch(source, 2, workers=1))
    for images, labels, boxes in whole:
        assert images.dtype == np.uint8 and images.shape == (16, 8, 8, 3)
        assert labels.shape == (16,) and boxes.dtype == np.int32 and boxes.shape == (16, 4)
    assert equal(collect(keyed_epoch(source, 2, workers=1)), whole)
    if os.cpu_count() > 1:
        assert equal(collect(keyed_epoch(source, 2, workers=2)), whole)
    assert equal(collect(keyed_epoch(source, 2, skip_batches=5)), whole[5:])


def test_keyed_operations_differ_between_images_epochs_and_ranks(source):
    same = ArraySource(np.tile(source[0][0], (64, 1, 1, 1)), np.arange(64), ["x"], "same")
    seen = [
        image.tobytes()
        for number in (0, 1)
        for rank in (0, 1)
        for images, *_ in collect(keyed_epoch(same, number, rank=rank, world=2))
        for image in images
    ]
    assert len(seen) == 128 and len(set(seen)) > 120  # a few are not changed at all


def test_pipelines_beside_do_not_disturb(source):
    expected = collect(epoch(source, 7))
    batches, other = epoch(source, 7), epoch(source, 8)
    got = []
    for number, (images, labels) in enumerate(batches.iterate(output_numpy=True)):
        if number == 3:
            collect(create_eval_loader(source, EVAL.operations(False), 32))
        if number == 5:
            collect(other)
        got.append((images.copy(), labels.copy()))
    assert equal(got, expected)
    assert equal(collect(batches), expected)


def test_arrays_stay_valid_after_the_next_batch(source):
    kept = [images for images, _ in epoch(source, 1).iterate(output_numpy=True)]
    assert equal([(a,) for a in kept], [(a,) for a, _ in collect(epoch(source, 1))])


def test_global_generators_are_left_alone(source):
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    next(iter(epoch(source, 0)))
    assert (random.random(), np.random.rand()) == expected


def test_large_seeds_are_accepted(source):
    next(iter(create_train_loader(source, augment(), 16, seed=2**40, epoch=10**6)))


def test_workers(caplog):
    cores = os.cpu_count()
    assert 1 <= resolve_num_workers(0) <= min(8, cores) and resolve_num_workers(1) == 1
    with caplog.at_level(logging.WARNING):
        assert resolve_num_workers(cores + 3) == resolve_num_workers(cores + 3) == cores
    assert len(caplog.records) == 1 and f"data.workers {cores + 3}: MindSpore allows" in caplog.text


def test_bitmaps_wait_in_short_queues(monkeypatch):
    """Photographs that EXIF turns take gigabytes otherwise; the batches are the same."""
    sizes, real = [], ds.config.set_prefetch_size
    monkeypatch.setattr(ds.config, "set_prefetch_size", lambda n: sizes.append(n) or real(n))
    before = ds.config.get_prefetch_size()
    found = []
    for inflated in (False, True):
        source = numbered(50)
        source.inflated = inflated
        found.append(collect(epoch(source, 0)))
    assert sizes == [before, before, 2, before] and equal(*found)


def test_a_file_is_looked_at_in_the_first_epoch_only(tmp_path, monkeypatch):
    """Unless its size changes; files that `make_decodable` converts are inspected each time."""
    looked = []
    monkeypatch.setattr(
        base, "make_decodable", lambda content: looked.append(1) or make_decodable(content)
    )
    for number, kind in enumerate(["JPEG", "PNG", "BMP"]):
        (tmp_path / str(number)).write_bytes(file_of(photo(20, 20, number), kind))
    files = [str(tmp_path / str(number)) for number in range(3)]
    source = FileSource(files, np.arange(3), ["a", "b", "c"], "files")
    first, again = (collect(create_eval_loader(source, EVAL.operations(True), 3)) for _ in range(2))
    assert len(looked) == 3 + 1 and equal(first, again)
    (tmp_path / "0").write_bytes(file_of(photo(24, 20, 7)))
    changed = collect(create_eval_loader(source, EVAL.operations(True), 3))
    assert len(looked) == 3 + 1 + 2 and not equal(first, changed)
