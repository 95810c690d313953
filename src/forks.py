"""Notices forks of a process in which MindSpore has run; MindSpore hangs in them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from src.errors import UserError

KERNEL_THREADS = ("ActorThread", "KernelThread")  # names of MindSpore's computing threads
_used_in: int | None = None  # the process in which MindSpore has run: this one, or its parent


def thread_names() -> dict[int, str]:
    """Return the names of this process's threads by their ids; empty where there is no /proc."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # the thread has ended
                found[int(task)] = Path(f"/proc/self/task/{task}/comm").read_text()
    return found


def _before_fork() -> None:
    """Notice MindSpore's use by other code than ours."""
    global _used_in
    if any(name.startswith(KERNEL_THREADS) for name in thread_names().values()):
        _used_in = os.getpid()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork)


def register_mindspore_use() -> None:
    """Record that MindSpore runs in this process, and refuse it in a fork, where it hangs.

    Raises:
        UserError: this process was forked from one in which MindSpore had run.
    """
    global _used_in
    if _used_in not in (None, os.getpid()):
        raise UserError(
            f"MindSpore ran in process {_used_in} and hangs in a fork of it, process "
            f"{os.getpid()}: open no model before the fork (gunicorn: without --preload; "
            'multiprocessing: the start method "spawn")'
        )
    _used_in = os.getpid()
