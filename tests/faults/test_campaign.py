"""A short form of the fault campaign; docs/reliability.md has the long one's figures."""

import subprocess
import sys

from tests.conftest import ROOT

# What compiles fastest: test_state.py and check_device resume a CvT within an epoch.
SIZES = [
    "--model.name=resnet_nano_s2", "--model.depths=[2]", "--data.train_images=1000",
    "--training.epochs=3",
]  # fmt: skip


def test_a_short_campaign_loses_nothing(tmp_path):
    """A kill, a SIGTERM, forty flipped bits and ten truncations.

    This seed sends both signals soon after the first state of a run, within its first epoch.
    """
    counts = {"kills": 1, "stops": 1, "rank_kills": 0, "flips": 40, "truncations": 10}
    options = [*(f"--{kind}={count}" for kind, count in counts.items()), *SIZES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.campaign", str(tmp_path), "--seed=141", *options],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("kills | 1 of 1", "stops | 1 of 1", "flips | 40 of 40", "truncations | 10 of 10"):
        assert row in done.stdout
