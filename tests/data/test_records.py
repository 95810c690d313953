"""Records hold the same images as the folder, in the same batches; what is damaged is noticed."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from src.data import balanced_subset, select_classes
from src.data.augment import create_train_operations
from src.data.loader import create_eval_loader, create_train_loader, find_broken_image
from src.data.records import verify
from src.data.shards import database
from src.data.sources import open_source
from src.data.transforms import Preprocessing
from src.errors import UserError
from tests.data.test_loader import collect, equal
from tools.records.writer import Options, convert

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
EVAL = Preprocessing((8, 8), None, MEAN, STD)
CLASSES = ("2", "10", "33")  # as integers; as text "10" would come first


def write_folder(root, train=7, val=3, seed=0):
    """Noise of various sizes, JPEG and PNG, in ImageNet's layout."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (int(rng.integers(9, 30)), int(rng.integers(9, 30)), 3)
                image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
                image.save(root / split / name / f"{i}.{'png' if i % 3 == 2 else 'jpg'}")
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="session")
def converted(folder, tmp_path_factory):
    """21 images for training in shards of 8, 8 and 5; 9 to evaluate on in shards of 8 and 1."""
    target = tmp_path_factory.mktemp("converted") / "with space"
    convert(folder, target, Options(images_per_shard=8))
    return target


@pytest.fixture
def records(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "records")


def both(folder, records, split, **keywords):
    return (
        open_source("imagefolder", str(folder), split, **keywords),
        open_source("mindrecord", str(records), split, **keywords),
    )


# the same as the folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_items_are_the_files(folder, converted, split):
    files, source = both(folder, converted, split)
    assert source.encoded and source.class_names == files.class_names == CLASSES
    assert np.array_equal(source.labels, files.labels) and source.labels.dtype == np.int32
    assert len(source) == (21 if split == "train" else 9)
    for index in range(len(files)):
        assert source[index][0].tobytes() == files[index][0].tobytes()
        assert source[index][1] == files[index][1]
        assert source.describe(index).startswith(f"{files.describe(index)} (in {converted}")
    assert "00000.mindrecord, record 7" in source.describe(7)
    assert "00001.mindrecord, record 0" in source.describe(8)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_batches_are_the_folders_to_the_last_bit(folder, converted, world):
    files, source = both(folder, converted, "train")
    operations = create_train_operations((8, 8), MEAN, encoded=True)
    for rank in range(world):
        for skip in (0, 1):
            keys = {"seed": 3, "epoch": 2, "rank": rank, "world": world, "skip_batches": skip}
            expected = collect(create_train_loader(files, operations, 3, **keys))
            batches = create_train_loader(source, operations, 3, **keys)
            assert len(expected) == 21 // world // 3 - skip > 0
            assert equal(collect(batches), expected) and equal(collect(batches), expected)


def test_an_epoch_of_several_passes_reads_images_again(folder, converted):
    operations = create_train_operations((8, 8), MEAN, encoded=True, crop="pad")
    sides = [
        collect(create_train_loader(source, operations, 5, seed=3, epoch=1, batches=9))
        for source in both(folder, converted, "train")
    ]
    assert equal(*sides) and len(sides[0]) == 9


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_batches_are_the_folders(folder, converted, world):
    files, source = both(folder, converted, "val")
    for rank in range(world):
        sides = [
            collect(create_eval_loader(some, EVAL.operations(True), 4, rank=rank, world=world))
            for some in (files, source)
        ]
        assert equal(*sides)
        assert sum(len(labels) for _, labels in sides[1]) == len(range(rank, 9, world))


def test_subsets_and_labels_follow_the_given_names(folder, converted):
    def parts(source):
        yield select_classes(source, ["33", "2"])
        yield balanced_subset(source, 10, seed=1)
        yield balanced_subset(
            select_classes(source, ["10", "33"], list("ab") + ["33", "10"]), 5, seed=2
        )

    for a, b in zip(*(parts(source) for source in both(folder, converted, "train"))):
        sides = [collect(create_eval_loader(part, EVAL.operations(True), 4)) for part in (a, b)]
        assert equal(*sides) and len(sides[0]) > 1
    names = ("33", "zebra", "2", "10")
    files, source = both(folder, converted, "val", class_names=names)
    assert source.class_names == names and np.array_equal(source.labels, files.labels)
    with pytest.raises(UserError, match="33: none of the 2 known classes"):
        open_source("mindrecord", str(converted), "train", ["2", "10"])


