"""Joins a distributed job and exchanges values among its ranks.

Values are sent as 16-bit pieces in float32, the one type that every backend (HCCL, NCCL, MCCL)
sends and adds, so values of any type arrive exactly.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, communication, ops

from src.errors import UserError
from src.training.stop_signal import SIGNALS

logger = logging.getLogger("cvt")
SCHEDULER_SECONDS = 60  # after which communication.init waits and reports
SAME_FILES = "give every host the same files and the same command"


@dataclass(frozen=True)
class Ranks:
    """A rank and the number of ranks; a single process is rank 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Gather float64 [n] of each rank as float64 [world, n] on every rank."""
        values = np.asarray(values, np.float64).reshape(-1)
        if self.world == 1:
            return values[None]
        pieces = np.zeros((self.world, values.size * 4), np.float32)
        pieces[self.rank] = _to_pieces(values)
        return _from_pieces(ops.AllReduce()(Tensor(pieces)).asnumpy(), np.float64)

    def broadcast_text(self, text: str) -> str:
        """Return rank 0's text on every rank."""
        return self.gather_texts(text if self.is_first else "")[0]

    def gather_texts(self, text: str) -> list[str]:
        """Gather each rank's text on every rank."""
        content = np.frombuffer(text.encode(), np.uint8)
        lengths = self.gather([len(content)])[:, 0].astype(int)
        padded = np.zeros(max(-(-lengths.max() // 8), 1) * 8, np.uint8)
        padded[: len(content)] = content
        gathered = self.gather(padded.view(np.float64))
        return [each.tobytes()[:length].decode() for each, length in zip(gathered, lengths)]

    def broadcast_indices(self, numbers: Iterable[int], count: int) -> list[int]:
        """Return rank 0's numbers below `count`, sorted; one bit per number is sent."""
        bits = np.zeros(-(-count // 64) * 64, bool)
        bits[list(numbers) if self.is_first else []] = True
        first = self.gather(np.packbits(bits).view(np.float64))[0]
        return np.flatnonzero(np.unpackbits(first.copy().view(np.uint8))).tolist()

    def broadcast(self, parameters: Iterable[Parameter]) -> None:
        """Set the parameters of every rank to rank 0's values."""
        if self.world == 1:
            return
        for parameter in parameters:
            mine = parameter.asnumpy()
            (pieces,) = ops.Broadcast(0)((Tensor(_to_pieces(mine)),))
            values = _from_pieces(pieces.asnumpy(), mine.dtype)[: mine.size].reshape(mine.shape)
            ops.assign(parameter, Tensor(values))

    def announce_end(self, code: int) -> None:
        """Wait until all ranks have done their work, and log the exit code for the launcher.

        MindSpore 2.8 leaves the cluster when a process exits, which ends in SIGSEGV now and then (a
        thread of its TCP client uses a connection that has been freed). This line tells the
        launcher that nothing is lost by it.
        """
        if self.world > 1:
            self.gather(np.zeros(1))
            logger.info("rank %d ends with exit code %d", self.rank, code)

    def require_agreement(self, what: str, value: object, remedy: str = SAME_FILES) -> None:
        """Check that every rank has the same value, by the checksum of its repr.

        Raises:
            UserError: a rank has a different value.
        """
        sums = self.gather(np.array([zlib.crc32(repr(value).encode())]))[:, 0]
        others = np.flatnonzero(sums != sums[0])
        if len(others):
            raise UserError(f"rank {others[0]} has other {what} than rank 0; {remedy}")


SINGLE_PROCESS = Ranks()


def _to_pieces(values: np.ndarray) -> np.ndarray:
    """Return the bytes of an array as float32 [n], two bytes in each number."""
    content = values.tobytes()
    return np.frombuffer(content + b"\0" * (len(content) % 2), np.uint16).astype(np.float32)


def _from_pieces(pieces: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Invert `_to_pieces` row by row; the padding may be included."""
    return np.ascontiguousarray(pieces.astype(np.uint16)).view(dtype)


# Variables that msrun sets for each rank, and those in which other launchers give the world size.
_OF_MSRUN = ("MS_WORKER_NUM", "MS_ROLE", "MS_SCHED_HOST", "MS_SCHED_PORT")
_OF_OTHERS = {
    "RANK_SIZE": "a rank table",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
    "WORLD_SIZE": "torchrun",
}


def is_distributed() -> bool:
    """Return whether msrun started this process as one of several.

    Raises:
        UserError: the environment describes several ranks, but msrun did not start them.
    """
    missing = [name for name in _OF_MSRUN if name not in os.environ]
    if not missing:
        return True
    left = [name for name in _OF_MSRUN if name in os.environ]
    left += [name for name in _OF_OTHERS if os.environ.get(name, "1") not in ("", "0", "1")]
    if left:
        name = left[0]
        by = _OF_OTHERS.get(name, "msrun")
        raise UserError(
            f"{name}={os.environ[name]} is set, as by {by}, but msrun did not start the ranks; "
            "train with scripts/run_distribute_train.sh, evaluate with msrun, or for a single "
            f"process run: unset {name}"
        )
    return False


def join() -> Ranks:
    """Join the job that this process belongs to; wait for the other ranks.

    In msrun's scheduler process this call returns when the job has ended.
    """
    if not is_distributed():
        return SINGLE_PROCESS
    is_rank = os.environ["MS_ROLE"] == "MS_WORKER"
    if is_rank:
        _wait_for_scheduler(os.environ["MS_SCHED_HOST"], int(os.environ["MS_SCHED_PORT"]))
    # `init` may wait for minutes, in which Python runs no handlers. In the scheduler it lasts as
    # long as the job: after a stop signal, the ranks need the scheduler while they save.
    action = signal.SIG_DFL if is_rank else signal.SIG_IGN
    handlers = {n: signal.signal(n, action) for n in SIGNALS}
    communication.init()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _exit_at_once_after_errors()
    return Ranks(communication.get_rank(), communication.get_group_size())


def _exit_at_once_after_errors() -> None:
    """Leave out MindSpore's cleanup after an unexpected error, such as the loss of another rank.

    It tries to leave the cluster and may wait for minutes for a rank that has gone (MindSpore 2.8).
    Nothing is lost: states and logs are written when they are saved.
    """
    show = sys.excepthook

    def hook(*error: Any) -> None:
        show(*error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = hook


def _wait_for_scheduler(host: str, port: int) -> None:
    """Wait until msrun's scheduler accepts connections, for `SCHEDULER_SECONDS` at most.

    A rank that calls `communication.init` earlier needs many of MindSpore's short tries to connect
    afterwards: 8 to 28 seconds, measured with two ranks on a CPU.
    """
    end = time.monotonic() + SCHEDULER_SECONDS
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
