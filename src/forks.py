"""Notices forks of a process in which MindSpore has run; MindSpore hangs in them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from src.errors import UserError

KERNEL_THREADS = ("ActorThread", "KernelThread")  # names of MindSpore's computing threads
_parent: int | None = None  # the process that forked this one, or will, after MindSpore had run


def thread_names() -> dict[int, str]:
    """Return the names of this process's threads by their ids; empty where there is no /proc."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # the thread has ended
                found[int(task)] = Path(f"/proc/self/task/{task}/comm").read_text()
    return found


def _before_fork() -> None:
    global _parent
    if any(name.startswith(KERNEL_THREADS) for name in thread_names().values()):
        _parent = os.getpid()


os.register_at_fork(before=_before_fork)


def refuse_forks() -> None:
    """Refuse to run MindSpore in a process that was forked after MindSpore had run.

    Raises:
        UserError: this is such a process.
    """
    if _parent not in (None, os.getpid()):
        raise UserError(
            f"MindSpore ran in process {_parent} and hangs in a fork of it, process "
            f"{os.getpid()}: open no model before the fork (gunicorn: without --preload; "
            'multiprocessing: the start method "spawn")'
        )
