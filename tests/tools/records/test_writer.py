"""The conversion: killed anywhere it ends the same; what is broken or has changed is named."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data.loader import create_eval_loader
from src.data.records import open_records, verify
from src.data.sources import open_source
from src.errors import UserError
from src.folder_lock import lock_folder
from tests.conftest import ROOT, run_command
from tests.data.test_records import write_folder
from tools.records import writer
from tools.records.writer import Options, convert

EIGHT = Options(images_per_shard=8)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "folder")


def contents(target):
    """Every file below, hidden ones too, with its bytes."""
    files = [path for path in target.rglob("*") if path.is_file()]
    return {str(path.relative_to(target)): path.read_bytes() for path in files}


def refused(words, *arguments, **keywords):
    with pytest.raises(UserError, match=words) as caught:
        convert(*arguments, **keywords)
    assert "\n" not in str(caught.value)


# layout


def uneven(tmp_path):
    """Three images of 0.2 MB in each of two classes, then a small one: shards of 3, 3 and 1."""
    root = tmp_path / "uneven"
    for label, name in enumerate("ab"):
        (root / "train" / name).mkdir(parents=True)
        for k in range(3 + label):
            pixels = np.random.default_rng(k).integers(0, 256, (256, 256, 3), np.uint8)
            size = 8 if k == 3 else 256
            Image.fromarray(pixels[:size, :size]).save(root / "train" / name / f"{k}.png")
    return root


def test_shards_of_unequal_size_are_read_together(tmp_path):
    """MindSpore opens only shards whose pages and headers have one size."""
    target = tmp_path / "out"
    convert(uneven(tmp_path), target, Options(images_per_shard=3))
    assert verify(target) == {target / "train": 7}
    source = open_records(target / "train", None)
    batches = create_eval_loader(source, [], 1).iterate(output_numpy=True)
    assert [labels.tolist() for _, labels in batches] == [[0]] * 3 + [[1]] * 4


def test_shards_of_another_layout_are_found_and_written_again(tmp_path, monkeypatch, caplog):
    """As earlier versions wrote them: each shard with a page for its own images."""
    root, target, options = uneven(tmp_path), tmp_path / "out", Options(images_per_shard=3)
    layouts = iter([[1 << 20, 1 << 20], [1 << 20, 1 << 20], [1 << 20, 1 << 16]])
    own = writer.open_writer
    with monkeypatch.context() as patch:
        patch.setattr(writer, "open_writer", lambda path, _, text: own(path, next(layouts), text))
        refused("can't open the shards .*--force", root, target, options)
        patch.setattr(writer, "open_writer", own)
        patch.setattr(writer, "require_readable", lambda folder, names: None)
        convert(root, target, options)
    index = target / "train/index.json"
    earlier = json.loads(index.read_text())
    for shard in earlier["shards"]:
        del shard["layout"]
    index.write_text(json.dumps(earlier))
    with pytest.raises(UserError, match="can't open the shards"):
        verify(target)
    source = open_records(target / "train", None)
    with pytest.raises(UserError, match="can't open the shards .*--force"):
        next(create_eval_loader(source, [], 1).iterate())
    with pytest.raises(UserError, match="can't open the shards"):
        source.name(0)
    with caplog.at_level(logging.WARNING, "cvt"):
        convert(root, target, options)
    assert caplog.text.count("its pages have another size") == 3
    assert verify(target) == {target / "train": 7}


# interruption


def test_two_conversions_do_not_share_a_folder(folder, tmp_path):
    """The second one removed the first one's unfinished shard."""
    with lock_folder(tmp_path / "out"):
        refused("another run is using this folder.* --dst", folder, tmp_path / "out", EIGHT)


