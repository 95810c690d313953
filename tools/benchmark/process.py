"""Starts measured processes and sends them requests."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.cores import usable_cores
from src.errors import UserError
from tools.benchmark.workload import Plan

ROOT = Path(__file__).resolve().parents[2]


class BenchmarkProcess:
    """A measured process (`tools.benchmark.protocol`); a context manager that kills it at the end.

    Only its cores are set, not OMP_NUM_THREADS and the like: it runs as in a user's shell.

    Args:
        plan: its command and job.
        cores: the cores that it may use.

    Raises:
        UserError: the command does not start.
    """

    def __init__(self, plan: Plan, cores: Sequence[int]) -> None:
        self.name = plan.name
        self.is_peer = plan.remedy is not None
        self._plan = plan
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in __exit__
        # An empty entry would mean the current folder.
        path = filter(None, [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        try:
            with _on_cores(cores):
                self._process = subprocess.Popen(
                    plan.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                    text=True,
                )
        except OSError as error:
            self._log.close()
            advice = f"; {plan.remedy}" if plan.remedy else ""
            raise UserError(f"{plan.name}: {plan.command[0]}: {error.strerror}{advice}") from None

    def __enter__(self) -> BenchmarkProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def start(self) -> dict[str, Any]:
        """Prepare and warm up; returns the protocol's first answer."""
        return self._request(self._plan.job)

    def run_round(self, seconds: float) -> dict[str, Any]:
        """Run for about so many seconds; returns the protocol's answer."""
        return self._request({"seconds": seconds})

    def _request(self, content: dict[str, Any]) -> dict[str, Any]:
        """Raise UserError for a peer, and RuntimeError with the traceback for a bug of ours."""
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        try:
            reply = json.loads(line)
        except ValueError:
            reply = self._describe_failure(line)
        if "error" not in reply:
            return reply
        error = " ".join(reply["error"].split())
        if self.is_peer:
            raise UserError(f"--peer {self.name}: {error}; {self._plan.remedy}")
        if reply["traceback"] is None:
            raise UserError(error)
        raise RuntimeError(f"{self.name} failed:\n{reply['traceback']}")

    def _describe_failure(self, line: str) -> dict[str, str]:
        code = None if line else self._process.wait()
        self._log.seek(0)
        log = self._log.read()
        error = f"answered {line.strip()!r} instead of JSON"
        if not line:
            error = (log.strip().splitlines() or [f"exited with code {code}"])[-1]
        return {"error": error, "traceback": log}


def select_cores(threads: int | None) -> list[int]:
    """Return the cores that every process runs on: the first `threads` available ones, or all.

    Raises:
        UserError: there are fewer.
    """
    cores = usable_cores()
    if threads is not None and threads > len(cores):
        raise UserError(f"--threads {threads}: there are {len(cores)} cores; give no more")
    return cores[:threads]


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Bind processes that are started inside to these cores; all their threads inherit it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
