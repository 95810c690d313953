"""The saved states of a run: everything that it needs to go on as if it had never stopped.

A state is one checkpoint: the training step's parameters (weights, average, moments, step, loss
scale) and, as JSON in it, the `Progress`. Every random draw follows from (seed, epoch, step), so no
generator has a state to save. States are named by their step; `last.ckpt` is the newest one, under
the name that people look for.
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

from src.config import Config
from src.errors import UserError, shown
from src.files import remove_unfinished, replacing
from src.training.train_step import TrainStep
from src.weights import load_state, save_checkpoint, sha256_of

logger = logging.getLogger("cvt")
LAST, BEST = "last.ckpt", "best.ckpt"
_STATE_NAME = re.compile(r"step-(\d+)\.ckpt")
_ABANDONED = re.compile(r"abandoned-(\d+)-.+")


@dataclass
class Progress:
    """Where a run stands, and what it must find again.

    Args:
        epoch: finished epochs.
        position: steps done of the next one.
        losses: of those steps, without skipped ones.
        rows: what metrics.jsonl holds, one for each finished epoch.
        best_top1: the best so far, in per cent.
        best_sha256: of the file best.ckpt with these weights; "" in states of earlier versions.
        settings: every key of the configuration.
        data: checksum of the training images' names and labels.
        world: devices.
        workers: threads that prepare images.
        compiled: whether the network computes in compiled operators.
        device_noise: whether erased boxes get their noise on the device, as they now do.
    """

    epoch: int = 0
    position: int = 0
    losses: list[float] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    best_top1: float = -1.0
    best_sha256: str = ""
    settings: dict = field(default_factory=dict)
    data: int = 0
    world: int = 1
    workers: int = 1
    compiled: bool = False
    device_noise: bool = False


def has_state(checkpoints: Path) -> bool:
    """Whether there is a state to go on from."""
    return bool(_states(checkpoints))


def save_state(step: TrainStep, progress: Progress, checkpoints: Path, keep: int) -> None:
    """Write a state, make it the last one, and drop all but the `keep` newest.

    Raises:
        UserError: it can't be written; the earlier ones are as they were.
    """
    state = {parameter.name: parameter for parameter in step.get_parameters()}
    path = checkpoints / f"step-{int(step.step.asnumpy()):08}.ckpt"
    require_finite(state, path)
    text = json.dumps(dataclasses.asdict(progress))
    save_checkpoint(state, path, progress=text)
    _name_last(path)
    for old in _states(checkpoints)[keep:]:
        old.unlink(missing_ok=True)
    remove_unfinished(checkpoints)


def require_finite(state: dict, path: Path) -> None:
    """Refuse to save what training could not go on from.

    Raises:
        UserError: a value is NaN or infinite.
    """
    for name, parameter in state.items():
        if not np.isfinite(parameter.asnumpy()).all():
            raise UserError(f"{path}: not saved, {name} is not finite; lower optimizer.lr")


def _name_last(path: Path) -> None:
    """Give a state the name last.ckpt too, without copying it where the file system can."""
    try:
        with replacing(path.with_name(LAST)) as unfinished:
            try:
                os.link(path, unfinished)
            except OSError:
                shutil.copyfile(path, unfinished)
    except OSError as error:
        raise UserError(f"{path.with_name(LAST)}: {error.strerror}") from None


def load_newest(step: TrainStep, checkpoints: Path) -> tuple[Progress, Path]:
    """Load the newest state that is whole; a damaged one is named and passed over.

    Returns:
        What the state says, and its file.

    Raises:
        UserError: no state, or none of them whole.
    """
    faults = []
    for path in _states(checkpoints):
        try:
            progress = load_progress(step, path)
        except UserError as error:
            logger.warning("%s", error)
            faults.append(path.name)
            continue
        if faults:
            logger.warning("going back to %s, the newest state that is whole", path.name)
        return progress, path
    raise UserError(
        f"{checkpoints}: no state to resume from"
        + (f", {', '.join(faults)} can't be used" if faults else "; leave out --resume")
    )


def leave_branch(
    step: TrainStep, progress: Progress, state: Path, checkpoints: Path, keep: int
) -> list[Path]:
    """Set aside what was trained behind the state that a run is resumed from.

    Otherwise the next resume would take up the abandoned branch, whose states are newer. Files are
    renamed to "abandoned-<n>-<name>", never deleted. Where the folder lacks the state (it was set
    aside before, or is of another folder), it is saved there.

    Args:
        step: with the state's parameters.
        progress: what the state says; `best_top1` is reset where best.ckpt is not the state's.
        state: the file.
        checkpoints: the run's folder of states.
        keep: states that are kept.

    Returns:
        The files set aside.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    number = int(step.step.asnumpy())
    is_own = _is_in(state.resolve(), checkpoints.resolve())
    named = [path for path in _states(checkpoints) if path.name != LAST]
    others = [path for path in named if _step_of(path) > number or not is_own]
    best = checkpoints / BEST
    if not best.is_file():
        progress.best_top1, progress.best_sha256 = -1.0, ""
    elif (others or not is_own) and sha256_of(best) != progress.best_sha256:
        progress.best_top1, progress.best_sha256 = -1.0, ""
        others = [*others, best]
    used = [int(m[1]) for m in map(_ABANDONED.fullmatch, os.listdir(checkpoints)) if m]
    aside = [path.with_name(f"abandoned-{max(used, default=0) + 1}-{path.name}") for path in others]
    for path, new in zip(others, aside):
        path.rename(new)
    kept = checkpoints / f"step-{number:08}.ckpt"
    if not (kept.is_file() and os.path.samefile(kept, state)):
        save_state(step, progress, checkpoints, keep)
    elif aside:
        _name_last(kept)
    return aside


