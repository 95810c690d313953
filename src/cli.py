"""Parses the command lines of the executables."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from src.config import Config, Study
from src.config_io import ConfigParser, add_keys, read_settings, run_config_of
from src.errors import UserError


def parse(
    argv: Sequence[str],
    prog: str,
    description: str,
    add_arguments: Callable[[ArgumentParser], Any],
    schema: type | None = Config,
    config_beside: str | None = None,
) -> tuple[Any, Namespace]:
    """Read a command line into a filled schema and the command's own arguments.

    Args:
        argv: arguments without the program's name.
        prog, description: for --help.
        add_arguments: adds the command's own arguments to the parser.
        schema: the dataclass of keys that the command takes; only a whole Config and a Study are
            filled from the recipe. None for a command without keys, which takes no --config either.
        config_beside: name of the argument that holds a checkpoint or a run's folder; the run's
            config.yaml stands in where --config is missing.

    Raises:
        UserError: a key, value or file that can't be used.
    """
    words = "[--config FILE] [--key value ...]" if schema else "[--option ...]"
    usage = f"python {prog} {words}"
    parser = ConfigParser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    if schema is None:
        add_arguments(parser)
        return None, _expand_arguments(parser.read(argv))
    add_keys(parser, schema)
    add_arguments(parser)
    argv, config = take_option(list(argv), "--config")
    if config is None and config_beside:
        _, checkpoint = take_option(argv, f"--{config_beside}")
        checkpoint = checkpoint and os.path.expanduser(checkpoint)
        if checkpoint and not Path(checkpoint).exists():
            raise UserError(f"--{config_beside} {checkpoint}: no such file; give a checkpoint")
        config = run_config_of(checkpoint) if checkpoint else None
    config = os.path.expanduser(config) if isinstance(config, str) else config
    file = Path(config) if config is not None and schema in (Config, Study) else None
    settings, arguments = read_settings(parser, argv, schema, file)
    arguments.config = config
    return settings, _expand_arguments(arguments)


def _expand_arguments(arguments: Namespace) -> Namespace:
    """The same in a command's own arguments: of those that are texts, all but choices are paths."""
    for name, value in vars(arguments).items():
        if isinstance(value, str):
            setattr(arguments, name, os.path.expanduser(value))
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            setattr(arguments, name, [os.path.expanduser(item) for item in value])
    return arguments


def take_option(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """Split an option and its last value off a command line."""
    rest, value = [], None
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name}: expected a value behind it")
        elif word.startswith(f"{name}="):
            value = word[len(name) + 1 :]
        else:
            rest.append(word)
    return rest, value


def take_keys(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a recipe's dotted options, `--data.path FOLDER` or `--data.path=FOLDER`, off.

    Returns:
        The other words, and the options, each as one word.
    """
    groups = tuple(f"--{group.name}." for group in dataclasses.fields(Config))
    rest, keys = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith(groups):
            rest.append(word)
        elif "=" in word:
            keys.append(word)
        else:
            value = next(words, None)
            if value is None:
                raise UserError(f"{word}: expected a value behind it")
            keys.append(f"{word}={value}")
    return rest, keys


def as_option(key: str, value: Any) -> str:
    """A key and its value, of YAML's types, as one word of a command line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"--{key}={text}"
