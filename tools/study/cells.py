"""Expands a study into its cells; each is one call of train.py."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.cli import as_option, parse
from src.config import Config, Study
from src.errors import UserError

STUDY_KEYS = (
    "runtime.seed", "data.train_images", "training.epochs", "training.epoch_steps",
    "evaluation.every",
)  # fmt: skip
_NAME = re.compile(r"[\w+.-]*\w[\w+.-]*", re.ASCII)


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        model, train_images, seed: its place in the grid.
        arguments: those of train.py, without --output.
        config: the configuration that these arguments give.
    """

    model: str
    train_images: int
    seed: int
    arguments: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        """Name of its folder: model, training images, seed."""
        return f"{self.model}-{self.train_images}-{self.seed}"

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.training.epochs * self.config.training.epoch_steps


def expand_study(study: Study, file: Path, options: Sequence[str] = ()) -> list[Cell]:
    """Return all cells, seed by seed, so that an unfinished study covers every model and size.

    Args:
        study: the grid.
        file: its file; `study.recipe` is relative to it.
        options: `--key=value` of a recipe, for all cells; they override the study's.

    Raises:
        UserError: the grid or a key is invalid.
    """
    budgets = _check_grid(study, file)
    recipe = Path(os.path.normpath(file.parent / study.recipe))
    if not recipe.is_file():
        raise UserError(f"{file}: recipe {study.recipe}: no such file relative to the study's")
    _refuse_study_keys([option[2:].partition("=")[0] for option in options], "the command line")
    variants = {}
    for model, changes in study.models.items():
        where = f"{file}: models.{model}"
        arguments = [
            f"--config={recipe}",
            *_to_options(study.settings, f"{file}: settings"),
            *_to_options(changes, where),
            *options,
        ]
        try:
            config, _ = parse(arguments, "", "", lambda parser: None)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        variants[model] = arguments, config
    every = study.evaluate_every
    cells = []
    for seed, images, model in itertools.product(study.seeds, study.train_images, variants):
        arguments, config = variants[model]
        config = copy.deepcopy(config)
        values = dict(zip(STUDY_KEYS, (seed, images, budgets[images] // every, every, 1)))
        for key, value in values.items():
            group, name = key.split(".")
            setattr(getattr(config, group), name, value)
        own = (as_option(key, value) for key, value in values.items())
        cells.append(Cell(model, images, seed, (*arguments, *own), config))
    return cells


def _check_grid(study: Study, file: Path) -> dict[int, int]:
    """Check a study's grid; returns the steps for each number of training images."""
    for key in ("models", "train_images", "seeds"):
        values = list(getattr(study, key))
        if not values:
            raise UserError(f"{file}: {key}: is empty; give at least one")
        if len(set(values)) < len(values):
            raise UserError(f"{file}: {key} {values}: contains a value twice")
    for name in study.models:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{file}: models: {name!r} names a folder; use letters, digits, and any of _+.-"
            )
    steps, sizes = study.steps, study.train_images
    steps = list(steps) if isinstance(steps, list) else [steps] * len(sizes)
    if len(steps) != len(sizes):
        raise UserError(
            f"{file}: steps {steps}: give one number, or one for each of train_images {sizes}"
        )
    for count in steps:
        if count % study.evaluate_every:
            raise UserError(
                f"{file}: steps {count}: not a multiple of evaluate_every {study.evaluate_every}"
            )
    return dict(zip(sizes, steps))


def _to_options(groups: dict[str, dict], where: str) -> list[str]:
    keys = {
        f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()
    }
    _refuse_study_keys(keys, where)
    return [as_option(key, value) for key, value in keys.items()]


def _refuse_study_keys(keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key in STUDY_KEYS:
            raise UserError(
                f"{where}: {key} follows from the study's seeds, train_images, steps and "
                "evaluate_every; set those"
            )
