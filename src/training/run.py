"""A run's folder: made, guarded against another run, taken up again."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from src.command_line import load_config, save_config
from src.config import Config
from src.errors import UserError
from src.recipe import open_checked, resolve_classes
from src.runtime import log_to, setup
from src.training.trainer import Trainer

logger = logging.getLogger("cvt")
# Keys that may change between the parts of a run, because they don't change what is computed.
FREE_TO_CHANGE = (
    "runtime.device",
    "runtime.device_id",
    "data.path",
    "data.index",
    "evaluation.batch_size",
)


def train(config: Config, output: Path, resume: bool = False, finetune: str | None = None) -> None:
    """Train into a folder: config.yaml, log.txt, metrics.jsonl, curves.png, checkpoints/.

    Args:
        config: the recipe.
        output: the folder; without `resume` it must hold no other run.
        finetune: a weight file to start from; a head for other classes starts anew.
        resume: go on behind the last finished epoch of the run in that folder.

    Raises:
        UserError: settings, data or a folder that can't be used.
    """
    if resume and finetune is not None:
        raise UserError("--resume and --finetune: give one; a resumed run has its weights already")
    device, ranks = setup(config.runtime)
    if ranks.is_first:
        _check_folder(output, resume)
    source = open_checked(config, "train", ranks, output)
    config = resolve_classes(config, source)
    ranks.require_agreement("settings", _flat(config))
    if resume and ranks.is_first:
        _refuse_changes(load_config(output / "config.yaml"), config, output)
    # First of all, because it finds what can't work.
    trainer = Trainer(config, source, output, finetune, ranks)
    if ranks.is_first:
        _open_folder(config, output)
    logger.info("device %s, %s mode", device, config.runtime.mode)
    if ranks.world > 1:
        logger.info("rank %d of %d", ranks.rank, ranks.world)
    if resume:
        trainer.resume()
    trainer.fit()


def _check_folder(output: Path, resume: bool) -> None:
    there = (output / "checkpoints" / "last.ckpt").is_file()
    if resume and not there:
        raise UserError(f"{output}: no checkpoints/last.ckpt to resume from; leave out --resume")
    if there and not resume:
        raise UserError(f"{output}: holds a run; add --resume to go on, or give another --output")


def _open_folder(config: Config, output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        log_to(output / "log.txt")
        save_config(config, output / "config.yaml")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; give another --output") from None


def _refuse_changes(before: Config, now: Config, output: Path) -> None:
    old, new = _flat(before), _flat(now)
    changed = [key for key in new if old[key] != new[key] and key not in FREE_TO_CHANGE]
    if changed:
        key = changed[0]
        others = f" (also {', '.join(changed[1:])})" if len(changed) > 1 else ""
        raise UserError(
            f"{output}: was trained with {key} {old[key]}, not {new[key]}{others}; "
            "resume with the settings in its config.yaml"
        )


def _flat(config: Config) -> dict:
    groups = dataclasses.asdict(config)
    return {
        f"{group}.{key}": list(value) if isinstance(value, tuple) else value
        for group, keys in groups.items()
        for key, value in keys.items()
    }