def test_mindspore_reads_the_images_itself(converted):
    """Not record by record through Python, which would be slower."""
    source = open_source("mindrecord", str(converted), "train")
    type(source).__getitem__, kept = None, type(source).__getitem__
    try:
        assert len(collect(create_eval_loader(source, EVAL.operations(True), 4))) == 6
    finally:
        type(source).__getitem__ = kept


# damage


def cut(records):
    path = records / "train/00001.mindrecord"
    path.write_bytes(path.read_bytes()[:-1])


def cut_database(records):
    path = database(records / "train/00001.mindrecord")
    path.write_bytes(path.read_bytes()[:-1])


def lost(records):
    (records / "train/00001.mindrecord").unlink()


def lost_database(records):
    database(records / "train/00001.mindrecord").unlink()


def swapped(records):
    """Its own shard 0 in shard 1's place, made as long."""
    path = records / "train/00001.mindrecord"
    size = path.stat().st_size
    shutil.copy(path.with_name("00000.mindrecord"), path)
    with open(path, "r+b") as file:
        file.truncate(size)


def unfinished(records):
    (records / "train/index.json").rename(records / "train/unfinished.json")


def no_index(records):
    (records / "train/index.json").unlink()


def junk_index(records):
    (records / "train/index.json").write_text("[1]")


def nested_index(records):
    (records / "train/index.json").write_text("[" * 200_000)


def change_index(records, change):
    path = records / "train/index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def index_without_a_shard(records):
    change_index(records, lambda index: index["shards"].pop())


def index_with_other_labels(records):
    change_index(records, lambda index: index["shards"][0]["labels"][0].__setitem__(1, 99))


def index_without_a_class(records):
    change_index(records, lambda index: index["class_names"].pop())


def index_of_tomorrow(records):
    change_index(records, lambda index: index.update(format=2))


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, "00001.mindrecord: .* bytes instead of"),
        (cut_database, "00001.mindrecord.db: .* bytes instead of"),
        (lost, "00001.mindrecord: the shard is missing"),
        (lost_database, "00001.mindrecord.db: the shard is missing"),
        (swapped, "00001.mindrecord: from another set"),
        (unfinished, "train: its conversion is unfinished; run tools.records again"),
        (no_index, "no index.json of MindRecord shards"),
        (junk_index, "index.json: damaged"),
        (nested_index, "index.json: damaged"),
        (index_without_a_shard, "16 images in the shards, 21 in all"),
        (index_with_other_labels, "labels and images of 00000.mindrecord disagree"),
        (index_without_a_class, "labels and images of 00001.mindrecord disagree"),
        (index_of_tomorrow, "format 2, this version reads 1"),
    ],
)
def test_damage_is_noticed_before_anything_is_read(records, damage, words):
    open_source("mindrecord", str(records), "train")
    damage(records)
    with pytest.raises(UserError, match=words) as caught:
        open_source("mindrecord", str(records), "train")
    assert "\n" not in str(caught.value)
    assert len(open_source("mindrecord", str(records), "val")) == 9


def test_a_shard_of_another_set_is_noticed(records, tmp_path):
    """Same images, counts and sizes; only the name of their class is another."""
    other = write_folder(tmp_path / "other")
    for split in ("train", "val"):
        (other / split / "33").rename(other / split / "34")
    convert(other, tmp_path / "others", Options(images_per_shard=8))
    theirs, ours = (place / "train/00002.mindrecord" for place in (tmp_path / "others", records))
    assert theirs.stat().st_size == ours.stat().st_size
    shutil.copy(theirs, ours)
    with pytest.raises(UserError, match="00002.mindrecord: from another set"):
        open_source("mindrecord", str(records), "train")


