"""The only room for YAML and argv: recipes and options in, a filled schema out, and back.

A recipe in config/ sets keys, dotted options (`--optimizer.lr 1e-3`) override them, whatever their
order on the command line. Nothing unknown and nothing of a wrong type passes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from src.config import Config, DataConfig, Study
from src.errors import UserError, shown
from src.files import write_text
from src.hints import nearest_key
from src.yaml_text import MOST_BYTES, read_yaml

CONFIG = "config.yaml"  # in a run's folder

_read_yaml = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """YAML as jsonargparse reads it; its libyaml refuses the escapes of paths that are no UTF-8."""
    try:
        return _read_yaml(text)
    except yaml.scanner.ScannerError:
        return yaml.safe_load(text)


set_loader("yaml", _load_yaml, (yaml.YAMLError,))


class _Parser(ArgumentParser):
    """jsonargparse's parser, its complaints turned into one line of ours."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_one_line(message, [action.dest for action in self._actions]))


_UNKNOWN_KEY = (
    re.compile(r"unrecognized arguments: --?(?P<key>[A-Za-z][\w.-]*)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"(?:Option|Key) '(?P<key>[\w.]+)' is not (?:accepted|expected)"),
)


def _one_line(message: str, known: Sequence[str]) -> str:
    message = " ".join(message.split())
    for pattern in _UNKNOWN_KEY:
        found = pattern.search(message)
        if found:
            key = ".".join(part for part in found.groups() if part)
            near = nearest_key(key, known)
            hint = f"did you mean {near}? " if near else ""
            return f"unknown key {shown(key)}: {hint}--help lists every key"
    message = re.sub(r'Parser key "([^"]+)":', r"\1:", message)
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("typing.", "")
    union = re.match(r"(\S+) Does not .*Subtypes: \[(.*)\] Errors: .*Given value: (.*)", message)
    names = re.match(r"(\S+) Does not .* Not of type ClassNames: (.*?) - Expected a", message)
    if names:
        message = f"{names[1]} {names[2]}. Got value: {shown(union[3])}"
    elif union:
        message = f"{union[1]} Expected one of {union[2]}. Got value: {shown(union[3])}"
    return shown(message, 600)


def run_config_of(checkpoint: str) -> Path | None:
    """The config.yaml of the run that a checkpoint, or a folder, is of: beside it, or above."""
    place = Path(checkpoint).resolve()
    folder = place if place.is_dir() else place.parent
    return next((p for p in (folder / CONFIG, folder.parent / CONFIG) if p.is_file()), None)


def is_run_config(path: Path) -> bool:
    """Whether `save_config` wrote a file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline() == _GUARD
    except OSError:
        return False


def find_checkpoint(place: Path) -> Path:
    """The best weights of a run where its folder is given; any other path as it is."""
    if place.is_dir():
        for file in (place / "checkpoints/best.ckpt", place / "best.ckpt"):
            if file.is_file():
                return file
    return place


def default_output(recipe: str) -> str:
    """The folder of a recipe's run where none is given."""
    path = Path(recipe)
    return f"runs/{path.resolve().parent.name}_{path.stem}"


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
    parser = _Parser(prog=prog, usage=usage, description=description, allow_abbrev=False)
    if schema is None:
        add_arguments(parser)
        return None, _expand_arguments(_parse(parser, argv))
    parser.add_argument("--config", action="config", help="YAML recipe; options override its keys")
    add_arguments(parser)
    parser.add_class_arguments(schema, as_group=False)
    argv, config = take_option(list(argv), "--config")
    if config is None and config_beside:
        _, checkpoint = take_option(argv, f"--{config_beside}")
        checkpoint = checkpoint and os.path.expanduser(checkpoint)
        if checkpoint and not Path(checkpoint).exists():
            raise UserError(f"--{config_beside} {checkpoint}: no such file; give a checkpoint")
        config = run_config_of(checkpoint) if checkpoint else None
    config = os.path.expanduser(config) if isinstance(config, str) else config
    if config is not None and schema in (Config, Study):
        _check_mapping(Path(config), schema)
        argv = ["--config", str(config), *argv]
    namespace = _parse(parser, argv)
    values = {
        key.name: key.type(**vars(namespace.pop(key.name)))
        if dataclasses.is_dataclass(key.type)
        else namespace.pop(key.name)
        for key in dataclasses.fields(schema)
    }
    settings = _expand_keys(schema(**values))
    namespace.config = config
    return settings, _expand_arguments(namespace)


def _parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    try:
        return parser.parse_args(list(argv))
    except RecursionError:
        raise UserError("the command line: a value is nested too deep") from None


def _expand_keys(settings: Any) -> Any:
    """Put the user's home folder for a leading ~ in every key that the schema marks as a path."""
    for key in dataclasses.fields(settings):
        value = getattr(settings, key.name)
        if dataclasses.is_dataclass(value):
            _expand_keys(value)
        elif key.metadata.get("path") and value is not None:
            if "\0" in value:
                raise UserError(f"{key.name} {shown(value)}: no path holds a zero byte; change it")
            setattr(settings, key.name, os.path.expanduser(value))
    return settings


def _expand_arguments(arguments: Namespace) -> Namespace:
    """The same in a command's own arguments: of those that are texts, all but choices are paths."""
    for name, value in vars(arguments).items():
        if isinstance(value, str):
            setattr(arguments, name, os.path.expanduser(value))
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            setattr(arguments, name, [os.path.expanduser(item) for item in value])
    return arguments


def load_config(path: Path) -> Config:
    """Read a resolved configuration that `save_config` wrote."""
    config, _ = parse(["--config", str(path)], "", "", lambda parser: None)
    return config


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


def _check_mapping(path: Path, schema: type) -> None:
    """Refuse what the parser takes in silence: a file or a group that is no mapping."""
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise UserError(f"--config {path}: has more than {MOST_BYTES >> 20} MiB; is no recipe")
        text = path.read_text(encoding="utf-8")
        content = read_yaml(text)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a YAML file") from None
    except (ValueError, yaml.YAMLError) as error:  # ValueError: also of a date that is none
        reason = shown(" ".join(str(error).split()), 200)
        raise UserError(f"--config {path}: no valid YAML: {reason}") from None
    _check_guard(path, text)
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path}: expected keys and values, found {type(content).__name__}"
        )
    for group in dataclasses.fields(schema):
        if dataclasses.is_dataclass(group.type) and not isinstance(
            content.get(group.name, {}), dict
        ):
            raise UserError(f"--config {path}: {group.name} is a group of keys, not a value")
    groups = [content, *(group for group in content.values() if isinstance(group, dict))]
    for key, value in (item for group in groups for item in group.items()):
        if isinstance(value, list) and len(value) > _MOST_VALUES and key not in _LONG_LISTS:
            raise UserError(
                f"--config {path}: {shown(key)} has {len(value):,} values; at most {_MOST_VALUES} "
                "are read"
            )


