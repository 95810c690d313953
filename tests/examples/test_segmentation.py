"""The segmentation example: a head on the feature maps learns."""

import re

from tests.conftest import run_command


def test_the_loss_falls(tmp_path, monkeypatch):
    monkeypatch.setenv("MS_DEV_LAUNCH_BLOCKING", "1")  # else the threads of PyNative spin
    done = run_command("examples/segmentation.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = re.search(r"loss ([\d.]+) -> ([\d.]+)", done.stdout).groups()
    assert float(last) < 0.6 * float(first)