def test_a_flipped_bit_is_found_by_verify(records):
    assert verify(records) == {records / "train": 21, records / "val": 9}
    path = records / "val/00001.mindrecord"
    content = bytearray(path.read_bytes())
    content[content.rfind(b"IEND" if b"IEND" in content else b"\xff\xd9") - 9] ^= 1
    path.write_bytes(content)
    open_source("mindrecord", str(records), "val")
    with pytest.raises(UserError, match="val/00001.mindrecord: damaged"):
        verify(records)
    with pytest.raises(UserError, match="no MindRecord split"):
        verify(records / "train" / "nothing")


def test_a_broken_record_is_named(records, monkeypatch, tmp_path):
    """The JPEG's first bytes are overwritten after the conversion."""
    monkeypatch.chdir(tmp_path)
    source = open_source("mindrecord", str(records), "train")
    path, jpeg = records / "train/00001.mindrecord", source[8][0].tobytes()
    content = path.read_bytes()
    path.write_bytes(content.replace(jpeg[:40], b"x" * 40, 1))
    source = open_source("mindrecord", str(records), "train")
    assert find_broken_image(source, range(21)).startswith(
        f"{source.describe(8)}: not a readable image"
    )
    words = r"train/10/1.jpg \(in .*00001.mindrecord, record 0\): not a readable image"
    with pytest.raises(UserError, match=words):
        collect(create_eval_loader(source, EVAL.operations(True), 4))


def test_a_shard_cut_off_while_it_is_in_use_is_named(records, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    source = open_source("mindrecord", str(records), "train")
    with open(records / "train/00001.mindrecord", "r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(UserError, match="00001.mindrecord, record 0.*: not a readable image"):
        collect(create_eval_loader(source, EVAL.operations(True), 4))


def test_too_few_open_files_are_refused(records, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (260, 260))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
    with pytest.raises(UserError, match="3 MindRecord shards need 268 open files, .* 260;"):
        open_source("mindrecord", str(records), "train")


def test_photographs_of_phones_scans_and_prints_are_packed_as_they_are(tmp_path):
    """EXIF turns them, or MindSpore alone would read other colours; a record is the file."""
    rng = np.random.default_rng(3)
    exif = Image.Exif()
    exif[0x0112] = 6
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "in" / split / name).mkdir(parents=True)
            place = tmp_path / "in" / split / name
            image = Image.fromarray(rng.integers(0, 256, (20, 31, 3), dtype=np.uint8))
            image.save(place / "0 phone.jpg", exif=exif)
            image.convert("CMYK").save(place / "1 print.jpg")
            image.save(place / "2 scan.tif")
            image.save(place / "3 web.webp")
            image.save(place / "4 plain.jpg")
    convert(tmp_path / "in", tmp_path / "out", Options(images_per_shard=8))
    for split, make, operations in (
        ("train", lambda *a: create_train_loader(*a, seed=1, epoch=0), create_train_operations),
        ("val", create_eval_loader, None),
    ):
        files, records = both(tmp_path / "in", tmp_path / "out", split)
        for k in range(10):
            assert records[k][0].tobytes() == files[k][0].tobytes()
        chain = operations((8, 8), MEAN, encoded=True) if operations else EVAL.operations(True)
        assert equal(collect(make(records, chain, 5)), collect(make(files, chain, 5)))
        again = [source.subset(np.tile(np.arange(10), 2)) for source in (records, files)]
        assert equal(*(collect(make(source, chain, 5)) for source in again))
        assert [records.name(k) for k in range(10)] == [files.name(k) for k in range(10)]
    verify(tmp_path / "out")


def test_a_start_reads_no_record(converted, monkeypatch):
    """Of ImageNet that would be 140 GB; the shards' checksums and the labels stand for them."""
    source = open_source("mindrecord", str(converted), "train")
    monkeypatch.setattr(source, "_open_single", lambda: pytest.fail("read"))
    parts = [
        source,
        balanced_subset(source, 9, 1),
        balanced_subset(source, 9, 2),
        select_classes(source, ["2"]),
    ]
    digests = [part.digest() for part in parts]
    assert len({*digests}) == 4
    for part in parts:
        part._checksums = ["0" * 64, *source._checksums[1:]]
    assert not {part.digest() for part in parts} & {*digests}, "another shard"
