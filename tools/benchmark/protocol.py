"""The measured process's end of the benchmark protocol.

It reads JSON from stdin and answers each line with one line of JSON on stdout:

    {"mode": ...}   ->  {"what", "prepare_seconds", "first_call_seconds", "peak_memory", ...}
    {"seconds": 3}  ->  {"images", "seconds", "cpu_seconds", "idle_cpu_seconds", "peak_memory"}

The first line is the job (`tools.benchmark.workload.make_job`), each further line asks for a round.
A peer is a script that ends in `serve(make)`. It runs in another interpreter, so this module uses
the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from src.errors import UserError


@dataclass
class Work:
    """What a process measures.

    Args:
        step: runs one step and returns its number of images.
        what: the software and its version, for the table.
        facts: further entries of the first answer, such as `parameters`, which must equal ours.
    """

    step: Callable[[], int]
    what: str
    facts: dict[str, Any] = field(default_factory=dict)


def serve(make: Callable[[dict], Work]) -> None:
    """Answer the requests on stdin until its end; what libraries print goes to stderr.

    Args:
        make: prepares everything before the first step of a job.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        for reply in _answer(make):
            replies.write(json.dumps(reply) + "\n")
    except UserError as error:
        replies.write(json.dumps({"error": str(error), "traceback": None}) + "\n")
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        replies.write(json.dumps({"error": text, "traceback": traceback.format_exc()}) + "\n")


def _answer(make: Callable[[dict], Work]) -> Iterator[dict]:
    job = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    work = make(job)
    prepared = time.perf_counter()
    work.step()  # compiles
    first = time.perf_counter()
    if not job.get("once"):
        work.step()
    step_seconds = time.perf_counter() - first
    idle_since = cpu_seconds()
    yield {
        "what": work.what,
        "prepare_seconds": prepared - start,
        "first_call_seconds": first - prepared,
        "peak_memory": peak_memory(),
        **work.facts,
    }
    for line in sys.stdin:
        cpu = cpu_seconds()
        idle = cpu - idle_since
        steps = max(1, round(json.loads(line)["seconds"] / step_seconds))
        start = time.perf_counter()
        images = sum(work.step() for _ in range(steps))
        seconds = time.perf_counter() - start
        step_seconds = seconds / steps
        idle_since = cpu_seconds()
        yield {
            "images": images,
            "seconds": seconds,
            "cpu_seconds": idle_since - cpu,
            "idle_cpu_seconds": idle,
            "peak_memory": peak_memory(),
        }


def cpu_seconds() -> float:
    """Return the CPU time of this process, its threads and its finished children."""
    return sum(os.times()[:4])


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes.

    On Linux, getrusage's value survives exec and includes the parent's; VmHWM is the process's own.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
