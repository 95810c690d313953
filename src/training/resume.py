"""Restores a run from a saved state and checks that it continues under the same settings."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Container
from pathlib import Path

from src.config import Config
from src.errors import UserError, shorten
from src.files import sha256_of
from src.training.state import (
    BEST,
    LAST,
    Progress,
    link_last,
    list_states,
    read_newest,
    read_state,
    save_best,
    save_state,
    step_of,
)
from src.training.train_step import TrainStep
from src.weights import WeightsMismatch

logger = logging.getLogger("cvt")
_ABANDONED = re.compile(r"abandoned-(\d+)-.+")

_HELD_OUT_IMAGES = "evaluation images"
# Keys of `data` and `model` that leave the accuracy of given weights unchanged.
_OF_TRAINING = ("data.train_images", "model.drop_path_rate", "model.drop_rate")
# Keys that change rounding only; the log says so.
ROUNDING = ("runtime.depthwise", "runtime.jit_level", "runtime.deterministic")
# Keys that may differ on resume: they do not change the results, or the values they resolve to
# are compared (device, compiled operators, workers).
FREE_TO_CHANGE = (
    *ROUNDING, "runtime.device", "runtime.device_id", "runtime.compiled_ops", "data.path",
    "data.index", "data.workers", "data.check_images", "data.broken", "data.broken_share",
    "evaluation.batch_size", "training.save_every", "training.keep",
)  # fmt: skip


def restore(
    step: TrainStep,
    current: Progress,
    output: Path,
    state: Path | None,
    *,
    steps_per_epoch: int,
    keep: int,
    accept_changes: bool,
) -> Progress:
    """Load a saved state into the step.

    Newer states, which the resumed run will not reach again as they are, are set aside. Nothing is
    changed before the settings have been compared.

    Args:
        step: receives weights, moments, moving average, step number and loss scale.
        current: the settings and data of this process.
        output: the run's folder.
        state: the state to resume from; None for the newest intact one in the folder.
        steps_per_epoch: of this process.
        keep: number of states to keep.
        accept_changes: continue although settings or images differ, with a warning.

    Returns:
        The saved progress with this process's settings.

    Raises:
        UserError: no usable state, or settings or images that differ, or that would have no effect.
    """
    checkpoints = output / "checkpoints"
    found = read_newest(checkpoints) if state is None else read_state(state)
    state, saved = found.path, found.progress
    changes = check_compatible(saved, current, output, accept_changes)
    if saved.position > steps_per_epoch:
        raise UserError(
            f"{state}: is from step {saved.position} of an epoch, which now has {steps_per_epoch}; "
            "finish the epoch with the settings in its config.yaml, then change them"
        )
    try:
        found.load(step)
    except WeightsMismatch:
        if not changes:
            raise
        raise UserError(
            f"{state}: does not fit the current settings ({'; '.join(changes.values())}); start a "
            f"new run from its weights with --finetune {state}"
        ) from None
    if changes and saved.epoch >= (epochs := current.settings["training.epochs"]):
        raise UserError(
            f"{state}: has {saved.epoch} of {epochs} epochs, so no step would be trained with the "
            f"changed settings ({'; '.join(changes.values())}); raise training.epochs"
        )
    scale = "training.loss_scale"
    if scale in saved.settings and saved.settings[scale] != current.settings[scale]:
        step.reset_loss_scale()
    remeasured = any(
        key == _HELD_OUT_IMAGES or key.startswith(("data.", "model.")) and key not in _OF_TRAINING
        for key in changes
    )
    if remeasured:
        saved.best_top1, saved.best_sha256 = -1.0, ""
    best = saved.best_top1
    last_row = saved.rows[-1:] if not saved.position else []
    abandoned = set_aside_newer(step, saved, state, checkpoints, keep, remeasured)
    if remeasured:
        logger.warning(
            "the best weights are selected anew, because the earlier accuracy is of other settings "
            "or images"
        )
    elif saved.best_top1 < 0 and last_row and last_row[0]["top1"] == best:
        save_best(step, saved, checkpoints, best)  # the state holds the best weights itself
    if abandoned:
        logger.warning(
            "%s continues; files that do not belong to it any more are renamed in %s: %s",
            state.name, checkpoints, ", ".join(path.name for path in abandoned),
        )  # fmt: skip
    kept = ("epoch", "position", "losses", "seconds", "rows", "best_top1", "best_sha256")
    return dataclasses.replace(current, **{name: getattr(saved, name) for name in kept})


def set_aside_newer(
    step: TrainStep,
    progress: Progress,
    state: Path,
    checkpoints: Path,
    keep: int,
    with_best: bool = False,
) -> list[Path]:
    """Rename the files of the branch that a resumed run abandons.

    Otherwise the next resume would pick the abandoned branch, whose states are newer. Files are
    renamed to "abandoned-<n>-<name>", never deleted. If the folder does not hold the state (it was
    set aside before, or comes from another folder), it is saved there.

    Args:
        step: holds the state's parameters.
        progress: of the state; `best_top1` is reset unless best.ckpt is that of the state.
        state: the file resumed from.
        checkpoints: the run's folder of states.
        keep: number of states to keep.
        with_best: rename best.ckpt, too.

    Returns:
        The renamed files.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    number = int(step.step.asnumpy())
    is_own = _is_state_of(state.resolve(), checkpoints.resolve())
    named = [path for path in list_states(checkpoints) if path.name != LAST]
    newer = [path for path in named if step_of(path) > number or not is_own]
    best = checkpoints / BEST
    if not best.is_file():
        progress.best_top1, progress.best_sha256 = -1.0, ""
    elif with_best or sha256_of(best) != progress.best_sha256:
        # A run killed between saving best.ckpt and the state leaves weights of a later epoch.
        progress.best_top1, progress.best_sha256 = -1.0, ""
        newer = [*newer, best]
    used = [int(m[1]) for m in map(_ABANDONED.fullmatch, os.listdir(checkpoints)) if m]
    renamed = [
        path.with_name(f"abandoned-{max(used, default=0) + 1}-{path.name}") for path in newer
    ]
    for path, new in zip(newer, renamed):
        path.rename(new)
    kept = checkpoints / f"step-{number:08}.ckpt"
    if not (kept.is_file() and os.path.samefile(kept, state)):
        save_state(step, progress, checkpoints, keep)
    elif renamed:
        link_last(kept)
    return renamed


