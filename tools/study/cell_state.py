"""Reads how far the run of a cell is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from src.config_io import load_config
from src.errors import UserError
from src.training.resume import FREE_TO_CHANGE, changed_settings, flatten
from src.training.state import has_state
from tools.study.cells import Cell

RESOLVED = ("model.num_classes", "data.class_names")  # a run fills them in where they are null


@dataclass(frozen=True)
class CellState:
    """What a cell's folder contains.

    Args:
        rows: metrics.jsonl, one row per finished epoch.
        resumable: whether there is a saved state to resume from.
        finished: whether the last epoch has been evaluated.
        class_names: of the data it was trained on; None before the start.
    """

    rows: list[dict]
    resumable: bool
    finished: bool
    class_names: list[str] | None = None


def read_cell_state(cell: Cell, folder: Path) -> CellState:
    """Read how far a cell is.

    A finished cell needs only config.yaml and metrics.jsonl, so results can be committed and the
    study continued on another machine.

    Raises:
        UserError: the cell was trained under other settings.
    """
    resumable = has_state(folder / "checkpoints")
    rows = _read_metrics(folder / "metrics.jsonl")
    names = _require_same_settings(cell, folder) if resumable or rows else None
    last = rows[-1] if rows else {}
    finished = last.get("epoch") == cell.config.training.epochs and last.get("top1") is not None
    return CellState(rows if resumable or finished else [], resumable, finished, names)


def _read_metrics(file: Path) -> list[dict]:
    """Return the rows of metrics.jsonl; none if it is damaged, which resuming repairs."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    return rows if [row.get("epoch") for row in rows] == list(range(1, len(rows) + 1)) else []


def _require_same_settings(cell: Cell, folder: Path) -> list[str] | None:
    """Check the settings of a cell's run and return its class names."""
    config = load_config(folder / "config.yaml")
    before, now = flatten(config), flatten(cell.config)
    free = {key for key in RESOLVED if now[key] is None} | set(FREE_TO_CHANGE)
    changed = changed_settings(before, now, free)
    if changed:
        raise UserError(
            f"{folder}: was trained with {'; '.join(changed.values())}. Give another --output, or "
            "remove this folder to train the cell again"
        )
    return config.data.class_names
