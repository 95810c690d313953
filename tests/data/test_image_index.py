"""The index of images: what it saves reading again, and what makes it distrust itself."""

import json
import logging
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data import ArraySource, FileSource, drop_broken, image_index
from src.data.image_index import check_files
from src.distributed import Ranks
from src.errors import UserError
from tests.data.images import TURNED, file_of, photo
from tests.processes import together


@pytest.fixture
def folder(tmp_path):
    for number in range(8):
        Image.fromarray(photo(20, 20, number)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "5.jpg").write_bytes((tmp_path / "5.jpg").read_bytes()[:-50])
    return tmp_path


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were read since the last look."""
    names = []
    check_file = image_index._check_file

    def spy(file):
        names.append(os.path.basename(file))
        return check_file(file)

    monkeypatch.setattr(image_index, "_check_file", spy)

    def taken():
        result = sorted(names)
        names.clear()
        return result

    return taken


@pytest.fixture
def check(folder, caplog):
    def run(**keywords):
        caplog.clear()
        with caplog.at_level(logging.INFO, "cvt"):
            files = sorted(str(path) for path in folder.glob("*.jpg"))
            entries = check_files(files, folder, folder / "deep" / "index.json", **keywords)
        return {os.path.basename(file): entry.fault for file, entry in zip(files, entries)}

    return run


ALL = [f"{number}.jpg" for number in range(8)]


def broken(faults):
    return [name for name, fault in faults.items() if fault]


def test_only_broken_files_are_read_again(check, read, folder):
    first = check()
    assert broken(first) == ["5.jpg"] and read() == ALL
    assert check() == first and read() == ["5.jpg"]
    Image.fromarray(photo(20, 20)).save(folder / "5.jpg")
    assert broken(check()) == [] and read() == ["5.jpg"]
    assert broken(check()) == [] and read() == []


def test_new_changed_and_removed_files(check, read, folder, caplog):
    check()
    read()
    Image.fromarray(photo(21, 20)).save(folder / "9.jpg")
    (folder / "2.jpg").write_text("no image")
    stamp = os.stat(folder / "3.jpg")
    os.utime(folder / "3.jpg", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    os.remove(folder / "0.jpg")
    faults = check()
    assert read() == ["2.jpg", "3.jpg", "5.jpg", "9.jpg"]
    assert broken(faults) == ["2.jpg", "5.jpg"] and list(faults) == [*ALL[1:], "9.jpg"]
    assert f"{folder}: checking 4 of {len(ALL)} images (threads: " in caplog.text
    assert "files changed since the last check (2), such as 2.jpg" in caplog.text
    assert "files removed since the last check (1), such as 0.jpg" in caplog.text
    check()
    assert "since" not in caplog.text


def test_a_single_process_walks_once(monkeypatch):
    """Copying what is left after each batch took minutes for a million images."""
    monkeypatch.setattr(image_index, "_BATCH", 1)
    start = time.monotonic()
    walk = image_index._map_over_ranks(range(20_000), lambda some: [(k,) for k in some], Ranks())
    assert list(walk) == [(k, (k,)) for k in range(20_000)]
    assert time.monotonic() - start < 2


def test_files_of_another_split_are_kept(folder, read, tmp_path):
    files = sorted(map(str, folder.glob("*.jpg")))
    for some in (files[:4], files[4:], files):
        check_files(some, folder, tmp_path / "index.json")
    assert read() == sorted([*ALL, "5.jpg"])


def test_images_of_another_split_are_not_looked_up(tmp_path, monkeypatch, caplog):
    """A stat for each of ImageNet's training images let the other ranks wait before evaluation."""
    caplog.set_level(logging.INFO, "cvt")
    content, place = file_of(photo(20, 20)), tmp_path / "index.json"
    for split in ("train", "val"):
        for name in ("a/1", "a/2", "b/3", "c/4"):
            path = tmp_path / split / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def check(split):
        """Check a split; return which files the index knows and which had a stat."""
        seen = []
        monkeypatch.setattr(image_index, "_stat", lambda file: seen.append(file) or stat(file))
        files = sorted(map(str, (tmp_path / split).rglob("*.jpg")))
        check_files(files, tmp_path, place)
        assert seen == files
        return sorted(json.loads(place.read_text())["content"]["files"])

    stat = image_index._stat
    check("train")
    assert len(check("val")) == 8
    (tmp_path / "train" / "a" / "1.jpg").unlink()
    (tmp_path / "train" / "c" / "4.jpg").unlink()
    assert len(check("val")) == 8, "the folders are there"
    assert check("train")[:2] == ["train/a/2.jpg", "train/b/3.jpg"]
    assert "files removed since the last check (2)" in caplog.text
    shutil.rmtree(tmp_path / "train")
    assert check("val") == ["val/a/1.jpg", "val/a/2.jpg", "val/b/3.jpg", "val/c/4.jpg"]


