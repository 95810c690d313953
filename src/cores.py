"""The CPU cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_count() -> int:
    """Return how many cores this process can keep busy.

    A container with `--cpus 4` may run on every core of its host, but is paused once it has used
    four cores' time, so more threads would only wait for each other.
    """
    return max(1, math.ceil(min(len(usable_cores()), _quota(_CGROUPS))))


def _quota(root: Path) -> float:
    """Return the limit of a container's control group in cores; infinity if there is none."""
    for quota, period in (
        ("cpu.max", None),  # version 2: both in one file
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),  # version 1; -1 for none
    ):
        try:
            words = (root / quota).read_text().split()
            words += (root / period).read_text().split() if period else []
            share, of = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # no such file, or "max"
            continue
        if share > 0 and of > 0:
            return share / of
    return math.inf
