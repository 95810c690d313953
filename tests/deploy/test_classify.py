"""Files and folders on the command line of infer.py, without a network."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.deploy import classify as room
from src.deploy.classify import check_outputs, classify_files
from src.deploy.predictor import Prediction
from src.errors import UserError, discard_output
from tests.conftest import ROOT


class Brightness:
    """Stands in for a Predictor: the class is bright or dark."""

    def stream(self, paths, top_k):
        for path in paths:
            try:
                value = np.asarray(Image.open(path).convert("RGB"), np.float32).mean()
                yield [Prediction(0, "bright" if value > 100 else "dark", 0.75)]
            except OSError:
                yield UserError(f"{path}: not a readable image")


@pytest.fixture
def folder(tmp_path):
    for i, value in enumerate((200, 10, 220)):
        path = tmp_path / "images" / f"sub{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (value,) * 3).save(path)
    return tmp_path / "images"


def test_a_line_per_image_and_json(folder, tmp_path, capsys):
    classify_files(Brightness(), str(folder), 1, str(tmp_path / "out.json"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    expected = [
        [str(folder / "sub0/0.png"), "bright", "0.7500"],
        [str(folder / "sub0/2.png"), "bright", "0.7500"],
        [str(folder / "sub1/1.png"), "dark", "0.7500"],
    ]
    assert lines == expected
    written = json.loads((tmp_path / "out.json").read_text())
    assert [entry["file"] for entry in written] == [line[0] for line in expected]
    assert written[2] == {
        "file": str(folder / "sub1/1.png"),
        "top": [{"label": 0, "name": "dark", "probability": 0.75}],
    }


def test_the_files_are_written_though_nobody_reads_the_lines(folder, tmp_path, monkeypatch):
    """As with `| head`; without files to write there is nothing to go on for."""
    for json_file in (str(tmp_path / "out.json"), None):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as output, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            if json_file is not None:
                classify_files(Brightness(), str(folder), 1, json_file)
                continue
            with pytest.raises(BrokenPipeError):
                classify_files(Brightness(), str(folder), 1, None)
            discard_output()  # so that `output` can be closed
    assert len(json.loads((tmp_path / "out.json").read_text())) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_the_files_are_written_though_the_lines_find_no_space(folder, tmp_path, monkeypatch):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        classify_files(Brightness(), str(folder), 1, str(tmp_path / "out.json"))
        with pytest.raises(OSError, match="No space left"):
            classify_files(Brightness(), str(folder), 1, None)
        with pytest.raises(OSError, match="No space left"):  # as at the end of a program
            full.flush()
        discard_output()  # so that `full` can be closed
    assert len(json.loads((tmp_path / "out.json").read_text())) == 3


def test_files_of_other_kinds_are_left_out_by_name(folder, caplog):
    """A phone's HEIC is no image here, but its owner expects a line for it."""
    (folder / "sub0/phone.heic").write_bytes(b"x")
    classify_files(Brightness(), str(folder), 1, None)
    assert "left out files (1) that are not .jpg" in caplog.text and "phone.heic" in caplog.text


