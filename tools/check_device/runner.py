"""Starts the processes that run the checks, watches them, and collects what they find."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tools.check_device.registry import Check, Finding, Setting

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180  # until a process has imported everything and begins its first check
LOG_LINES = 30  # of a process that failed, for the report
PASSED, FAILED, NOT_HERE = "ok", "FAILED", "not here"


@dataclass
class Result:
    """The outcome of a check as the table and the report show it.

    Args:
        check: which one.
        status: PASSED, FAILED or NOT_HERE.
        finding: what was measured; for NOT_HERE the reason stands in `measured`.
        seconds: that it took.
        log: last lines of the process's output, where it failed.
    """

    check: Check
    status: str
    finding: Finding
    seconds: float
    log: str = ""


def run_checks(
    checks: Sequence[Check], setting: Setting, show: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Run checks in their order; a failure, crash or time-out of one does not stop the others.

    Args:
        checks: those of one process must follow each other.
        setting: what they are told.
        show: is called with each result as it comes.
    """
    results = []
    for _, group in itertools.groupby(checks, key=lambda check: check.process):
        waiting = list(group)
        while waiting:
            for result in _run_process(waiting, setting):
                results.append(result)
                waiting.remove(result.check)
                show(result)
    return results


def _run_process(checks: Sequence[Check], setting: Setting) -> Iterator[Result]:
    """Results of a process, at least one; fewer than checks where it ends early."""
    log = Path(setting.folder) / "worker.log"
    reading, writing = os.pipe()
    order = {
        "names": [check.name for check in checks],
        "setting": dataclasses.asdict(setting),
        "events": writing,
    }
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with open(log, "wb") as output, os.fdopen(reading, "rb", buffering=0) as pipe:
        process = subprocess.Popen(
            [*setting.worker, "checks", json.dumps(order)],
            cwd=setting.folder, env=environment, pass_fds=[writing],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(writing)
        try:
            yield from _follow(checks, process, pipe, log)
        finally:
            end_tree(process.pid)
            process.wait()


def _follow(
    checks: Sequence[Check], process: subprocess.Popen, pipe: Any, log: Path
) -> Iterator[Result]:
    waiting, running = list(checks), False
    clock = _Clock(START_SECONDS)
    for event in _events(pipe, clock):
        if "start" in event:
            running = True
            clock.restart(waiting[0].seconds)
        elif "end" in event:
            check, running = waiting.pop(0), False
            clock.restart(START_SECONDS)
            yield _result(check, event, log)
            if event.get("broken") or not waiting:
                return
        else:
            yield _failure(waiting[0], f"no end within {clock.limit:.0f} s", clock.limit, log)
            return
    code = process.wait()
    words = "ended early" if running else "ended before it began"
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    yield _failure(waiting[0], f"{words} {how}", clock.limit - clock.left, log)


class _Clock:
    """The time that what runs now has left."""

    def __init__(self, limit: float) -> None:
        self.restart(limit)

    def restart(self, limit: float) -> None:
        """Give what begins now so many seconds."""
        self.limit, self.end = limit, time.monotonic() + limit

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()


def _events(pipe: Any, clock: _Clock) -> Iterator[dict[str, Any]]:
    """What the process tells; {} once its time is up."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(max(clock.left, 0)):
                yield {}
                return
            content = pipe.read(65536)
            if not content:
                return
            *lines, pending = (pending + content).split(b"\n")
            yield from map(json.loads, lines)


def _result(check: Check, event: dict[str, Any], log: Path) -> Result:
    if "not_here" in event:
        return Result(check, NOT_HERE, Finding(event["not_here"]), event["seconds"])
    finding = Finding(**event["finding"])
    if finding.passed:
        return Result(check, PASSED, finding, event["seconds"])
    return Result(check, FAILED, finding, event["seconds"], _last_lines(log))


def _failure(check: Check, words: str, seconds: float, log: Path) -> Result:
    lines = _last_lines(log)
    said = [line.strip() for line in lines.splitlines() if line.strip()]
    finding = Finding(words, passed=False, hint=f"last output: {said[-1]}" if said else "")
    return Result(check, FAILED, finding, seconds, lines)


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:])


def end_tree(pid: int) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