# Each ends the process without a word in the middle of training shard 1 (the second), as kill -9.
KILLS = {
    "half written": ("FileWriter.commit", "len(calls) == 2 and (kept(*a), die())"),
    "before the data moves": ("os.replace", "str(a[1]).endswith('1.mindrecord') and die()"),
    "before it is noted": ("writer.write_json", "len(a[0]['shards']) == 2 and die()"),
    "before the index": ("writer.write_json", "a[1].name == 'index.json' and die()"),
    "in the index": ("os.replace", "str(a[1]).endswith('train/index.json') and die()"),
    "before tidying up": ("writer._Conversion._remove_leftovers", "die()"),
}
# MindSpore is imported once; each moment has a fork, made before MindRecord has any thread.
KILLED = """
import os, signal, sys, traceback
from pathlib import Path
from mindspore.mindrecord import FileWriter
from tools.records import writer
folder, *rest = sys.argv[1:]
def run(target, condition, output):
    name, _, kind = target.rpartition(".")
    place, calls = eval(name), []
    kept = getattr(place, kind)
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    def replacement(*a, **k):
        calls.append(a)
        eval(condition, {"a": a, "calls": calls, "kept": kept, "die": die})
        return kept(*a, **k)
    setattr(place, kind, replacement)
    writer.convert(Path(folder), Path(output), writer.Options(8))
for target, condition, output in zip(*[iter(rest)] * 3):
    child = os.fork()
    if not child:
        try:
            run(target, condition, output)
        except Exception:
            traceback.print_exc()
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with the source, a conversion of it as a whole, and one killed at each moment."""
    place = tmp_path_factory.mktemp("killed")
    write_folder(place / "folder")
    words = [str(place / "folder")]
    for moment, (target, condition) in KILLS.items():
        words += [target, condition, str(place / moment)]
    command = [sys.executable, "-c", KILLED, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(KILLS), done.stderr
    convert(place / "folder", place / "whole", EIGHT)
    return place


@pytest.mark.parametrize("moment", KILLS)
def test_killed_it_goes_on_and_ends_with_the_same_files(killed, moment):
    if "tidying" not in moment:
        with pytest.raises(UserError, match="unfinished"):
            open_source("mindrecord", str(killed / moment), "train")

    resumed = convert(killed / "folder", killed / moment, EIGHT)
    expected = {"half written": 1, "before the data moves": 1, "before it is noted": 1}
    assert resumed["train"].kept == expected.get(moment, 3)
    assert contents(killed / moment) == contents(killed / "whole")
    assert "train/00001.mindrecord.db" in contents(killed / "whole")


def test_shards_of_somebody_else_are_neither_replaced_nor_removed(folder, tmp_path):
    target = tmp_path / "records"
    for name in ("00000.mindrecord", "00042.mindrecord", "00042.mindrecord.db"):
        (target / "train").mkdir(parents=True, exist_ok=True)
        (target / "train" / name).write_text("mine")
    refused("00000.mindrecord was not written by this command.*--force", folder, target, Options(4))
    assert {path.read_text() for path in (target / "train").iterdir()} == {"mine"}
    assert len(list((target / "train").iterdir())) == 3


def test_a_second_run_changes_nothing(folder, tmp_path):
    first = convert(folder, tmp_path / "out", EIGHT)
    assert (first["train"].images, first["train"].shards, first["train"].kept) == (21, 3, 0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = convert(folder, tmp_path / "out", EIGHT)
    assert (again["train"].images, again["train"].kept, again["val"].kept) == (21, 3, 2)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_a_damaged_shard_is_written_anew(folder, tmp_path, damage, caplog):
    convert(folder, tmp_path / "out", EIGHT)
    whole = contents(tmp_path / "out")
    path = tmp_path / "out/train/00001.mindrecord"
    if damage == "lose":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-5] if damage == "cut" else content)
    with caplog.at_level(logging.WARNING):
        assert convert(folder, tmp_path / "out", EIGHT)["train"].kept == 2
    assert "rewriting a shard" in caplog.text and "00001.mindrecord" in caplog.text
    assert contents(tmp_path / "out") == whole


# a source that has changed


def add(folder):
    shutil.copy(folder / "train/2/0.jpg", folder / "train/2/extra.jpg")


def remove(folder):
    (folder / "train/33/6.jpg").unlink()


def rename(folder):
    (folder / "train/33/6.jpg").rename(folder / "train/33/7.jpg")


def another_size(folder):
    Image.new("RGB", (50, 50)).save(folder / "train/33/6.jpg")


def another_time(folder):
    os.utime(folder / "train/33/6.jpg", (1, 1))


def add_class(folder):
    for split in ("train", "val"):
        shutil.copytree(folder / split / "33", folder / split / "34")