def test_broken_files_are_named_beside_the_others(folder, tmp_path, capsys):
    (folder / "sub0/1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="1 of 4 files: .*sub0/1.png: not a readable image"):
        classify_files(Brightness(), str(folder), 1, str(tmp_path / "out.json"))
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    assert printed.err == f"{folder}/sub0/1.png: not a readable image\n"
    written = json.loads((tmp_path / "out.json").read_text())
    assert [bool(entry["top"]) for entry in written] == [True, False, True, True]
    assert "not a readable image" in written[1]["error"]
    with pytest.raises(UserError, match="^.*sub0/1.png: not a readable image"):
        classify_files(Brightness(), str(folder / "sub0/1.png"), 1, None)


def test_a_sheet_shows_each_image(folder, tmp_path, monkeypatch):
    (folder / "sub0/1.png").write_bytes(b"nothing")
    drawn = []
    monkeypatch.setattr(room, "draw_sheet", lambda tiles, path: drawn.extend(tiles))
    with pytest.raises(UserError, match="1 of 4"):
        classify_files(Brightness(), str(folder), 1, None, str(tmp_path / "s.png"))
    assert [(Path(tile.file).name, tile.name) for tile in drawn] == [
        ("0.png", "bright"), ("1.png", None), ("2.png", "bright"), ("1.png", "dark")
    ]  # fmt: skip
    with pytest.raises(UserError, match="--sheet s.txt: must end in one of .png"):
        check_outputs(None, "s.txt")
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--sheet .*file is not a folder; give another file"):
        check_outputs(None, f"{tmp_path}/file/s.png")


def test_the_sheet_is_no_image_of_the_next_time(folder, tmp_path, capsys):
    sheet = str(folder / "sub0/sheet.png")
    for _ in range(2):
        classify_files(Brightness(), str(folder), 1, None, sheet)
        assert capsys.readouterr().out.count("0.7500") == 3  # the log may be printed, too
    with pytest.raises(UserError, match="--sheet, --attention: name the same file"):
        check_outputs(None, "a.png", "./a.png")


def test_keys_without_effect_on_an_onnx_file_are_refused(run_here):
    done = run_here("infer.py", "--model=m.onnx", "--input=a", "--runtime.seed=5")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--runtime.seed: has no effect on an ONNX file; leave it out" in done.stderr


def test_places_without_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        classify_files(Brightness(), str(tmp_path / "gone"), 1, None)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is a pipe or a device; give an image file"):
        classify_files(Brightness(), str(tmp_path / "pipe"), 1, None)
    (tmp_path / "note.txt").touch()
    with pytest.raises(UserError, match="no images in it"):
        classify_files(Brightness(), str(tmp_path), 1, None)


def test_several_files_and_folders(folder, tmp_path, capsys):
    """In the order of the command line; what is named twice counts once."""
    other = tmp_path / "z.png"
    Image.new("RGB", (4, 4), (0, 0, 0)).save(other)
    places = [str(other), str(folder / "sub0"), str(other)]
    classify_files(Brightness(), places, 1, None)
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == [str(other), str(folder / "sub0/0.png"), str(folder / "sub0/2.png")]
    with pytest.raises(UserError, match="--input .*gone: no such file"):
        classify_files(Brightness(), [*places, str(tmp_path / "gone")], 1, None)


class Hostile(Brightness):
    """Class names that a terminal would obey."""

    def stream(self, paths, top_k):
        for each in super().stream(paths, top_k):
            yield [each[0]._replace(name="\x1b]0;owned\x07\nok")]


def test_names_that_a_terminal_would_obey_are_escaped(tmp_path, capsys):
    file = tmp_path / "a\x1b[2J\n.png"
    Image.new("RGB", (4, 4)).save(file)
    classify_files(Hostile(), [str(file)], 1, str(tmp_path / "out.json"))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "\x1b" not in printed and "\x07" not in printed
    assert r"a\x1b[2J\n.png  \x1b]0;owned\x07\nok  0.7500" in printed
    written = json.loads((tmp_path / "out.json").read_text())[0]
    assert written["file"] == str(file) and written["top"][0]["name"] == "\x1b]0;owned\x07\nok"


def test_a_name_that_is_not_utf8(tmp_path, capsys):
    name = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.png")
    Image.new("RGB", (4, 4)).save(name)
    classify_files(Brightness(), [str(tmp_path)], 1, str(tmp_path / "out.json"))
    assert r"caf\xe9.png  dark" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [entry["file"] for entry in written] == [name]


def test_a_result_replaces_only_a_result(folder, tmp_path):
    image = str(folder / "sub0/0.png")
    labels, photo = tmp_path / "labels.json", tmp_path / "photo.png"
    labels.write_text('{"0": "cat"}')
    Image.new("RGB", (4, 4)).save(photo)
    for outputs in ((str(labels), None), (None, str(photo)), ("gone.json/x", None)):
        if outputs[0] == "gone.json/x":
            (tmp_path / "gone.json").touch()
            outputs = (str(tmp_path / "gone.json/x"), None)
        with pytest.raises(UserError, match="--(json|sheet) .*(--force|is not a folder)"):
            check_outputs(*outputs)
    assert labels.read_text() == '{"0": "cat"}'
    results, sheet = tmp_path / "deep/er/r.json", tmp_path / "deep/s.png"
    for _ in range(2):
        check_outputs(str(results), str(sheet))
        classify_files(Brightness(), image, 1, str(results), str(sheet))
    check_outputs(str(labels), None, force=True)
    classify_files(Brightness(), image, 1, str(labels))
    assert json.loads(labels.read_text()) == json.loads(results.read_text())


def test_an_image_that_gives_no_attention_is_in_the_json(run_here, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    words = ("--input=bad.jpg", "--attention=a.png", "--json=a.json")
    done = run_here("infer.py", "--model", str(ROOT / "pretrained/cvt_nano_cifar10"), *words)
    assert done.returncode == 2 and "bad.jpg: not a readable image" in done.stderr
    assert "not a readable image" in json.loads((tmp_path / "a.json").read_text())[0]["error"]
    assert not (tmp_path / "a.png").exists()
