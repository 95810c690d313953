"""The counting modes of tools.benchmark, as a user calls it."""

import json
import sys

import pytest

from tests.conftest import ROOT, run_command
from tools.benchmark.__main__ import main


def call(monkeypatch, *words):
    """Run the executable in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["tools.benchmark", "--mode", "complexity", *words])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_complexity_from_the_command_line(tmp_path):
    done = run_command(
        "tools.benchmark",
        "--mode=complexity",
        "--model.name=cvt_21",
        "--model.image_size=[224,384]",
        "--json=figures.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [figures["model"], figures["image_size"]] == ["cvt_21", [224, 384]]
    assert figures["num_classes"] == 1000
    assert [stage["name"] for stage in figures["stages"]] == ["stage0", "stage1", "stage2", "head"]
    assert [stage.get("grid") for stage in figures["stages"]] == [
        [56, 96], [28, 48], [14, 24], None,
    ]  # fmt: skip
    total = figures["total"]
    assert total["parameters"] == 31_622_696
    kinds = ("convolution_macs", "linear_macs", "attention_macs")
    assert total["total_macs"] == sum(total[kind] for kind in kinds)
    title, _, *rows = done.stdout.splitlines()
    assert title == "cvt_21, image 224 x 384, 1000 classes"
    assert [row.split()[0] for row in rows] == ["stage0", "stage1", "stage2", "head", "total"]
    assert "31,622,696" in rows[-1]
    assert f"{total['total_macs'] / 1e9:.3f}" in rows[-1]


def test_scaling_from_the_command_line(run_here, tmp_path):
    done = run_here(
        "tools.benchmark",
        "--mode=scaling",
        "--model.name=cvt_13",
        "--model.image_size=224",
        "--training.batch_size=128",
        "--training.ema_decay=0.9",
        "--runtime.precision=float16",
        "--runtime.flash_attention=true",
        "--json=figures.json",
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    held, times = figures["bytes"], figures["all_reduce_seconds"]
    assert held["gradients"] == 4 * 19_997_480
    assert held["moments"] == 2 * held["gradients"]
    assert held["average"] == held["parameters"] > held["gradients"]
    assert held["total"] == sum(n for name, n in held.items() if name != "total")
    assert times["8"] == pytest.approx(2 * 7 / 8 * held["gradients"] / 30e9)
    assert list(times) == ["8", "16", "32", "64", "128", "256", "512", "1024"]
    title, *rows = done.stdout.splitlines()
    assert title == "cvt_13, image 224 x 224, 128 images per card, float16, adamw"
    assert f"{held['total'] / 1e9:.3f} GB" in next(row for row in rows if row.startswith("total"))


def test_a_recipe_and_options_reach_the_network(monkeypatch, capsys):
    recipe = f"--config={ROOT / 'config/digits/cvt_nano.yaml'}"
    assert call(monkeypatch, recipe, "--model.depths=[1,1,1]", "--model.num_classes=7") == 0
    title, *_, head, _ = capsys.readouterr().out.splitlines()
    assert title == "cvt_nano, image 32 x 32, 7 classes"
    assert head.split()[1] == f"{2 * 128 + 7 * 128 + 7:,}"


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--mode=complexities"], "complexity"),
        (["--model.name=cvt_133"], "did you mean cvt_13?"),
        (["--model.image_size=8"], "16 pixels or more"),
        (["--model.width=64"], "unknown key model.width"),
        (["--json=."], "--json .: is a folder"),
        (["--batch_size=2"], "mode complexity; give --training.batch_size"),
        (["--rounds=2"], "--rounds: has no effect in mode complexity; leave it out"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_users_error_is_one_line(monkeypatch, capsys, tmp_path, words, complaint):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.benchmark: error: ")
    assert complaint in line


def test_a_baseline_and_a_key_that_it_does_not_have(monkeypatch, capsys):
    assert call(monkeypatch, "--model.name=resnet_50") == 0
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "resnet_50, image 224 x 224, 1000 classes"
    assert rows[-1].split() == ["total", "25,557,032", "4.087", "0.002", "0.000", "4.089"]
    assert call(monkeypatch, "--model.name=resnet_50", "--model.kv_stride=1") == 2
    assert "resnet_50 has no kv_stride" in capsys.readouterr().err