_MOST_VALUES = 1000  # jsonargparse takes time in proportion to the square of a list's length
_LONG_LISTS = {key.name for key in dataclasses.fields(DataConfig) if "ClassNames" in str(key.type)}


def save_config(config: Config, path: Path) -> None:
    """Write every key of a resolved configuration as YAML that `parse` reads back."""
    plain = dataclasses.asdict(config, dict_factory=_plain)
    text = yaml.dump(plain, Dumper=_Quoting, sort_keys=False, allow_unicode=True)
    write_text(_guarded(_GUARD + text), path)


def _guarded(text: str) -> str:
    return f"{text}{_SUM}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _check_guard(path: Path, text: str) -> None:
    """Refuse a file of a run that is not as the run wrote it; a recipe has no such lines."""
    lines = text.splitlines(keepends=True) or [""]
    if lines[0] != _GUARD and not lines[-1].startswith(_SUM):
        return
    if _guarded("".join(lines[:-1])) != text or lines[0] != _GUARD:
        raise UserError(
            f"--config {path}: damaged, or changed since the run wrote it; restore it, or remove "
            "its first and last line if the change is yours"
        )


_GUARD = "# Written by train.py. The last line is a checksum; to change a key, remove both lines.\n"
_SUM = "# sha256 "


class _Quoting(yaml.SafeDumper):
    """Quotes every text: readers of YAML disagree on whether a bare 1e5 is one."""


_Quoting.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def _plain(items: list[tuple[str, Any]]) -> dict:
    """Values as YAML's own types, without the subclasses that carry a range."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        for kind in (bool, int, float):
            if isinstance(value, kind):
                return kind(value)
        return value

    return {key: plain(value) for key, value in items}
