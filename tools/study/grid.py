"""The cells of a study: each is one call of train.py."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.cli import as_option, parse
from src.config import Config, Study
from src.errors import UserError

OWN_KEYS = (
    "runtime.seed", "data.train_images", "training.epochs", "training.epoch_steps",
    "evaluation.every",
)  # fmt: skip
_NAME = re.compile(r"[\w+.-]*\w[\w+.-]*", re.ASCII)


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    `words` are train.py's arguments without --output, `config` is what they say.
    """

    model: str
    train_images: int
    seed: int
    words: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        """Of its folder: model, training images, seed."""
        return f"{self.model}-{self.train_images}-{self.seed}"

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config.training.epochs * self.config.training.epoch_steps


def cells_of(study: Study, file: Path, options: Sequence[str] = ()) -> list[Cell]:
    """All cells, seed by seed, so that an unfinished study has some of every model and size.

    Args:
        study: the grid.
        file: it was read from; its `recipe` is relative to it.
        options: `--key=value` of a recipe, for all cells; they override the study's.

    Raises:
        UserError: a study that makes no grid, or keys that make no recipe.
    """
    budgets = _check(study, file)
    recipe = Path(os.path.normpath(file.parent / study.recipe))
    if not recipe.is_file():
        raise UserError(f"{file}: recipe {study.recipe}: no such file, seen from the study's")
    _refuse_own_keys([option[2:].partition("=")[0] for option in options], "the command line")
    variants = {}
    for model, changes in study.models.items():
        where = f"{file}: models.{model}"
        words = [
            f"--config={recipe}",
            *_options(study.settings, f"{file}: settings"),
            *_options(changes, where),
            *options,
        ]
        try:
            variants[model] = words, parse(words, "", "", lambda parser: None)[0]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return [
        _cell(model, images, seed, *variants[model], budgets[images], study.evaluate_every)
        for seed, images, model in itertools.product(study.seeds, study.train_images, variants)
    ]


def _cell(
    model: str, images: int, seed: int, words: list[str], config: Config, steps: int, every: int
) -> Cell:
    own = dict(zip(OWN_KEYS, (seed, images, steps // every, every, 1)))
    groups: dict[str, dict] = {}
    for key, value in own.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    config = dataclasses.replace(
        config,
        **{
            group: dataclasses.replace(getattr(config, group), **keys)
            for group, keys in groups.items()
        },
    )
    words = [*words, *(as_option(key, value) for key, value in own.items())]
    return Cell(model, images, seed, tuple(words), config)


def _check(study: Study, file: Path) -> dict[int, int]:
    """The steps for each number of training images."""
    for key in ("models", "train_images", "seeds"):
        values = list(getattr(study, key))
        if not values:
            raise UserError(f"{file}: {key}: is empty; give at least one")
        if len(set(values)) < len(values):
            raise UserError(f"{file}: {key} {values}: names one twice")
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
                f"{file}: steps {count}: is no multiple of evaluate_every {study.evaluate_every}"
            )
    return dict(zip(sizes, steps))


def _options(groups: dict[str, dict], where: str) -> list[str]:
    keys = {
        f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()
    }
    _refuse_own_keys(keys, where)
    return [as_option(key, value) for key, value in keys.items()]


def _refuse_own_keys(keys: Iterable[str], where: str) -> None:
    for key in keys:
        if key in OWN_KEYS:
            raise UserError(
                f"{where}: {key} follows from the study's seeds, train_images, steps and "
                "evaluate_every; set those"
            )
