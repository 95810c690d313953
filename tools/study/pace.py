"""How long a study will take: from its finished epochs, or from a few measured steps."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from src.training.resume import flatten
from tools.study.cells import Trainings, read_rows
from tools.study.grid import Cell

PROBE_STEPS = 10
# Keys that change what a run learns, not how long it takes.
TIMELESS = (
    "runtime.seed", "data.train_images", "data.index", "training.epochs",
    "training.label_smoothing",
)  # fmt: skip


class Pace:
    """Seconds a step of each kind of cell, evaluations and compiling shared out over its steps.

    Cells are of a kind that differ in seed, images, budget and the optimizer's numbers only.
    """

    def __init__(self) -> None:
        self.start_up = 0.0  # seconds of a process beside its epochs
        self._measured: dict[str, list[float]] = {}

    def learn(self, cell: Cell, rows: Sequence[dict]) -> None:
        """Take in finished epochs of a cell."""
        if rows:
            self._learn(cell, sum(row["seconds"] for row in rows) / rows[-1]["step"])

    def _learn(self, cell: Cell, seconds: float) -> None:
        self._measured.setdefault(_kind(cell), []).append(seconds)

    def knows(self, cell: Cell) -> bool:
        """Whether a cell of this kind has been measured."""
        return _kind(cell) in self._measured

    def left(self, cell: Cell, steps_done: int = 0) -> float:
        """Seconds for the rest of a cell of a kind that is known."""
        measured = self._measured[_kind(cell)]
        return (cell.steps - steps_done) * sum(measured) / len(measured) + self.start_up

    def probe(self, cell: Cell, words: Sequence[str], trainings: Trainings, folder: Path) -> None:
        """Measure a cell by two short epochs of it; learn nothing where train.py fails.

        The first one has the compiling, the second one shows steps and evaluation alone.
        """
        shutil.rmtree(folder, ignore_errors=True)
        steps = min(PROBE_STEPS, cell.config.training.epoch_steps)
        short = ("--training.epochs=2", f"--training.epoch_steps={steps}", f"--output={folder}")
        start = time.perf_counter()
        try:
            code = trainings.run([*words, *short], quiet=True)
            rows = read_rows(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if code or len(rows) != 2:
            return
        self.start_up = time.perf_counter() - start - sum(row["seconds"] for row in rows)
        training = cell.config.training
        step = training.batch_size * training.accumulate / rows[1]["images_per_second"]
        evaluation = max(rows[1]["seconds"] - steps * step, 0.0)
        compiling = max(rows[0]["seconds"] - rows[1]["seconds"], 0.0)
        whole = compiling + cell.steps * step + training.epochs * evaluation
        self._learn(cell, whole / cell.steps)


def _kind(cell: Cell) -> str:
    settings = flatten(cell.config)
    optimizer = {"optimizer.name", "optimizer.clip_norm"}
    return json.dumps(
        {
            key: value
            for key, value in settings.items()
            if key not in TIMELESS and (key[:10] != "optimizer." or key in optimizer)
        }
    )


def in_words(seconds: float) -> str:
    """A duration as people say it."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
