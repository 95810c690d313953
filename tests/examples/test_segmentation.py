"""The segmentation example: a head on the feature maps learns."""

import re

from tests.conftest import run_command


def test_help_trains_nothing(run_here):
    done = run_here("examples/segmentation.py", "--help")
    assert done.returncode == 0 and "segmentation head" in done.stdout
    assert run_here("examples/segmentation.py", "--steps=3").returncode == 2


def test_the_loss_falls(tmp_path, monkeypatch):
    monkeypatch.setenv("MS_DEV_LAUNCH_BLOCKING", "1")  # else the threads of PyNative spin
    done = run_command("examples/segmentation.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups()
    assert float(last) < 0.6 * float(first)