@pytest.mark.parametrize(
    "change, words, kept",
    [
        (add, "list of images", 0),
        (remove, "list of images", 2),
        (rename, "list of images", 2),
        (another_size, "an image file of shard 2", 2),
        (another_time, "an image file of shard 2", 2),
        (add_class, "list of classes", 0),
    ],
)
def test_a_changed_source_is_noticed(folder, tmp_path, change, words, kept):
    convert(folder, tmp_path / "out", EIGHT)
    before = contents(tmp_path / "out")
    change(folder)
    refused(f"{words} .* has changed since .* add --force", folder, tmp_path / "out", EIGHT)
    assert contents(tmp_path / "out") == before
    forced = Options(images_per_shard=8, force=True)
    assert convert(folder, tmp_path / "out", forced)["train"].kept == kept
    convert(folder, tmp_path / "anew", EIGHT)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_other_options_are_noticed_and_leave_no_shard_behind(folder, tmp_path):
    convert(folder, tmp_path / "out", EIGHT)
    refused("--images_per_shard has changed", folder, tmp_path / "out", Options(20))
    skipping = Options(8, skip_broken=True)
    assert convert(folder, tmp_path / "out", skipping)["train"].kept == 3, "none had a broken image"
    refused("--skip_broken has changed", folder, tmp_path / "out", EIGHT)
    convert(folder, tmp_path / "out", Options(20, force=True))
    convert(folder, tmp_path / "anew", Options(20))
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")
    assert "train/00002.mindrecord" not in contents(tmp_path / "out")


@pytest.mark.parametrize("shard", [2, 8])
def test_fewer_images_that_fill_the_shards_leave_a_set_that_opens(folder, tmp_path, shard):
    """The shards that stay are intact, but the index has more."""
    options = Options(images_per_shard=shard)
    images = sorted((folder / "train").rglob("*.*"))
    last = [path for path in images if path.parent == images[-1].parent]
    extra = len(images) % shard or shard
    convert(folder, tmp_path / "out", options)
    for path in last[1:][-extra:]:
        path.unlink()
    convert(folder, tmp_path / "out", dataclasses.replace(options, force=True))
    convert(folder, tmp_path / "anew", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")
    assert len(open_records(tmp_path / "out/train", "t")) == len(images) - len(last[1:][-extra:])


# broken images, odd folders


@pytest.fixture
def broken(folder):
    for name, kind in (("train/2/0.jpg", "cut"), ("train/33/5.png", "cut"), ("val/10/1.jpg", "")):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-20] if kind == "cut" else b"<html>404</html>")
    return folder


def test_broken_images_are_refused_and_all_named(broken, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        refused(
            "train/2/0.jpg: not a readable image .1 more are named above.; .*--skip_broken",
            broken, tmp_path / "out", EIGHT,
        )  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        f"{broken / 'train/33/5.png'}: not a readable image"
    ]
    refused("0.jpg: not a readable image .1 more", broken, tmp_path / "out", EIGHT)
    (broken / "train/33/5.png").unlink()
    refused("0.jpg: not a readable image; replace", broken, tmp_path / "out", EIGHT)
    with pytest.raises(UserError, match="its conversion is unfinished"):
        open_source("mindrecord", str(tmp_path / "out"), "train")


