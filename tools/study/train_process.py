"""Runs train.py and forwards stop signals to it."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from src.training.stop_signal import SIGNALS

logger = logging.getLogger("cvt")
TRAIN = Path(__file__).resolve().parents[2] / "train.py"


class TrainProcess:
    """Runs train.py, one process at a time; a context manager that handles stop signals.

    Each process has its own session. Otherwise Ctrl-C in a terminal would reach it twice, and a
    second signal ends a run without saving.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> TrainProcess:
        self._handlers = {number: signal.signal(number, self._forward) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: object) -> None:
        self.signal = number
        if self._process is not None:
            self._process.terminate()

    def run(self, arguments: Sequence[str]) -> int:
        """Run train.py to its end and return its exit code.

        Raises:
            SystemExit: 128 + the signal received; the run has saved its state.
        """
        self._exit_if_stopped()
        command = [sys.executable, str(TRAIN), *arguments]
        self._process = subprocess.Popen(command, start_new_session=True)
        if self.signal:  # it arrived before there was a process to forward it to
            self._process.terminate()
        code = self._process.wait()
        self._process = None
        self._exit_if_stopped()
        return code

    def _exit_if_stopped(self) -> None:
        if self.signal:
            name = signal.Signals(self.signal).name
            logger.warning("stopped by %s; run the same command to continue", name)
            raise SystemExit(128 + self.signal)
