"""A run's folder: made, guarded against another run, taken up again."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from src.arithmetic import check_arithmetic
from src.build import (
    build_model,
    build_preprocessing,
    check_values,
    open_checked,
    open_quietly,
    open_split,
    resolve_classes,
    uses_compiled,
)
from src.config import Config
from src.config_io import CONFIG, is_run_config, save_config
from src.data import Source
from src.device import log_to, seed_generators, setup
from src.distributed import Ranks
from src.errors import UserError
from src.models.complexity import uninitialised
from src.training.feed import Feed
from src.training.freeze import freeze
from src.training.setup import start_from
from src.training.state import BEST, LAST, flat, has_state
from src.training.trainer import Trainer

logger = logging.getLogger("cvt")
LOCK = ".lock"


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
    with alone_in(output) if ranks.is_first else contextlib.nullcontext():
        if ranks.is_first:
            _check_folder(output, resume)
        source = check_recipe(config, ranks, finetune)
        seed_generators(config.runtime.seed)  # as if no network had been built for the check
        source = open_checked(config, "train", ranks, output, source=source)
        config = resolve_classes(config, source)
        ranks.require_agreement("settings", flat(config))
        trainer = Trainer(config, source, output, finetune, ranks)
        if resume:
            trainer.resume(resume if isinstance(resume, Path) else None, accept_changes)
        if ranks.is_first:
            _open_folder(config, output)
        logger.info("device %s, %s mode", device, config.runtime.mode)
        if ranks.world > 1:
            logger.info("rank %d of %d", ranks.rank, ranks.world)
        trainer.fit()


def check_recipe(config: Config, ranks: Ranks, finetune: str | None = None) -> Source:
    """Refuse within seconds what can't be trained; checking the images may take minutes after it.

    Args:
        config: the recipe.
        ranks: those that share every step.
        finetune: the weight file to start from.

    Returns:
        The training images, not checked.

    Raises:
        UserError: settings, data or weights that can't be used.
    """
    check_values(config)
    build_preprocessing(config)
    uses_compiled(config.runtime)
    source, held_out = open_split(config, "train"), open_quietly(config, "val")
    if not len(held_out):
        raise UserError(f"{held_out.title}: no image to evaluate on; add some")
    config = resolve_classes(config, source)
    Feed(config, source, ranks)
    with contextlib.nullcontext() if finetune else uninitialised():
        net = build_model(config)
    freeze(net, config.training.freeze)
    if finetune:
        start_from(net, finetune, config)
    return source


# What a run writes beside its checkpoints; an index of images knows by itself whether it is ours.
_OWN_FILES = (
    "log.txt",
    "metrics.jsonl",
    "curves.png",
    f"checkpoints/{BEST}",
    f"checkpoints/{LAST}",
)


def _check_folder(output: Path, resume: Path | bool) -> None:
    """Refuse a folder with no run to resume, or with a run or somebody else's files to lose."""
    there = has_state(output / "checkpoints")
    if resume is True and not there:
        raise UserError(
            f"{output}: no run there to resume (no checkpoints/{LAST}); give its folder with "
            "--output, or leave out --resume to start one"
        )
    if there and not resume:
        raise UserError(f"{output}: holds a run; add --resume to go on, or give another --output")
    if there or is_run_config(output / CONFIG):
        return
    for name in (CONFIG, *_OWN_FILES):
        if (output / name).exists():
            raise UserError(
                f"{output}: {name} there is not of a run and would be replaced; give another "
                "--output"
            )


@contextlib.contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, which is created if it is missing.

    A folder that is still empty at the end, because what it was for was refused, is removed again.

    Raises:
        UserError: another process holds the lock, or the folder can't be written to.
    """
    missing = [each for each in (output, *output.parents) if not each.exists()]
    try:
        lock = _locked(output)
    except BlockingIOError:
        raise UserError(
            f"{output}: another run works in this folder; wait for it, or give another --output"
        ) from None
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}; give another --output") from None
    with lock:
        try:
            yield
        finally:
            (output / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                for folder in missing:
                    folder.rmdir()


def _locked(output: Path) -> IO:
    """The locked file of a folder.

    Whoever holds the lock removes the file before giving it up. A process that had opened it by
    then locks a file without a name, which no third process would see: it has to try again.
    """
    while True:
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(output / LOCK, "a")  # noqa: SIM115 - it is held, not read
        except FileNotFoundError:  # the folder was removed meanwhile
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(output / LOCK)):
                return lock
        except FileNotFoundError:
            pass
        except OSError:
            lock.close()
            raise
        lock.close()


def _open_folder(config: Config, output: Path) -> None:
    try:
        save_config(config, output / CONFIG)
        log_to(output / "log.txt")
    except OSError as error:
        raise UserError(f"{output}: {error.strerror}; give another --output") from None
