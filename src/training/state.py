"""Saves and loads the states of a run.

A state is one checkpoint: the training step's parameters (weights, moving average, optimizer
moments, step, loss scale) and, as JSON in it, the `Progress`. Every random draw follows from
(seed, epoch, step), so there is no generator state to save. States are named by their step;
`last.ckpt` is a second name of the newest one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from src.errors import UserError
from src.files import remove_unfinished, replacing, sha256_of
from src.training.train_step import TrainStep
from src.weights import load_state, read_checkpoint, save_checkpoint

logger = logging.getLogger("cvt")
LAST, BEST = "last.ckpt", "best.ckpt"
VERSION = 3  # raise it when the same settings compute other numbers
_STATE_NAME = re.compile(r"step-(\d+)\.ckpt")


@dataclass
class Progress:
    """The position of a run, its metrics, and the settings it was computed with.

    Args:
        epoch: finished epochs.
        position: finished steps of the current epoch.
        losses: of those steps, without skipped ones.
        seconds: of the current epoch so far, without those between an interruption and its resume.
        rows: the lines of metrics.jsonl, one for each finished epoch.
        best_top1: best held-out accuracy so far, in per cent; -1 for none.
        best_sha256: checksum of best.ckpt with these weights; "" if there is none.
        settings: every key of the configuration.
        data: checksum of the training images' names and labels.
        content: checksum of the training images' content; 0 if unknown.
        held_out, held_out_content: the same of the evaluation images; 0 if unknown.
        world: number of devices.
        device: "CPU", "GPU" or "Ascend"; "" if unknown.
        workers: threads that prepare images.
        compiled: whether the network uses compiled operators.
        version: `VERSION` of the code that computed it.
        software: the versions of MindSpore and NumPy; "" if unknown.
    """

    epoch: int = 0
    position: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rows: list[dict] = field(default_factory=list)
    best_top1: float = -1.0
    best_sha256: str = ""
    settings: dict = field(default_factory=dict)
    data: int = 0
    content: int = 0
    held_out: int = 0
    held_out_content: int = 0
    world: int = 1
    device: str = ""
    workers: int = 1
    compiled: bool = False
    version: int = 1
    software: str = ""


def has_state(checkpoints: Path) -> bool:
    """Return whether there is a state to resume from."""
    return bool(list_states(checkpoints))


def save_state(step: TrainStep, progress: Progress, checkpoints: Path, keep: int) -> None:
    """Write a state, link last.ckpt to it, and delete all but the `keep` newest.

    Raises:
        UserError: a value is not finite, or the file cannot be written; earlier states stay.
    """
    state = {parameter.name: parameter for parameter in step.get_parameters()}
    path = checkpoints / f"step-{int(step.step.asnumpy()):08}.ckpt"
    _require_finite(state, path)
    save_checkpoint(state, path, progress=json.dumps(dataclasses.asdict(progress)))
    link_last(path)
    named = [state for state in list_states(checkpoints) if state.name != LAST]
    for old in named[keep:]:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:  # the new state is safe
            logger.warning("%s: cannot be deleted: %s", old, error.strerror)
    remove_unfinished(checkpoints, "step-*.ckpt", LAST, BEST)  # an export may be writing here


def save_best(step: TrainStep, progress: Progress, checkpoints: Path, top1: float) -> None:
    """Write the evaluated weights (the moving average if there is one) as best.ckpt.

    Raises:
        UserError: a value is not finite, or the file cannot be written.
    """
    best = checkpoints / BEST
    net = step.net if step.ema_net is None else step.ema_net
    weights = {p.name.removeprefix("ema."): p for p in net.get_parameters()}
    _require_finite(weights, best)
    save_checkpoint(weights, best)
    progress.best_top1, progress.best_sha256 = top1, sha256_of(best)


def _require_finite(state: dict, path: Path) -> None:
    for name, parameter in state.items():
        if not np.isfinite(parameter.asnumpy()).all():
            raise UserError(f"{path}: not saved, {name} is not finite; lower optimizer.lr")


def link_last(path: Path) -> None:
    """Link last.ckpt to a state; copy it where the file system has no links.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replacing(path.with_name(LAST)) as unfinished:
            try:
                os.link(path, unfinished)
            except OSError:
                shutil.copyfile(path, unfinished)
    except OSError as error:
        raise UserError(f"{path.with_name(LAST)}: {error.strerror}") from None


@dataclass(frozen=True)
class State:
    """What a state's file holds.

    Args:
        path: the file.
        progress: the position of the run.
        tensors: the training step's parameters by name.
    """

    path: Path
    progress: Progress
    tensors: dict[str, np.ndarray]

    def load(self, step: TrainStep) -> None:
        """Set the parameters of a training step.

        Raises:
            WeightsMismatch: the state is of another network or recipe; nothing is set.
        """
        load_state(step, self.tensors, self.path)


def read_newest(checkpoints: Path) -> State:
    """Read the newest intact state; damaged ones are logged and skipped.

    Raises:
        UserError: no state, or none of them intact.
    """
    damaged = []
    for path in list_states(checkpoints):
        try:
            state = read_state(path)
        except UserError as error:
            logger.warning("%s", error)
            damaged.append(path.name)
            continue
        if damaged:
            logger.warning("resuming from %s, the newest intact state", path.name)
        return state
    raise UserError(
        f"{checkpoints}: no state to resume from"
        + (f", {', '.join(damaged)} can't be used" if damaged else "; leave out --resume")
    )


def read_state(path: Path) -> State:
    """Read one state.

    Raises:
        UserError: the file is damaged, or not a state.
    """
    tensors = read_checkpoint(path).tensors
    if "progress" not in tensors:
        raise UserError(
            f"{path}: holds weights only, no training state; give --resume without a file to "
            "use the run's newest state, or start a new run with --finetune and this file"
        )
    try:
        saved = json.loads(tensors.pop("progress").item())
        known = {each.name for each in dataclasses.fields(Progress)}
        progress = Progress(**{key: value for key, value in saved.items() if key in known})
        return State(path, progress, tensors)
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"{path}: not a state that this version can resume; to start from its weights, give "
            "it as --finetune"
        ) from None


def metrics_text(progress: Progress) -> str:
    """Return the content of metrics.jsonl."""
    return "".join(json.dumps(row) + "\n" for row in progress.rows)


def metrics_match(file: Path, progress: Progress) -> bool:
    """Return whether a metrics.jsonl equals the state's metrics."""
    try:
        return file.read_text(encoding="utf-8") == metrics_text(progress)
    except FileNotFoundError:
        return not progress.rows
    except (OSError, UnicodeDecodeError):
        return False


def step_of(state: Path) -> int:
    """Return the step in a state's file name; -1 for other files."""
    found = _STATE_NAME.fullmatch(state.name)
    return int(found[1]) if found else -1


def list_states(checkpoints: Path) -> list[Path]:
    """Return a folder's states, newest first."""
    named = [path for path in checkpoints.glob("step-*.ckpt") if step_of(path) >= 0]
    states = sorted(named, key=step_of, reverse=True)
    last = checkpoints / LAST
    if last.is_file() and not any(os.path.samefile(last, state) for state in states):
        states.append(last)
    return states
