"""Being asked to stop: SIGTERM and SIGINT end a run at a step, saved, with 128 + the signal."""

from __future__ import annotations

import os
import signal
import time

from src.distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ASK_SECONDS = 2.0  # between two exchanges of the ranks


class Interruption:
    """Notes a signal; the second one ends the process at once.

    Used as a context, in which it stands in for the process's own handlers. It begins by letting a
    signal end the process there and then: while MindSpore compiles, which can take a minute, no
    handler of Python's runs, and nothing could be lost yet. Among several ranks each must stop at
    the same step, so they tell each other, every so many steps that two seconds pass between.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.signal = 0
        self._steps, self._next, self._told = 0, 1, time.perf_counter()

    def __enter__(self) -> Interruption:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.end_at_once()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end_at_once(self) -> None:
        """From here on there is nothing to save: a signal ends the process, wherever it is."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def save_first(self) -> None:
        """From here on a signal is noted, to be asked for behind a step."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def after_step(self) -> bool:
        """Whether to stop here; every rank must call it behind every step."""
        if self.ranks.world == 1:
            return bool(self.signal)
        self._steps += 1
        if self._steps < self._next:
            return False
        now = time.perf_counter()
        pace = max(now - self._told, 1e-6) / max(self._steps, 1)
        self._steps, self._told = 0, now
        stop, self._next = self._exchange(max(round(ASK_SECONDS / pace), 1))
        return stop

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank must call it."""
        return self._exchange(1)[0]

    def _exchange(self, proposal: int) -> tuple[bool, int]:
        told = self.ranks.gather([self.signal, proposal])
        self.signal = self.signal or int(told[:, 0].max())
        return bool(self.signal), int(told[0, 1])
