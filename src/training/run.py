"""Starts a training run: checks the configuration and the output folder, then trains."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from src.arithmetic import check_arithmetic
from src.build import build_mixing, build_model, check_values, uses_compiled
from src.config import Config
from src.config_io import CONFIG, is_run_config, require_outside_images, save_config
from src.data import Source
from src.data.base import normalize_name
from src.data.folders import list_class_folders
from src.device import log_to, seed_generators, setup
from src.distributed import SAME_FILES, Ranks
from src.errors import UserError, join_names
from src.evaluation.labels import compare_with_run, warn_trained_before
from src.folder_lock import lock_folder
from src.models import uninitialised
from src.splits import open_checked, open_quietly, open_split, resolve_classes
from src.training.freeze import freeze
from src.training.resume import flatten
from src.training.setup import load_pretrained
from src.training.state import BEST, LAST, has_state
from src.training.train_loader import TrainLoader
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
        config: the configuration.
        output: the folder; without `resume` it must not hold another run.
        resume: continue the run in that folder, from its newest intact state or from this file.
        finetune: a weight file to start from; a head for other classes is new.
        accept_changes: resume although settings differ.

    Raises:
        UserError: invalid settings, data or folder.
    """
    if resume and finetune is not None:
        raise UserError("--resume and --finetune: give only one; a resumed run already has weights")
    if config.data.labels != "val" or config.data.labels_file:
        raise UserError(
            "data.labels, data.labels_file: training evaluates on the data set's own labels; give "
            "these keys to eval.py instead"
        )
    require_outside_images(config, output)
    device, ranks = setup(config.runtime)
    check_arithmetic(config)
    with lock_folder(output) if ranks.is_first else contextlib.nullcontext():
        if ranks.is_first:
            _check_folder(output, resume)
        source = validate(config, ranks, finetune, output if resume else None)
        seed_generators(config.runtime.seed)  # validation has drawn from them
        source = open_checked(config, "train", ranks, output, source=source)
        config = resolve_classes(config, source)
        _require_equal_settings(config, ranks)
        trainer = Trainer(config, source, output, finetune, ranks)
        if resume:
            trainer.resume(resume if isinstance(resume, Path) else None, accept_changes)
        if ranks.is_first:
            _start_files(config, output, resume)
        logger.info("device %s, %s mode", device, config.runtime.mode)
        if device == "CPU" and config.runtime.precision != "float32":
            logger.warning(
                "runtime.precision %s has no compiled operators on a CPU; float32 is faster",
                config.runtime.precision,
            )
        if ranks.world > 1:
            logger.info("rank %d of %d", ranks.rank, ranks.world)
        trainer.fit()


def _require_equal_settings(config: Config, ranks: Ranks) -> None:
    """Check that the ranks train alike; each host may keep the images at a path of its own.

    Raises:
        UserError: a rank has another value of a key.
    """
    own = ("data.path", "data.index")
    mine = {key: value for key, value in flatten(config).items() if key not in own}
    first, *others = map(json.loads, ranks.gather_texts(json.dumps(mine)))
    for rank, other in enumerate(others, 1):
        differing = [key for key in first if first[key] != other.get(key)]
        if differing:
            raise UserError(
                f"rank {rank} has other settings than rank 0 ({join_names(differing)}); "
                f"{SAME_FILES}"
            )


def validate(
    config: Config, ranks: Ranks, finetune: str | None = None, resumed: Path | None = None
) -> Source:
    """Check settings, data and weights within seconds, before images are read for minutes.

    Args:
        config: the configuration.
        ranks: the ranks that share every step.
        finetune: the weight file to start from.
        resumed: the folder of the run to continue.

    Returns:
        The training images, which are not checked yet.

    Raises:
        UserError: invalid settings, data or weights.
    """
    check_values(config)
    if build_mixing(config) and config.training.batch_size == 1:
        raise UserError(
            "training.batch_size 1: mixup and cutmix mix the images of a batch; take 2 or more, or "
            "set augment.mixup and augment.cutmix to 0"
        )
    ranks.require_agreement(
        "operators (compiled or not)",
        uses_compiled(config.runtime),
        "install a C++ compiler on every host, or set runtime.compiled_ops to never",
    )
    source, held_out = open_split(config, "train"), open_quietly(config, "val")
    if not len(held_out):
        raise UserError(f"{held_out.title}: no image to evaluate on; add images")
    if ranks.is_first:
        _warn_same_folder(config)
        if finetune:
            compare_with_run(finetune, config, class_names=False, sizes=False)
        if finetune or resumed:
            warn_trained_before(config, held_out, finetune or str(resumed))
    config = resolve_classes(config, source)
    TrainLoader(config, source, ranks)
    with contextlib.nullcontext() if finetune else uninitialised():
        net = build_model(config)
    freeze(net, config.training.freeze)
    if finetune:
        load_pretrained(net, finetune, config)
    return source


