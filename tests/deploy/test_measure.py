"""What measures docs/deploy.md: its verdict, its photographs, and that it goes on where it was."""

import json
import sys

import pytest
from PIL import Image

from tests.deploy import measure
from tests.deploy.operators import profile_table
from tests.deploy.photographs import KINDS, make_photographs

GOOD = {
    "formats": {
        "fused": [1e-6, 2e-5],
        "mindir_fused": 1e-6,
        "mindir_checkpoint": 9e-6,
        "onnx_checkpoint": 9e-5,
        "compiled": 1e-6,
    },
    "photos": {"images": 5, "of_range": 1e-3, "agreeing": {".mindir": 5, ".ckpt": 5}},
    "digits": {"eval": 900, "correct": {".mindir": 900, ".ckpt": 900}},
    "folder": {"code": 0, "early_mb": 500, "late_mb": 510},
    "speed": {"ratio": 1.1, "logits": 1e-6},
}
BAD = {
    "formats": [
        {"fused": [1e-6, 2e-4]},
        {"mindir_checkpoint": 1.1e-5},
        {"onnx_checkpoint": 2e-4},
        {"compiled": 2e-4},
        {"fused": [1e-6, float("nan")]},
    ],
    "photos": [{"of_range": 4e-3}, {"agreeing": {".mindir": 5, ".ckpt": 4}}],
    "digits": [{"correct": {".mindir": 900, ".ckpt": 899}}],
    "folder": [{"code": 2}, {"code": -9}, {"late_mb": 540}],
    "speed": [{"logits": 1e-3}],
}


def result(part, **more):
    return {"part": part, "name": "cvt_13", **GOOD[part], **more}


def test_every_limit_counts():
    assert set(GOOD) == set(BAD) == set(measure.PARTS)
    assert measure.broken([result(part) for part in GOOD]) == []
    for part, faults in BAD.items():
        for fault in faults:
            assert measure.broken([result(part, **fault)]) == [f"{part} cvt_13"], fault


def test_the_profile_is_in_order_and_whole():
    rows = profile_table({"Add": 2, "MatMul": 1200}, {"MatMul": 1000, "SiLU": 7})
    assert rows[0] == "| | MatMul | Add | SiLU | sum |"
    assert rows[2:] == ["| unfused | 1,200 | 2 | 0 | 1,202 |", "| fused | 1,000 | 0 | 7 | 1,007 |"]


def test_photographs_are_of_every_kind(tmp_path):
    """And equal at each call, of noise and of given images."""
    originals = tmp_path / "originals"
    originals.mkdir()
    Image.new("RGB", (30, 20), "red").save(originals / "a.jpg")
    for photos in (None, originals):
        folders = [tmp_path / f"{photos is None}{k}" for k in range(2)]
        for folder in folders:
            make_photographs(folder, len(KINDS), photos)
        first, second = (sorted(folder.iterdir()) for folder in folders)
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
        kinds = [(path.suffix, Image.open(path).mode) for path in first]
        assert kinds == KINDS
        widths = [Image.open(path).width for path in first]
        assert min(widths) >= 40 and max(widths) <= 2400 and max(widths) > 4 * min(widths)


def test_it_goes_on_behind_what_is_there(tmp_path, monkeypatch, capsys):
    """All networks are measured already, so only the table and the verdict are left."""
    done = [{**result("formats"), "name": name} for name in measure.SIZES]
    done[1]["onnx_checkpoint"] = 2e-4
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in done))
    monkeypatch.setattr(sys, "argv", ["measure", str(tmp_path), "--only", "formats"])
    with pytest.raises(SystemExit, match="does not hold: formats cvt_13"):
        measure.main()
    row = "| `cvt_21`, 224 and 160x192 px | 2.0e-05 | 1.0e-06 | 9.0e-06 | 9.0e-05 | 1.0e-06 |"
    assert row in capsys.readouterr().out.splitlines()
    assert len(file.read_text().splitlines()) == len(done)
