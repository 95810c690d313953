"""Ranks as threads of this process, for what they tell each other."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from src.distributed import Ranks


@dataclass
class _Meeting:
    barrier: threading.Barrier
    values: dict = field(default_factory=dict)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Collectives by a barrier; `waits` has the seconds that this rank spent in each."""

    meeting: _Meeting = None
    waits: list = field(default_factory=list)

    def gather(self, values):
        self.meeting.values[self.rank] = np.array(values, np.float64).reshape(-1)
        start = time.monotonic()
        self.meeting.barrier.wait(60)
        self.waits.append(time.monotonic() - start)
        told = np.stack([self.meeting.values[rank] for rank in range(self.world)])
        self.meeting.barrier.wait(60)
        return told


def together(world, task):
    """The results of task(ranks) on each of `world` ranks, in their order."""
    meeting = _Meeting(threading.Barrier(world))

    def run(rank):
        try:
            return task(ThreadRanks(rank, world, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))
