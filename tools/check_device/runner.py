"""Starts the processes that run the checks, watches them, and collects their findings."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from tools.check_device.registry import Check, Finding, Setting

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180  # limit for a process to import everything
LOG_LINES = 30  # of a failed process, for the report
# Set by the user, another launcher or an earlier job for a job of several processes or hosts. The
# checks start their own on this host.
CLUSTER_VARIABLES = re.compile(
    r"NODE_(NUM|RANK)|MASTER_(ADDR|PORT)|RANK_(ID|SIZE|TABLE_FILE)|(LOCAL_)?WORLD_SIZE|"
    r"MS_(ROLE|NODE_ID|WORKER_NUM|SCHED_(HOST|PORT))|(OMPI|PMIX?)_\w+|SLURM_STEP_NUM_TASKS"
)
PASSED, FAILED, NOT_HERE = "ok", "FAILED", "not here"


@dataclass
class Result:
    """The outcome of a check for the table and the report.

    Args:
        check: the check.
        status: PASSED, FAILED or NOT_HERE.
        finding: what was measured; for NOT_HERE, `measured` is the reason.
        seconds: its duration.
        log: last lines of the process's output if it failed.
    """

    check: Check
    status: str
    finding: Finding
    seconds: float
    log: str = ""


def run_checks(
    checks: Sequence[Check], setting: Setting, show: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Run checks in order; a failure, crash or time-out of one does not stop the others.

    Args:
        checks: checks of one process must be adjacent.
        setting: passed to each check.
        show: called with each result when it arrives.
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
    """Yield at least one result of a new process; fewer than checks if it ends early."""
    log = Path(setting.folder) / "worker.log"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = {
        "names": [check.name for check in checks],
        "setting": dataclasses.asdict(setting),
        "connection": sender.fileno(),
    }
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {k: v for k, v in os.environ.items() if not CLUSTER_VARIABLES.fullmatch(k)}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with open(log, "wb") as output, receiver:
        process = subprocess.Popen(
            [*setting.worker, "checks", json.dumps(arguments)],
            cwd=setting.folder, env=environment, pass_fds=[sender.fileno()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        sender.close()
        try:
            yield from _receive_results(checks, process, receiver, log)
        finally:
            kill_tree(process.pid)
            process.wait()


def _receive_results(
    checks: Sequence[Check], process: subprocess.Popen, receiver: Connection, log: Path
) -> Iterator[Result]:
    limit = START_SECONDS
    waiting = list(checks)
    while True:
        start = time.monotonic()
        try:
            if not receiver.poll(limit):
                yield _failure(waiting[0], f"no result within {limit:.0f} s", limit, log)
                return
            message = json.loads(receiver.recv_bytes())
        except EOFError:
            code = process.wait()
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            yield _failure(waiting[0], f"ended early {how}", time.monotonic() - start, log)
            return
        if message:  # the first one is empty: the process is ready
            yield _result(waiting.pop(0), message, log)
            if message.get("broken") or not waiting:
                return
        limit = waiting[0].seconds


def _result(check: Check, message: dict[str, Any], log: Path) -> Result:
    if "not_here" in message:
        return Result(check, NOT_HERE, Finding(message["not_here"]), message["seconds"])
    finding = Finding(**message["finding"])
    if finding.passed:
        return Result(check, PASSED, finding, message["seconds"])
    return Result(check, FAILED, finding, message["seconds"], _last_lines(log))


def _failure(check: Check, words: str, seconds: float, log: Path) -> Result:
    lines = _last_lines(log)
    last = lines.strip().split("\n")[-1]
    finding = Finding(words, passed=False, hint=f"last output: {last.strip()}" if last else "")
    return Result(check, FAILED, finding, seconds, lines)


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:])


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
