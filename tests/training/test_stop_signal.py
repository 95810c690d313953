"""Which signals stop a run, which end it at once, and what the other ranks learn of them."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from src.training import stop_signal
from src.training.stop_signal import SAME_REQUEST_SECONDS, StopSignal
from tests.conftest import ROOT


class Ended(Exception):
    """In place of the end of the process."""


@pytest.fixture
def clock(monkeypatch):
    """A time in seconds that the test sets, and an exception where the process would end."""

    def end(code):
        raise Ended(code)

    clock = SimpleNamespace(now=100.0)
    watch = SimpleNamespace(monotonic=lambda: clock.now, perf_counter=time.perf_counter)
    monkeypatch.setattr(stop_signal, "time", watch)
    monkeypatch.setattr(stop_signal, "os", SimpleNamespace(_exit=end))
    return clock


def ranks(answers):
    """Ranks that answer an exchange."""
    return SimpleNamespace(world=2, gather=lambda own: np.array(answers(own), float))


def test_a_signal_that_arrives_twice_within_two_seconds_is_one_request(clock):
    """Slurm and systemd signal every process of a job, and the launcher forwards its own."""
    with StopSignal(SimpleNamespace(world=1)) as stop:
        stop.defer_signals()
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            clock.now += SAME_REQUEST_SECONDS / 2
        assert stop.should_stop() and stop.signal == signal.SIGHUP
        clock.now += 0.1
        with pytest.raises(Ended, match=str(128 + signal.SIGTERM)):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_signal_of_a_rank_that_is_already_stopping_does_not_end_it(clock):
    """Two hosts get their signals one after the other; this rank saves meanwhile."""
    with StopSignal(ranks(lambda own: [[signal.SIGTERM, 1], own])) as stop:
        stop.defer_signals()
        assert stop.should_stop() and stop.signal == signal.SIGTERM
        clock.now += 60
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM


def test_a_signal_during_an_exchange_stops_all_ranks_at_the_next():
    """The others have not learnt of it, and would wait for this rank in the next step."""

    def answer(own):
        os.kill(os.getpid(), signal.SIGINT)
        return [[0, 1], own]

    with StopSignal(ranks(answer)) as stop:
        stop.defer_signals()
        assert not stop.any_rank_stopped()
        assert stop.any_rank_stopped() and stop.signal == signal.SIGINT


def test_a_run_that_nohup_started_goes_on_when_its_terminal_closes():
    code = "import signal; from src.training.stop_signal import SIGNALS; print(len(SIGNALS))"
    for ignored, number in ((False, 3), (True, 2)):
        handler = signal.SIG_IGN if ignored else signal.SIG_DFL
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
            preexec_fn=lambda handler=handler: signal.signal(signal.SIGHUP, handler),
        )  # fmt: skip
        assert done.stdout == f"{number}\n", done.stderr