def test_a_flipped_bit_anywhere_in_the_index_is_noticed(check, read, folder, caplog):
    expected = check()
    place = folder / "deep" / "index.json"
    whole = place.read_bytes()
    for position in np.linspace(92, len(whole) - 1, 40).astype(int):
        content = bytearray(whole)
        content[position] ^= 2
        place.write_bytes(content)
        read()
        assert check() == expected
        white = chr(whole[position]) in " "  # between two values, where a change may mean nothing
        assert read() == ALL or white, position
        assert "image index ignored, all images are read" in caplog.text or white
        assert json.loads(place.read_text()) == json.loads(whole), "made anew"


def test_an_index_of_a_strangers_is_ignored(folder, read, caplog):
    """Its configuration may name a device or a pipe, its index may be nested without end."""
    os.mkfifo(folder / "pipe")
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "nested.json").write_text('{"sha256": "", "content": %s}' % ("[" * 900 + "]" * 900))
    files = sorted(map(str, folder.glob("*.jpg")))
    for index in ("/dev/zero", folder / "pipe", folder / "deep.json", folder / "nested.json"):
        caplog.clear()
        check_files(files, folder, Path(index), write=False)
        assert read() == ALL and f"{index}: image index ignored" in caplog.text


def test_a_cut_index_and_one_of_another_folder_are_not_used(check, read, folder, caplog):
    expected = check()
    place = folder / "deep" / "index.json"
    place.write_bytes(place.read_bytes()[:100])
    read()
    assert check() == expected and read() == ALL
    assert "image index ignored" in caplog.text
    other = folder / "other"
    other.mkdir()
    Image.fromarray(photo(20, 20)).save(other / "0.jpg")
    check_files([str(other / "0.jpg")], other, place)
    assert read() == ["0.jpg"] and "written for another folder" in caplog.text


def test_an_interrupted_check_goes_on_where_it_was(check, read, folder, monkeypatch):
    monkeypatch.setattr(image_index, "_BATCH", 2)
    check_file = image_index._check_file

    def interrupted(file):
        if file.endswith("4.jpg"):
            raise KeyboardInterrupt
        return check_file(file)

    with monkeypatch.context() as patch:
        patch.setattr(image_index, "_check_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check(workers=1)
    assert read()[:4] == ALL[:4]
    assert broken(check()) == ["5.jpg"] and read() == ALL[4:]
    assert os.listdir(folder / "deep") == ["index.json"]


def test_a_killed_check_loses_the_last_minutes_only(check, folder, monkeypatch):
    """Saved as it goes: the index is there before the end, and whole."""
    monkeypatch.setattr(image_index, "_BATCH", 2)
    monkeypatch.setattr(image_index, "_SAVE_SECONDS", 0)
    sizes = []
    write = image_index._write

    def seen(place, root, entries):
        write(place, root, entries)
        sizes.append(len(image_index._read(place, root, own=True)))

    monkeypatch.setattr(image_index, "_write", seen)
    check()
    assert sizes == [*range(1, 9), 8]


def test_only_an_index_from_elsewhere_has_a_largest_size(check, read, monkeypatch, caplog):
    """ImageNet-22k's was written, but ignored by the next start."""
    first = check()
    read()
    monkeypatch.setattr(image_index, "_MAX_BYTES", 100)
    assert check() == first and read() == ["5.jpg"]
    assert check(write=False) == first and read() == ALL
    assert "image index ignored, all images are read (has more than 0 MiB)" in caplog.text


def test_nothing_is_written_where_nothing_is_to_be_kept(check, folder):
    check(write=False)
    assert not (folder / "deep").exists()


def test_an_index_that_can_not_be_written(check, folder):
    (folder / "deep").write_text("")
    with pytest.raises(UserError, match="index.json: .*deep is not a folder; give another file"):
        check()


@pytest.mark.parametrize(
    "content",
    [b"file,label\n1.jpg,daisy\n", b"{}", b'{"content": 1, "sha256": "x"}', b"\x1f\x8b\0", b" "],
)
def test_a_file_of_the_user_s_is_never_replaced(folder, read, content):
    """Nor is an image looked at in vain."""
    labels = folder / "labels.csv"
    labels.write_bytes(content)
    for target in (labels, folder / "link"):
        if not target.exists():
            target.symlink_to(labels)
        with pytest.raises(UserError, match=f"data.index {target}: not an image index"):
            check_files([str(folder / "1.jpg")], folder, target)
    with pytest.raises(UserError, match="is a folder"):
        check_files([str(folder / "1.jpg")], folder, folder)
    assert labels.read_bytes() == content and read() == []
    (entry,) = check_files([str(folder / "1.jpg")], folder, labels, write=False)
    assert entry.fault == "" and labels.read_bytes() == content


def test_an_index_tells_no_path_and_runs_no_command(folder, read):
    """It is handed on with a run's folder, and a shell may be made to read it."""
    (folder / "$(touch run)`touch run`").mkdir()
    image = folder / "$(touch run)`touch run`" / "1.jpg"
    (folder / "1.jpg").rename(image)
    place = folder / "index.json"
    check_files([str(image)], folder, place)
    assert str(folder) not in place.read_text()
    subprocess.run(["sh", str(place)], cwd=folder, capture_output=True)
    assert not (folder / "run").exists()
    check_files([str(image)], folder, place)
    assert read() == ["1.jpg"], "known from the first time"


def test_missing_files_are_broken(folder):
    (entry,) = check_files([str(folder / "none.jpg")], folder)
    assert entry.fault == "can't be read (No such file or directory)"


# what becomes of broken images


def test_broken_images_are_left_out_up_to_a_share(caplog):
    files = [f"{number}.jpg" for number in range(200)]
    source = FileSource(files, np.arange(200) % 2, ["a", "b"], "files")
    kept = drop_broken(source, {7: "cut off", 100: "empty"}, 0.01, "or else")
    assert len(kept) == 198 and kept.digest() != source.digest()
    assert [kept.describe(k) for k in (6, 7, 99)] == ["6.jpg", "8.jpg", "101.jpg"]
    assert kept.file(7) == "8.jpg" and kept.labels[7] == 0
    assert (
        "left out: 2 of 200 images of files can't be read (1.00 %): 7.jpg: cut off" in caplog.text
    )
    with pytest.raises(UserError, match="3 of 200 .*7.jpg: x; 8.jpg: x; 9.jpg: x; .*or else"):
        drop_broken(source, dict.fromkeys((9, 8, 7), "x"), 0.01, "or else")
    with pytest.raises(UserError, match="1 of 200"):
        drop_broken(source, {0: "x"}, 0.0, "or else")
    with pytest.raises(UserError, match="200 of 200 .*4.jpg: x; and 195 more;"):
        drop_broken(source, dict.fromkeys(range(200), "x"), 1.0, "or else")
    assert drop_broken(source, {}, 0.0, "") is source


def test_images_in_memory_have_no_file():
    source = ArraySource(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1, int), ["x"], "one")
    assert source.file(0) is None


