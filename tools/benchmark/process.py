"""A measured process, seen from the one that tells it what to do."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.errors import UserError
from tools.benchmark.workload import Plan

ROOT = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Side:
    """A process that is started once and then told to run rounds; a context, which ends it.

    Args:
        plan: what it runs and is told. Faults of our own code keep their traceback.
        cores: those that it may run on.

    Raises:
        UserError: a command that does not start.
    """

    def __init__(self, plan: Plan, cores: Sequence[int]) -> None:
        self.name = plan.name
        self.is_peer = plan.remedy is not None
        self._plan = plan
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        # An empty entry would mean the current folder.
        path = filter(None, [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        threads = dict.fromkeys(THREAD_VARIABLES, str(len(cores)))
        try:
            with _on_cores(cores):
                self._process = subprocess.Popen(
                    plan.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path)},
                    text=True,
                )
        except OSError as error:
            raise UserError(
                f"{plan.name}: {plan.command[0]}: {error.strerror}; {plan.remedy}"
            ) from None

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._log.close()

    def start(self) -> dict[str, Any]:
        """Prepare and warm up; returns the answer of `tools.benchmark.protocol`."""
        return self._ask({"do": "start", "job": self._plan.job})

    def round(self, seconds: float) -> dict[str, Any]:
        """Run for about so many seconds; returns the answer of `tools.benchmark.protocol`."""
        return self._ask({"do": "round", "seconds": seconds})

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Raises UserError, or RuntimeError where our own code has failed."""
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        try:
            reply = json.loads(line)
        except ValueError:
            reply = {"error": self._last_words(line), "traceback": self._logged()}
        if "error" not in reply:
            return reply
        error = " ".join(reply["error"].split())
        if self.is_peer:
            raise UserError(f"--peer {self.name}: {error}; {self._plan.remedy}")
        if reply["traceback"] is None:
            raise UserError(error)
        raise RuntimeError(f"{self.name} failed:\n{reply['traceback']}")

    def _last_words(self, line: str) -> str:
        if line:
            return f"said {line.strip()!r} and not what it was asked"
        code = self._process.wait()
        lines = [text for text in self._logged().splitlines() if text.strip()]
        return lines[-1] if lines else f"ended with code {code}"

    def _logged(self) -> str:
        self._log.seek(0)
        return self._log.read()


def usable_cores(threads: int | None) -> list[int]:
    """The cores that every side runs on: the first `threads` of those at hand, or all of them.

    Raises:
        UserError: more than there are.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    else:
        cores = list(range(os.cpu_count() or 1))
    if threads is not None and threads > len(cores):
        raise UserError(f"--threads {threads}: there are {len(cores)} cores; give no more")
    return cores[:threads]


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Start what is started inside on these cores only: all its threads inherit it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
