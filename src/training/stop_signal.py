"""Stops a run after a step when SIGTERM, SIGINT or SIGHUP arrives."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the launcher imports this file; importing MindSpore takes seconds
    from src.distributed import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not nohup
    SIGNALS += (signal.SIGHUP,)  # the terminal or its ssh connection was closed
EXCHANGE_SECONDS = 2.0  # between two exchanges among the ranks
# A cluster's scheduler signals each process of a job, and the launcher forwards its own signal.
SAME_REQUEST_SECONDS = 2.0


class StopSignal:
    """Record a stop signal; a second one ends the process at once.

    Signals within `SAME_REQUEST_SECONDS` count as one, and another rank's does not count.

    A context manager that replaces the process's own handlers. It starts with the default
    handlers: while MindSpore compiles, which can take a minute, Python runs no handlers, and there
    is nothing to save yet. All ranks must stop at the same step, so they exchange the signal about
    every two seconds.

    Args:
        ranks: the ranks that share every step.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.signal = 0  # received by any rank
        self._received = math.inf  # when this process received its first
        self._steps, self._next, self._last_exchange = 0, 1, time.perf_counter()

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.use_default_handlers()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def use_default_handlers(self) -> None:
        """Let a signal end the process at once, while there is nothing to save."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def defer_signals(self) -> None:
        """Record a signal and let the loop stop after the current step."""
        for number in SIGNALS:
            signal.signal(number, self._record)

    def _record(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if now - self._received > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
        self._received = min(self._received, now)
        self.signal = self.signal or number

    def should_stop(self) -> bool:
        """Return whether to stop after this step; every rank must call it after every step."""
        if self.ranks.world == 1:
            return bool(self.signal)
        self._steps += 1
        if self._steps < self._next:
            return False
        now = time.perf_counter()
        seconds_per_step = max(now - self._last_exchange, 1e-6) / max(self._steps, 1)
        self._steps, self._last_exchange = 0, now
        stop, self._next = self._exchange(max(round(EXCHANGE_SECONDS / seconds_per_step), 1))
        return stop

    def any_rank_stopped(self) -> bool:
        """Return whether any rank received a signal; every rank must call it."""
        return self._exchange(1)[0]

    def _exchange(self, next_exchange: int) -> tuple[bool, int]:
        """Exchange signals; also agree on rank 0's number of steps until the next exchange."""
        answers = self.ranks.gather([self.signal, next_exchange])
        # A signal that arrives during the exchange waits for the next: the others do not know it.
        stop = int(answers[:, 0].max())
        if stop:
            self.signal = stop
        return bool(stop), int(answers[0, 1])