@pytest.mark.parametrize("first", ["first", "last"])
def test_the_same_command_with_skip_broken_follows_its_advice(broken, tmp_path, first):
    """Broken images, one of them a dangling link, in the first of three shards or in the last."""
    (broken / "train/33/6.jpg").unlink()
    (broken / "train/33/6.jpg").symlink_to("nowhere.jpg")
    bad = ["train/2/0.jpg", "train/33/5.png", "train/33/6.jpg"]
    if first == "last":
        shutil.copy(broken / "train/2/1.jpg", broken / bad.pop(0))
    words = f"{bad[0]}: not a readable image .{len(bad) - 1} more"
    refused(words, broken, tmp_path / "out", EIGHT)
    options = Options(8, skip_broken=True)
    done = convert(broken, tmp_path / "out", options)["train"]
    assert (done.skipped, done.kept) == (bad, 0 if first == "first" else 2)
    convert(broken, tmp_path / "anew", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")


def test_a_finished_set_that_is_begun_anew_is_unfinished_again(folder, tmp_path):
    convert(folder, tmp_path / "out", EIGHT)
    (folder / "train/33/6.jpg").write_text("x")
    forced = Options(images_per_shard=8, force=True)
    refused("33/6.jpg: not a readable image; replace", folder, tmp_path / "out", forced)
    with pytest.raises(UserError, match="unfinished"):
        open_source("mindrecord", str(tmp_path / "out"), "train")


def test_broken_images_are_skipped_if_told(broken, tmp_path):
    done = convert(broken, tmp_path / "out", Options(8, skip_broken=True))
    assert (done["train"].images, done["val"].images) == (19, 8)
    assert done["train"].skipped == ["train/2/0.jpg", "train/33/5.png"]
    index = json.loads((tmp_path / "out/train/index.json").read_text())
    assert [shard["images"] for shard in index["shards"]] == [7, 8, 4]
    source = open_source("mindrecord", str(tmp_path / "out"), "train")
    assert source.labels.tolist() == [0] * 6 + [1] * 7 + [2] * 6
    files = open_source("imagefolder", str(broken), "train")
    rest = [i for i in range(21) if i not in (0, 19)]
    assert all(source[k][0].tobytes() == files[i][0].tobytes() for k, i in enumerate(rest))
    again = Options(8, force=True)
    refused("train/2/0.jpg: not a readable image", broken, tmp_path / "out", again)


def test_a_shard_of_broken_images_only_is_left_out(broken, tmp_path, caplog, monkeypatch):
    one, out = Options(1, skip_broken=True), tmp_path / "out"
    done = convert(broken, out, one)["train"]
    bad = ["train/2/0.jpg", "train/33/5.png"]
    assert (done.images, done.shards, done.kept, done.skipped) == (19, 19, 0, bad)
    assert (
        f"{bad[0]} to {bad[0]}: no image is readable, so there is no 00000.mindrecord"
        in caplog.text
    )
    assert not (out / "train/00000.mindrecord").exists()
    before = contents(out)
    assert verify(out)[out / "train"] == len(open_source("mindrecord", str(out), "train")) == 19
    (out / "train/index.json").rename(out / "train/unfinished.json")
    (out / "train/00001.mindrecord").unlink()
    monkeypatch.setattr(
        writer, "_read", lambda path, read=writer._read: reads.append(path) or read(path)
    )
    for kept, expected in ((18, ["train/2/1.jpg"]), (19, [])):
        reads = []
        done = convert(broken, out, one)["train"]
        assert (done.images, done.shards, done.kept, done.skipped) == (19, 19, kept, bad)
        assert [os.path.relpath(path, broken) for path in reads] == expected
        assert contents(out) == before
    refused("--skip_broken has changed", broken, out, Options(1))
    with pytest.raises(UserError, match="2/0.jpg: not a readable image"):
        convert(broken, out, Options(1, force=True))


def test_a_split_without_a_readable_image_is_refused(broken, tmp_path):
    for path in (broken / "val").rglob("*.*"):
        path.write_text("x")
    for size in (1, 100, 1):
        options = Options(size, skip_broken=True, force=True)
        refused("no image is readable; is this the right --src", broken, tmp_path / "out", options)


def test_the_folders_faults_are_imagefolders(folder, tmp_path):
    refused("nowhere: no such folder; give the image", tmp_path / "nowhere", tmp_path / "o", EIGHT)
    refused(
        "no folder 'train' for the train split, there is folder", tmp_path, tmp_path / "o", EIGHT
    )
    (folder / "val/strange").mkdir()
    refused("'strange' is none of the 3 known classes", folder, tmp_path / "o", EIGHT)
    assert not (tmp_path / "o").exists(), "a fault of the second split comes before the first"
    refused("is the image folder itself", folder, folder, EIGHT)
    (folder / "val/strange").rmdir()
    for inside in ("train", "val/2/new", "."):
        split = {"train_folder": "."} if inside == "." else {}
        refused("is inside the image folder", folder, folder / inside / "out", EIGHT, **split)
    (tmp_path / "flat/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/cat/1.png")
    refused("add --train_folder .$", tmp_path / "flat", tmp_path / "o", EIGHT)
    with pytest.raises(UserError, match="--images_per_shard 0: must be 1 or more"):
        Options(images_per_shard=0)


@pytest.mark.parametrize("outside", ["{}/train", "../folder/train", "train/../../folder/train"])
def test_a_split_outside_the_source_is_refused(folder, tmp_path, outside):
    """Else its shards would be outside the target too, here between the images."""
    before = contents(tmp_path)
    for key in ("train_folder", "val_folder"):
        names = {key: outside.format(folder)}
        refused(f"--{key} .*train: must be below --src", folder, tmp_path / "out", EIGHT, **names)
    assert contents(tmp_path) == before


def test_a_target_that_is_no_utf_8_is_refused(folder, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    refused("caf.*/train: MindRecord takes only paths in UTF-8", folder, odd, EIGHT)
    assert not odd.exists()
    convert(folder, tmp_path / "out", EIGHT)
    (tmp_path / "out").rename(odd)
    with pytest.raises(UserError, match="only paths in UTF-8"):
        open_source("mindrecord", str(odd), "train")


def test_a_split_alone_and_other_folder_names(folder, tmp_path, caplog):
    (folder / "val").rename(folder / "test")
    with caplog.at_level(logging.WARNING):
        assert list(convert(folder, tmp_path / "out", EIGHT)) == ["train"]
    assert "no folder val, skipping this split" in caplog.text
    names = {"val_folder": "test"}
    assert list(convert(folder, tmp_path / "out", EIGHT, **names)) == ["train", "test"]
    assert len(open_source("mindrecord", str(tmp_path / "out"), "val", **names)) == 9


def test_large_images_and_odd_names(tmp_path):
    """A record larger than MindRecord's default page of 32 MiB, and a name that is no UTF-8."""
    for split in ("train", "val"):
        (tmp_path / "in" / split / "ä b").mkdir(parents=True)
    odd = os.fsencode(tmp_path) + b"/in/val/\xc3\xa4 b/\xff.bmp"
    Image.new("RGB", (4, 4)).save(odd.decode("utf-8", "surrogateescape"))
    Image.effect_noise((3600, 3600), 50).convert("RGB").save(tmp_path / "in/train/ä b/big.bmp")
    convert(tmp_path / "in", tmp_path / "out", EIGHT)
    for split, name in (("train", "big.bmp"), ("val", "\\xff.bmp")):
        files = open_source("imagefolder", str(tmp_path / "in"), split)
        source = open_source("mindrecord", str(tmp_path / "out"), split)
        assert source[0][0].tobytes() == files[0][0].tobytes()
        assert source.class_names == ("ä b",) and f"ä b/{name} (in" in source.describe(0)


def test_a_source_behind_a_link_and_relative(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    convert(Path("link"), Path("out"), EIGHT)
    source = open_source("mindrecord", "out", "train")
    assert source.describe(0).startswith(f"{tmp_path}/link/train/2/0.jpg (in out/train/00000.")


def test_a_disk_that_does_not_take_it_is_one_line(folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise RuntimeError("[ERROR] write failed\n\n----\nC++ Call Stack")

    monkeypatch.setattr(writer.ds, "MindDataset", full)
    refused("out/train: cannot write 00000.mindrecord: .ERROR. write", folder, tmp_path / "out",
            EIGHT)  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(writer.shutil, "rmtree", lambda *_, **__: None)  # files that are in use
    refused("out/train: cannot write 00000.mindrecord: .*File exists", folder, tmp_path / "out",
            EIGHT)  # fmt: skip
    (tmp_path / "file").write_text("")
    refused("give another --dst", folder, tmp_path / "file" / "x", EIGHT)


def test_the_command(folder, tmp_path, run_here):
    words = ("tools.records", "--src=folder", "--dst=out", "--images_per_shard=8")
    done = run_command(*words, "--verify", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines() == [
        "out/train: 21 images in 3 shards (0 kept from an earlier start), 0 broken images skipped",
        "out/val: 9 images in 2 shards (0 kept from an earlier start), 0 broken images skipped",
        "out/train: verified, 21 images",
        "out/val: verified, 9 images",
        "next: python train.py --config RECIPE --data.source mindrecord --data.path out",
    ]
    done = run_here("tools.records", "--dst=out/train", "--verify")
    assert done.stdout == "out/train: verified, 21 images\n", done.stderr
    (tmp_path / "out/val/00000.mindrecord").unlink()
    for wrong, complaint in (
        (("--dst=out", "--verify"), "out/val/00000.mindrecord: the shard is missing"),
        (("--dst=out",), "--src is missing"),
        (("--dst=out", "--verify", "--force"), "--force: applies to a conversion; give --src"),
        (("--src=folder", "--dst=out", "--image_per_shard=9"), "did you mean images_per_shard?"),
        (("--src=nowhere", "--dst=out"), "nowhere: no such folder"),
    ):
        done = run_here("tools.records", *wrong)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and complaint in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "out"]
