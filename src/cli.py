"""Parses the command lines of the executables."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from src.config import Config, Study
from src.config_io import CONFIG, add_keys, read_settings, run_config_of
from src.config_parser import ConfigParser
from src.errors import UserError


def parse(
    argv: Sequence[str],
    prog: str,
    description: str,
    add_arguments: Callable[[ArgumentParser], Any],
    schema: type | None = Config,
    config_beside: str | None = None,
) -> tuple[Any, Namespace]:
    """Parse a command line into a configuration and the command's own arguments.

    Args:
        argv: arguments without the program's name.
        prog, description: for --help.
        add_arguments: adds the command's own arguments to the parser.
        schema: the dataclass of the command's keys; only Config and Study are filled from the
            recipe. None for a command without keys and without --config.
        config_beside: name of the argument for a checkpoint or a run's folder; the run's
            config.yaml is used if --config is missing.

    Returns:
        The configuration, and the command's own arguments with `given`: the keys that are on the
        command line, as opposed to those of the recipe and the defaults.

    Raises:
        UserError: a key, value or file is invalid.
    """
    words = "[--config FILE] [--key value ...]" if schema else "[--option ...]"
    usage = f"python {prog} {words}"
    parser = ConfigParser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    if schema is None:
        add_arguments(parser)
        return None, _expand_arguments(parser.read(argv))
    add_keys(parser, schema)
    add_arguments(parser)
    if sum(word.partition("=")[0] == "--config" for word in argv) > 1:
        raise UserError("--config: is given twice; give one file, and options for other values")
    argv, config = take_option(list(argv), "--config")
    if config == "":
        raise UserError("--config: is empty (an unset shell variable?); give a file")
    is_of_run = config is None and config_beside is not None
    if is_of_run:
        _, checkpoint = take_option(argv, f"--{config_beside}")
        checkpoint = checkpoint and os.path.expanduser(checkpoint)
        if checkpoint and not Path(checkpoint).exists():
            raise UserError(f"--{config_beside} {checkpoint}: no such file; give a checkpoint")
        config = run_config_of(checkpoint) if checkpoint else None
    config = os.path.expanduser(config) if isinstance(config, str) else config
    file = Path(config) if config is not None and schema in (Config, Study) else None
    settings, arguments = read_settings(parser, argv, schema, file)
    arguments.config = config
    if schema is not Study:  # its required keys may be in the file alone
        arguments.given = set(parser.parse_args(argv, defaults=False).keys())
    is_resumed = config_beside == "output"
    if is_of_run and not is_resumed and "runtime.device_id" not in arguments.given:
        settings.runtime.device_id = None  # which card trained the run says nothing about this host
    return settings, _expand_arguments(arguments)


def require_recipe(checkpoint: str | Path, config: str | None) -> None:
    """Check that weights have a recipe.

    Raises:
        UserError: neither a recipe nor a run's config.yaml was found, or the file is no weight file
            but an exported one.
    """
    if Path(checkpoint).suffix in (".mindir", ".onnx", ".air"):
        raise UserError(
            f"{checkpoint}: is an exported file, which infer.py runs; give the weights that it was "
            "exported from"
        )
    if config is None:
        raise UserError(
            f"{checkpoint}: no config.yaml beside it; give its recipe with --config, such as "
            "config/imagenet/cvt_13_224.yaml"
        )


def require_free_port(port: int, option: str = "--port ", address: str = "127.0.0.1") -> None:
    """Check that a program of this host can listen on a port.

    Args:
        port: the port.
        option: its option or variable, as the user types it before the number.
        address: of the network interface; "" for all.

    Raises:
        UserError: it can't.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((address, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "must be 1 to 65535"
            raise UserError(f"{option}{port}: {reason}; give another one") from None


def _expand_arguments(arguments: Namespace) -> Namespace:
    """Expand a leading ~ in a command's own arguments; all their strings but choices are paths."""
    for name, value in vars(arguments).items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise UserError(f"--{name}: is empty (an unset shell variable?); give a value")
        if isinstance(value, str):
            setattr(arguments, name, os.path.expanduser(value))
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            setattr(arguments, name, [os.path.expanduser(item) for item in value])
    return arguments


def take_option(argv: list[str], name: str) -> tuple[list[str], str | None]:
    """Remove an option from a command line; returns the other words and its last value."""
    rest, value = [], None
    words = iter(argv)
    for word in words:
        if word == name:
            value = next(words, None)
            if value is None:
                raise UserError(f"{name}: expected a value after it")
        elif word.startswith(f"{name}="):
            value = word[len(name) + 1 :]
        else:
            rest.append(word)
    return rest, value


def find_resumed_run(
    argv: Sequence[str], is_first: bool = True
) -> tuple[Path | bool | None, list[str]]:
    """Find the run that --resume continues.

    Args:
        argv: the words.
        is_first: of the first rank or host, which alone reads the state; the others need not have
            the run's folder.

    Returns:
        The file or folder given with --resume, False if none is given, None without --resume; and
        the arguments, with --output for the run of that file or folder.

    Raises:
        UserError: the file, folder or run does not exist, or the folder is not that of --output.
    """
    argv = list(argv)
    state: Path | bool | None = None
    for word, following in zip(argv, [*argv[1:], "--"]):
        name, _, value = word.partition("=")
        if name == "--resume":
            value = value or ("" if following.startswith("--") else following)
            state = Path(os.path.expanduser(value)) if value else False
    rest, output = take_option(argv, "--output")
    if state and not state.exists():
        if is_first:
            raise UserError(
                f"--resume {state}: no such file; a run's states are in its checkpoints folder"
            )
        folder = state.parent if state.suffix == ".ckpt" else state
        run = folder.parent if folder.name == "checkpoints" else folder
        return state, argv if output else [*argv, "--output", str(run)]
    if state is None or (output is None and not state):
        return state, argv
    run = run_config_of(os.path.expanduser(output or state))
    is_folder = bool(state) and state.is_dir()
    if run is None and (is_folder or take_option(rest, "--config")[1] is None):
        where = f"--output {output}" if output else f"--resume {state}"
        remedy = "give its folder"
        if output and state and not is_folder:
            own = run_config_of(state)
            remedy = f"to continue the state there, add --config {own or 'of its run'}"
        raise UserError(f"{where}: no run there to resume (no {CONFIG}); {remedy}")
    if is_folder and run_config_of(str(state)) != run:
        raise UserError(
            f"--resume {state}: not the run in --output {output}; leave out --output, or give one "
            "of its states and its --config, to continue it in another folder"
        )
    return state, argv if output or run is None else [*argv, "--output", str(run.parent)]


def take_keys(argv: list[str]) -> tuple[list[str], list[str]]:
    """Remove a recipe's dotted options, `--data.path FOLDER` or `--data.path=FOLDER`.

    Returns:
        The other words, and the options as one word each.
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
                raise UserError(f"{word}: expected a value after it")
            keys.append(f"{word}={value}")
    return rest, keys


def as_option(key: str, value: Any) -> str:
    """Format a key and its value, of YAML's types, as one word of a command line."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"--{key}={text}"