def _is_in(state: Path, checkpoints: Path) -> bool:
    """Whether a file is one of a folder's own states."""
    return state.parent == checkpoints and (state.name == LAST or _step_of(state) >= 0)


def load_progress(step: TrainStep, path: Path) -> Progress:
    """Load one state.

    Raises:
        UserError: no state of this recipe, or a damaged one.
    """
    extra = load_state(step, path)
    try:
        return Progress(**json.loads(extra["progress"]))
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: no state that this version reads; give --finetune to start from its weights"
        ) from None


def figures_of(progress: Progress) -> str:
    """The content of metrics.jsonl."""
    return "".join(json.dumps(row) + "\n" for row in progress.rows)


def has_figures(file: Path, progress: Progress) -> bool:
    """Whether a metrics.jsonl is what the state bears out."""
    try:
        return file.read_text(encoding="utf-8") == figures_of(progress)
    except FileNotFoundError:
        return not progress.rows
    except (OSError, UnicodeDecodeError):
        return False


def _step_of(state: Path) -> int:
    """The step that a state's name gives; -1 for another file."""
    found = _STATE_NAME.fullmatch(state.name)
    return int(found[1]) if found else -1


def _states(checkpoints: Path) -> list[Path]:
    """The states, newest first."""
    named = [path for path in checkpoints.glob("step-*.ckpt") if _step_of(path) >= 0]
    states = sorted(named, key=_step_of, reverse=True)
    last = checkpoints / LAST
    if last.is_file() and not any(os.path.samefile(last, state) for state in states):
        states.append(last)
    return states


# Keys that may change between the parts of a run, because they don't change what is computed.
FREE_TO_CHANGE = (
    "runtime.device", "runtime.device_id", "runtime.compiled_ops", "runtime.depthwise",
    "runtime.jit_level", "runtime.deterministic", "data.path", "data.index",
    "evaluation.batch_size", "training.save_every", "training.keep",
)  # fmt: skip


def flat(config: Config) -> dict:
    """Every key of a configuration by its dotted name, as JSON gives values back."""
    groups = json.loads(json.dumps(dataclasses.asdict(config)))
    return {
        f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()
    }


def refuse_changes(before: Progress, now: Progress, output: Path, accept: bool) -> None:
    """Compare what a state was made under with what a run would go on under.

    Raises:
        UserError: something that changes what is computed, unless `accept`.
    """
    if before.world != now.world:
        raise UserError(
            f"{output}: was trained on {before.world} devices, not {now.world}; resume on as many"
        )
    old, new = before.settings, now.settings
    changed = [
        f"{key} {shown(old.get(key))}, not {shown(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key not in FREE_TO_CHANGE
    ]
    if before.data != now.data:
        changed.append(f"other training images or labels than {new['data.path'] or 'these'} has")
    if changed and not accept:
        raise UserError(
            f"{output}: was trained with {'; '.join(changed)}. Resume with the settings in its "
            "config.yaml, or add --accept_changes"
        )
    for change in changed:
        logger.warning("was trained with %s", change)
    if before.workers != now.workers:
        logger.warning(
            "%d data workers until here, %d from now on: crops and flips differ from those of an "
            "uninterrupted run; set data.workers to %d", before.workers, now.workers,
            before.workers,
        )  # fmt: skip
    if before.device_noise != now.device_noise and new.get("augment.erasing_prob"):
        logger.warning(
            "an earlier version drew the noise of erased boxes otherwise: from here on it differs "
            "from that of an uninterrupted run (augment.erasing_prob)"
        )
    if before.compiled != now.compiled:
        logger.warning(
            "%s compiled operators until here, %s from now on (runtime.compiled_ops): equal to an "
            "uninterrupted run but for rounding", *("with" if c else "without" for c in
            (before.compiled, now.compiled)),
        )  # fmt: skip
