"""A run's folder: made, guarded against another run, taken up again."""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from src.arithmetic import check_arithmetic
from src.command_line import save_config
from src.config import Config
from src.errors import UserError
from src.recipe import open_checked, resolve_classes
from src.runtime import log_to, setup
from src.training.state import flat, has_state
from src.training.trainer import Trainer

logger = logging.getLogger("cvt")


def train(
    config: Config,
    output: Path,
    resume: Path | bool = False,
    finetune: str | None = None,
    accept_changes: bool = False,
) -> None:
    """Train into a folder: config.yaml, log.txt, metrics.jsonl, curves.png, checkpoints/.

    Args:
        config: the recipe.
        output: the folder; without `resume` it must hold no other run.
        resume: go on with the run in that folder, from its newest whole state or from this file.
        finetune: a weight file to start from; a head for other classes starts anew.
        accept_changes: resume under other settings too.

    Raises:
        UserError: settings, data or a folder that can't be used.
    """
    if resume and finetune is not None:
        raise UserError("--resume and --finetune: give one; a resumed run has its weights already")
    if config.data.labels != "val" or config.data.labels_file:
        raise UserError(
            "data.labels, data.labels_file: a run is evaluated by its own labels; leave them out "
            "here and give them to eval.py"
        )
    device, ranks = setup(config.runtime)
    check_arithmetic(config)
    if ranks.is_first:
        _check_folder(output, resume)
    source = open_checked(config, "train", ranks, output)
    config = resolve_classes(config, source)
    ranks.require_agreement("settings", flat(config))
    # First of all, because it finds what can't work.
    trainer = Trainer(config, source, output, finetune, ranks)
    with alone_in(output) if ranks.is_first else contextlib.nullcontext():
        if resume:
            trainer.resume(resume if isinstance(resume, Path) else None, accept_changes)
        if ranks.is_first:
            _open_folder(config, output)
        logger.info("device %s, %s mode", device, config.runtime.mode)
        if ranks.world > 1:
            logger.info("rank %d of %d", ranks.rank, ranks.world)
        trainer.fit()


def _check_folder(output: Path, resume: Path | bool) -> None:
    there = has_state(output / "checkpoints")
    if resume is True and not there:
        raise UserError(f"{output}: no checkpoints/last.ckpt to resume from; leave out --resume")
    if there and not resume:
        raise UserError(f"{output}: holds a run; add --resume to go on, or give another --output")


@contextlib.contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Keep a second run out of the folder for as long as this one works in it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = open(output / ".lock", "w")  # noqa: SIM115 - it is held, not read
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; give another --output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{output}: another run works in this folder; wait for it, or give another --output"
            ) from None
        try:
            yield
        finally:
            (output / ".lock").unlink(missing_ok=True)


def _open_folder(config: Config, output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        log_to(output / "log.txt")
        save_config(config, output / "config.yaml")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; give another --output") from None