def _warn_same_folder(config: Config) -> None:
    """Warn if the run would measure its accuracy on the images that it trains on."""
    data = config.data
    if data.source not in ("imagefolder", "mindrecord") or data.val_from_train is not None:
        return
    root = Path(os.path.expanduser(data.path))
    train, val = root / data.train_folder, root / data.val_folder
    if train.resolve() == val.resolve():
        shared = "are the same folder"
    elif data.source == "imagefolder" and (names := _shared_classes(train, val, data.classes)):
        shared = f"share class folders ({join_names(names)})"
    else:
        return
    logger.warning(
        "data.train_folder and data.val_folder %s, so accuracy is measured on the training images; "
        "hold some out with --data.val_from_train N", shared,
    )  # fmt: skip


def _shared_classes(train: Path, val: Path, selected: Sequence[str] | None) -> list[str]:
    """Return the classes whose folder is, through links, one of the other split or inside it."""

    def real_paths(folder: Path) -> dict[Path, str]:
        names = list_class_folders(folder)
        if selected:
            wanted = set(map(normalize_name, selected))
            names = [name for name in names if normalize_name(name) in wanted]
        return {(folder / name).resolve(): name for name in names}

    def inside(some: dict[Path, str], others: dict[Path, str]) -> list[str]:
        return [some[path] for path in some if not others.keys().isdisjoint((path, *path.parents))]

    of_train, of_val = real_paths(train), real_paths(val)
    return inside(of_val, of_train) or inside(of_train, of_val)


# Files whose content does not show that a run wrote them; the image index's does.
_OWN_FILES = (
    "log.txt",
    "metrics.jsonl",
    "curves.png",
    f"checkpoints/{BEST}",
    f"checkpoints/{LAST}",
)


def _check_folder(output: Path, resume: Path | bool) -> None:
    """Refuse to resume without a run, and to overwrite a run or other files."""
    has_run = has_state(output / "checkpoints")
    if resume is True and not has_run:
        raise UserError(
            f"{output}: no run to resume here (no checkpoints/{LAST}); give the run's folder with "
            "--output, or leave out --resume to start a new run"
        )
    if has_run and not resume:
        raise UserError(
            f"{output}: already holds a run; add --resume to continue it, or give another --output"
        )
    if has_run:
        return
    if is_run_config(output / CONFIG):
        if not resume:
            _require_no_results(output)
        return
    for name in (CONFIG, *_OWN_FILES):
        if (output / name).exists():
            raise UserError(
                f"{output}: {name} would be overwritten and was not written by a run; give another "
                "--output"
            )


def _require_no_results(output: Path) -> None:
    """Refuse to overwrite what is left of a run whose states were removed."""
    for file in (output / "checkpoints" / BEST, output / "metrics.jsonl"):
        if file.exists() and file.stat().st_size:
            raise UserError(
                f"{output}: holds a run without a state to continue from, and {file.name} would be "
                "overwritten; give another --output"
            )


def _start_files(config: Config, output: Path, resume: Path | bool) -> None:
    """Start the log and write config.yaml; a resumed run keeps its own until it saves a state."""
    try:
        if not (resume and (output / CONFIG).exists()):
            save_config(config, output / CONFIG)
        (output / "checkpoints").mkdir(exist_ok=True)
        log_to(output / "log.txt")
    except OSError as error:
        file = error.filename or output
        raise UserError(f"{file}: {error.strerror}; give another --output") from None
