"""A grid of four cells of a tiny network, and a train.py that pretends."""

from __future__ import annotations

import runpy
import sys
import textwrap

import pytest

from src.config import Study
from tests.conftest import ROOT
from tools.study import train_process
from tools.study.cells import expand_study
from tools.study.train_process import TrainProcess

RUN = TrainProcess.run

PRETENDER = '''
"""Behaves as train.py does, without training: two epochs, of top-1 10 and 20 + seed."""
import json, os, pathlib, signal, sys, time
sys.path.insert(0, {root!r})
from src.cli import parse
from src.config_io import save_config

add = lambda p: (p.add_argument("--output"), p.add_argument("--resume", action="store_true"))
config, arguments = parse(sys.argv[1:], "train.py", "", add)
folder, here = pathlib.Path(arguments.output), pathlib.Path(__file__).parent
with open(here / "calls.txt", "a") as calls:
    calls.write(folder.name + " --resume" * arguments.resume + chr(10))
(here / "session.txt").write_text(str(os.getsid(0)))
if (here / "fail.txt").exists() and (here / "fail.txt").read_text() == folder.name:
    sys.exit("it fails")

def finish(epochs):
    steps = config.training.epoch_steps
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints/step-00000001.ckpt").touch()
    save_config(config, folder / "config.yaml")
    rows = [
        dict(epoch=e + 1, step=(e + 1) * steps, lr=1e-3, train_loss=2.0, loss=2.5,
             top1=[10.0, 20.0 + config.runtime.seed][e], top5=50.0, images_per_second=64.0,
             seconds=[8.0, 5.0][e] + steps)
        for e in range(epochs)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))

if (here / "slow.txt").exists() and (here / "slow.txt").read_text() == folder.name:
    def stop(number, frame):
        finish(1)
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    (here / "slow.txt").write_text("it waits")
    time.sleep(60)
finish(2)
'''


@pytest.fixture
def study_file(tmp_path):
    """Where a study of the digits could have been read from."""
    return tmp_path / "study.yaml"


@pytest.fixture
def study():
    """Two variants, two seeds, two evaluations."""
    return Study(
        recipe=str(ROOT / "config/digits/cvt_nano.yaml"),
        models={"conv": {}, "linear": {"model": {"qkv_projection": "linear"}}},
        train_images=[40],
        seeds=[0, 1],
        steps=6,
        evaluate_every=3,
        settings={"model": {"embed_dims": [8, 16, 32], "depths": [1, 1, 1]}},
    )


@pytest.fixture
def cells(study, study_file):
    """Its cells."""
    return expand_study(study, study_file)


@pytest.fixture
def pretender(tmp_path, monkeypatch):
    """The folder of a script in train.py's place; calls.txt there tells what it was asked for.

    It runs in this process, which takes less time, unless a test asks for `started`.
    """

    def run(self, arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        runpy.run_path(str(script))
        return 0

    folder = tmp_path / "pretender"
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(textwrap.dedent(PRETENDER).replace("{root!r}", repr(str(ROOT))))
    monkeypatch.setattr(train_process, "TRAIN", script)
    monkeypatch.setattr(TrainProcess, "run", run)
    return folder


@pytest.fixture
def started(pretender, monkeypatch):
    """The script runs in a process of its own, as train.py does."""
    monkeypatch.setattr(TrainProcess, "run", RUN)


def calls(pretender):
    """The cells that the pretender was asked for since the last look."""
    file = pretender / "calls.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    file.write_text("")
    return lines
