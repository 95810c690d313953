"""The runs behind a study's cells: how far they are, and how to get them done."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from src.config_io import load_config
from src.errors import UserError, shown
from src.training.resume import FREE_TO_CHANGE, flatten
from src.training.state import has_state
from src.training.stop_signal import SIGNALS
from tools.study.grid import Cell

logger = logging.getLogger("cvt")
TRAIN = Path(__file__).resolve().parents[2] / "train.py"
RESOLVED = ("model.num_classes", "data.class_names")  # a run fills them in where they are null


@dataclasses.dataclass(frozen=True)
class Run:
    """What a cell's folder holds.

    Args:
        rows: of metrics.jsonl, one for each finished epoch.
        begun: whether there is a state to go on from.
        done: whether the last epoch is evaluated.
    """

    rows: list[dict]
    begun: bool
    done: bool


def look(cell: Cell, folder: Path) -> Run:
    """See how far a cell is.

    A finished cell needs no checkpoints, only config.yaml and metrics.jsonl, so that results can be
    kept in a repository and a study continued on another machine.

    Raises:
        UserError: it was trained under other settings than the study has now.
    """
    begun = has_state(folder / "checkpoints")
    rows = read_rows(folder)
    if begun or rows:
        _refuse_changes(cell, folder)
    last = rows[-1] if rows else {}
    done = last.get("epoch") == cell.config.training.epochs and last.get("top1") is not None
    return Run(rows if begun or done else [], begun, done)


def read_rows(folder: Path) -> list[dict]:
    """The figures of a run; none of a file that is damaged, which resuming the run repairs."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        return []
    return rows if [row.get("epoch") for row in rows] == list(range(1, len(rows) + 1)) else []


def _refuse_changes(cell: Cell, folder: Path) -> None:
    before, now = flatten(load_config(folder / "config.yaml")), flatten(cell.config)
    free = {key for key in RESOLVED if now[key] is None} | set(FREE_TO_CHANGE)
    changed = [
        f"{key} {shown(before[key])}, not {shown(now[key])}"
        for key in now
        if key not in free and before[key] != now[key]
    ]
    if changed:
        raise UserError(
            f"{folder}: was trained with {'; '.join(changed)}. Give another --output, or remove "
            "this folder to train the cell again"
        )


class Trainings:
    """Runs train.py, one process at a time; a signal is passed on, so that the run saves first.

    Used as a context. The process has a session of its own: a terminal's Ctrl-C would reach it
    beside the signal passed on, and it takes the second one as the order to end at once.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Trainings:
        self._before = {number: signal.signal(number, self._pass_on) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        self.signal = number
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def run(self, words: Sequence[str], quiet: bool = False) -> int:
        """Run train.py to its end; returns its exit code.

        Raises:
            SystemExit: 128 + the signal that asked to stop.
        """
        self._leave_if_asked()
        self._process = subprocess.Popen(
            [sys.executable, str(TRAIN), *words],
            stdout=subprocess.DEVNULL if quiet else None,
            start_new_session=True,
        )
        if self.signal:  # since the last look, before there was a process to pass it on to
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        self._process = None
        self._leave_if_asked()
        return code

    def _leave_if_asked(self) -> None:
        if self.signal:
            name = signal.Signals(self.signal).name
            logger.warning("stopped by %s; the same command goes on from here", name)
            raise SystemExit(128 + self.signal)