def test_every_rank_learns_from_the_index_which_images_exif_turns(folder):
    Image.fromarray(photo(20, 20)).save(folder / "3.jpg", exif=TURNED)
    files = sorted(map(str, folder.glob("*.jpg")))
    place = folder / "index.json"
    for start in ("first", "second"):
        found = together(2, lambda ranks: check_files(files, folder, place, ranks=ranks))
        for entries in found:
            assert [k for k, entry in enumerate(entries) if entry.turned] == [3], start
        assert found[0] == found[1]


def test_ranks_share_the_check_and_none_waits_long(tmp_path, monkeypatch):
    """Rank 1 reads from slow storage; all know the same at the end, and the first one keeps it."""
    folder = tmp_path / "data"
    folder.mkdir()
    whole = file_of(photo(20, 30))
    for k in range(60):
        (folder / f"{k:02}.jpg").write_bytes(whole[: 60 if k % 20 == 7 else None])
    files = [str(folder / f"{k:02}.jpg") for k in range(60)]
    read = []
    real = image_index._map_over_ranks

    def shared(todo, work, ranks):
        def slowed(some):
            read.extend((ranks.rank, k) for k in some)
            time.sleep(0.1 * (ranks.rank == 1))
            return work(some)

        return real(todo, slowed, ranks)

    monkeypatch.setattr(image_index, "_map_over_ranks", shared)
    monkeypatch.setattr(image_index, "_ROUND_SECONDS", 0.3)
    monkeypatch.setattr(image_index, "_BATCH", 1)
    place, ranks_seen = tmp_path / "images.json", {}

    def check(ranks):
        ranks_seen[ranks.rank] = ranks
        return check_files(files, folder, place, ranks=ranks, workers=1)

    found = together(3, check)
    assert [e.fault[:7] for e in found[0] if e.fault] == ["cut off"] * 3
    assert found[0] == found[1] == found[2]
    times = np.bincount([k for _, k in read], minlength=60)
    assert times.tolist() == [2] * 60, "each file once for its stamp, once for its content"
    shares = np.bincount([rank for rank, _ in read])
    assert 0 < shares[1] < shares[0] / 2, "a slow rank does less"
    assert max(max(ranks.waits) for ranks in ranks_seen.values()) < 0.3 + 0.1 + 0.5
    assert sum(ranks_seen[0].waits) > 1, "the bound was put to the test"
    read.clear()
    again = together(2, check)
    assert [e.fault for e in again[1]] == [e.fault for e in found[0]]
    assert len(read) == 60 + 3, "stamps, and the broken ones"
