"""What a measured process says: a line of JSON for each line of JSON that it is told.

    {"do": "start", "job": {...}}  ->  {"what", "prepare_seconds", "first_call_seconds", ...}
    {"do": "round", "seconds": 3}  ->  {"images", "seconds", "cpu_seconds", "idle_cpu_seconds",
                                        "peak_memory"}
    {"do": "end"}

A peer is a script whose last line is `serve(make)`. It runs in another interpreter, so this module
needs nothing beyond the standard library. `tools.benchmark.workload` tells what is in a job.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from src.errors import UserError


@dataclass
class Work:
    """What a process was started for.

    Args:
        step: does one piece of it and returns how many images that was.
        what: the software and its version, for the report.
        facts: more for the answer to "start", as `parameters`, which must be those of ours.
    """

    step: Callable[[], int]
    what: str
    facts: dict[str, Any] = field(default_factory=dict)


def serve(make: Callable[[dict], Work]) -> None:
    """Answer on stdout what comes on stdin, until "end" or the end of the input.

    What libraries print goes to stderr.

    Args:
        make: prepares everything up to the first step; gets the job.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    server = _Server(make)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "end":
            return
        try:
            reply = server.start(order["job"]) if order["do"] == "start" else server.round(order)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            reply = {"error": text, "traceback": traceback.format_exc()}
            if isinstance(error, UserError):
                reply = {"error": str(error), "traceback": None}
        replies.write(json.dumps(reply) + "\n")


class _Server:
    def __init__(self, make: Callable[[dict], Work]) -> None:
        self._make = make
        self._idle_since = 0.0

    def start(self, job: dict) -> dict:
        """Prepare, and run the first step, which compiles, and a second one."""
        start = time.perf_counter()
        self._work = self._make(job)
        prepared = time.perf_counter()
        self._work.step()
        first = time.perf_counter()
        if not job.get("once"):
            self._work.step()
        self._step_seconds = time.perf_counter() - first
        self._idle_since = cpu_seconds()
        return {
            "what": self._work.what,
            "prepare_seconds": prepared - start,
            "first_call_seconds": first - prepared,
            "peak_memory": peak_memory(),
            **self._work.facts,
        }

    def round(self, order: dict) -> dict:
        """Run as many steps as fill the seconds, by the time of the last ones; at least one."""
        cpu = cpu_seconds()
        idle = cpu - self._idle_since
        steps = max(1, round(order["seconds"] / self._step_seconds))
        start = time.perf_counter()
        images = sum(self._work.step() for _ in range(steps))
        seconds = time.perf_counter() - start
        self._step_seconds = seconds / steps
        self._idle_since = cpu_seconds()
        return {
            "images": images,
            "seconds": seconds,
            "cpu_seconds": self._idle_since - cpu,
            "idle_cpu_seconds": idle,
            "peak_memory": peak_memory(),
        }


def cpu_seconds() -> float:
    """Of this process, all its threads, and its children that have ended."""
    times = os.times()
    return sum(times[:4])


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux hands getrusage's figure on through exec, so that a process never has less than the one
    that started it; VmHWM is its own.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