def _is_state_of(state: Path, checkpoints: Path) -> bool:
    return state.parent == checkpoints and (state.name == LAST or step_of(state) >= 0)


def flatten(config: Config) -> dict:
    """Return every key of a configuration by its dotted name, with values as JSON holds them."""
    groups = json.loads(json.dumps(dataclasses.asdict(config)))
    return {
        f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()
    }


def changed_settings(old: dict, new: dict, free: Container[str]) -> dict[str, str]:
    """Return the keys with other values, except `free` ones: by key, "key old, not new"."""
    return {
        key: f"{key} {shorten(old.get(key))}, not {shorten(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key not in free
    }


def check_compatible(
    saved: Progress, current: Progress, output: Path, accept: bool
) -> dict[str, str]:
    """Compare a state's settings and images with those of this process.

    Returns:
        The differences that change what is computed: by key, "key old, not new".

    Raises:
        UserError: a difference that changes what is computed, unless `accept`.
    """
    if saved.world != current.world:
        raise UserError(
            f"{output}: the run used {saved.world} devices, not {current.world}; resume on "
            f"{saved.world} devices"
        )
    old, new = saved.settings, current.settings
    changed = changed_settings(old, new, FREE_TO_CHANGE)
    if saved.data != current.data:
        changed["training images"] = (
            f"other training images or labels than those of {new['data.path'] or 'this data set'}"
        )
    elif 0 not in (saved.content, current.content) and saved.content != current.content:
        changed["training images"] = (
            "other content of the training images, whose names are the same"
        )
    if saved.held_out not in (0, current.held_out):
        changed[_HELD_OUT_IMAGES] = "other evaluation images or labels"
    elif (
        0 not in (saved.held_out_content, current.held_out_content)
        and saved.held_out_content != current.held_out_content
    ):
        changed[_HELD_OUT_IMAGES] = "other evaluation images: their content, not their names"
    if changed and not accept:
        raise UserError(
            f"{output}: was trained with {'; '.join(changed.values())}. Resume with the settings "
            "in its config.yaml, or add --accept_changes"
        )
    for change in changed.values():
        logger.warning("was trained with %s", change)
    _warn_if_inexact(saved, current)
    return changed


def _warn_if_inexact(saved: Progress, current: Progress) -> None:
    """Log why a run under the same settings may still differ from an uninterrupted one."""
    old, new = saved.settings, current.settings
    by_worker = new.get("augment.crop") == "random_resized" or new.get("augment.color_jitter")
    if by_worker and saved.workers != current.workers:
        logger.warning(
            "data workers change from %d to %d: crops and colours will differ from an "
            "uninterrupted run; set data.workers to %d to avoid this", saved.workers,
            current.workers, saved.workers,
        )  # fmt: skip
    if saved.version != current.version:
        logger.warning(
            "the state is of another version of this code: from here on results may differ from "
            "those of an uninterrupted run"
        )
    if saved.software not in ("", current.software):
        logger.warning(
            "the run used %s, now %s: augmentation and rounding may differ from here on",
            saved.software, current.software,
        )  # fmt: skip
    rounding = [
        f"{key} {old.get(key)}, now {new.get(key)}"
        for key in ROUNDING
        if old.get(key) != new.get(key)
    ]
    if saved.device not in ("", current.device):
        rounding.append(f"device {saved.device}, now {current.device}")
    if rounding:
        logger.warning(
            "%s: from here on results equal those of an uninterrupted run except for rounding",
            "; ".join(rounding),
        )
    if saved.compiled != current.compiled:
        logger.warning(
            "the run was %s compiled operators and continues %s them (runtime.compiled_ops): "
            "results equal an uninterrupted run except for rounding",
            *("with" if compiled else "without" for compiled in (saved.compiled, current.compiled)),
        )
