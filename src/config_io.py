"""Reads and writes configurations: YAML recipes, options and a run's config.yaml.

Unknown keys and values of a wrong type are rejected.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import Namespace

from src.config import Config, DataConfig, RuntimeOnly
from src.config_parser import ConfigParser
from src.errors import UserError, shorten
from src.files import write_text
from src.hints import nearest_key
from src.yaml_reader import MAX_BYTES, read_yaml

CONFIG = "config.yaml"  # in a run's folder
_HEADER = "# Written by train.py"  # first line of a run's config.yaml
_END = "# End"  # last line; earlier versions end with a checksum, also a comment


def run_config_of(checkpoint: str) -> Path | None:
    """Return the config.yaml of a checkpoint's or folder's run: beside it, or one level above.

    If the checkpoint is a link, as in the caches of Hugging Face and DVC, the link's place counts
    first.
    """
    for place in (Path(os.path.abspath(checkpoint)), Path(checkpoint).resolve()):
        folder = place if place.is_dir() else place.parent
        for file in (folder / CONFIG, folder.parent / CONFIG):
            if file.is_file():
                return file
    return None


def is_run_config(path: Path) -> bool:
    """Return whether `save_config` wrote the file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().startswith(_HEADER)
    except OSError:
        return False


# last.ckpt: of a run before its first evaluation.
_WEIGHTS = (
    "checkpoints/best.ckpt", "best.ckpt", "model.safetensors", "checkpoints/last.ckpt",
)  # fmt: skip


def find_checkpoint(place: Path) -> Path:
    """Return the best weights in a run's or pretrained network's folder; other paths unchanged."""
    if place.is_dir():
        for file in (place / name for name in _WEIGHTS):
            if file.is_file():
                return file
    return place


def default_output(recipe: str) -> str:
    """Return the default folder of a recipe's run."""
    path = Path(recipe)
    return f"runs/{path.resolve().parent.name}_{path.stem}"


def load_config(path: Path) -> Config:
    """Read a configuration file without command-line options.

    Raises:
        UserError: the file, a key or a value is invalid.
    """
    parser = ConfigParser(allow_abbrev=False)
    add_keys(parser, Config)
    config, _ = read_settings(parser, [], Config, path)
    return config


def parse_runtime(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Check some keys of the group `runtime` as those of a command line are.

    Raises:
        UserError: a key or value is invalid.
    """
    parser = ConfigParser(allow_abbrev=False)
    add_keys(parser, RuntimeOnly)
    words = (
        value if isinstance(value, str) else json.dumps(value, default=repr)
        for value in keys.values()
    )
    options = [f"--runtime.{key}={word}" for key, word in zip(keys, words)]
    settings, _ = read_settings(parser, options, RuntimeOnly, None)
    return {key: getattr(settings.runtime, key) for key in keys}


def save_config(config: Config, path: Path) -> None:
    """Write every key of a resolved configuration as YAML that `load_config` reads back."""
    plain = dataclasses.asdict(config, dict_factory=_plain)
    text = yaml.dump(plain, Dumper=_Quoting, sort_keys=False, allow_unicode=True)
    write_text(f"{_HEADER}\n{text}{_END}\n", path)


def add_keys(parser: ConfigParser, schema: type) -> None:
    """Add --config and a dotted option for each key of the schema to a parser."""
    parser.add_argument("--config", action="config", help="YAML recipe; options override its keys")
    parser.add_class_arguments(schema, as_group=False)
    keys = dataclasses.fields(schema)
    parser.mappings = frozenset(k.name for k in keys if get_origin(k.type) is dict)
    for action in parser._actions:
        if action.dest in parser.key_groups():
            action.help = SUPPRESS  # `read` refuses it


def read_settings(
    parser: ConfigParser, argv: Sequence[str], schema: type, file: Path | None
) -> tuple[Any, Namespace]:
    """Fill a schema from a YAML file and options, which override the file.

    Args:
        parser: has the schema's keys (`add_keys`).
        argv: options, without --config.
        schema: the dataclass to fill.
        file: the YAML file, or None.

    Returns:
        The filled schema, and the parser's other arguments.

    Raises:
        UserError: the file, a key or a value is invalid.
    """
    keys = None if file is None else _read_file(file, schema, argv)
    namespace = parser.read(argv, keys)
    values = {
        key.name: key.type(**vars(namespace.pop(key.name) or Namespace()))
        if dataclasses.is_dataclass(key.type)
        else namespace.pop(key.name)
        for key in dataclasses.fields(schema)
    }
    return _expand_paths(schema(**values)), namespace


def _read_file(file: Path, schema: type, argv: Sequence[str]) -> Namespace:
    """Return the keys of a configuration file; those that the schema requires may be options.

    jsonargparse does not open the file: it would decode it as the locale says, and change to its
    folder, which moves the relative paths of other threads.
    """
    content = _read_mapping(file, schema)
    parser = ConfigParser(allow_abbrev=False)
    add_keys(parser, schema)
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    for action in parser._actions:
        action.required = action.required and action.dest not in given
    try:
        return parser.parse_object(content, defaults=False)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _expand_paths(settings: Any) -> Any:
    """Expand a leading ~ in every key that the schema marks as a path."""
    for key in dataclasses.fields(settings):
        value = getattr(settings, key.name)
        if dataclasses.is_dataclass(value):
            _expand_paths(value)
        elif key.metadata.get("path") and value is not None:
            if "\0" in value:
                raise UserError(
                    f"{key.name} {shorten(value)}: a path cannot contain a zero byte; change it"
                )
            if not value:
                raise UserError(f"{key.name}: is empty; give a path, or leave out the key")
            setattr(settings, key.name, os.path.expanduser(value))
    return settings


def _read_mapping(path: Path, schema: type) -> dict:
    """Read a file once, as it may be a pipe.

    Rejects files and groups that are not mappings, which the parser would accept.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        reason = getattr(error, "strerror", error)
        raise UserError(f"--config {path}: {reason}; give a YAML file") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"--config {path}: has more than {MAX_BYTES >> 20} MiB; not a recipe")
    try:
        text = raw.decode()
        content = read_yaml(text)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: a number with too many digits
        reason = shorten(" ".join(str(error).split()), 200)
        raise UserError(f"--config {path}: invalid YAML: {reason}") from None
    # The last line that save_config writes is a comment; lines that a user added may follow.
    if text.startswith(_HEADER) and not re.search("^# ", text[1:], re.M):
        raise UserError(f"--config {path}: truncated, its last line is missing; restore the file")
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path}: expected keys and values, found {type(content).__name__}"
        )
    for group in dataclasses.fields(schema):
        keys = content.get(group.name)
        if keys is None or not dataclasses.is_dataclass(group.type):
            continue
        if not isinstance(keys, dict):
            raise UserError(f"--config {path}: {group.name} is a group of keys, not a value")
        apart = next((key for key in content if str(key).startswith(f"{group.name}.")), None)
        if apart is not None:  # the parser would keep one of the two
            raise UserError(
                f"--config {path}: {apart} is outside its group; move it into the group"
            )
    groups, dotted = [key.name for key in dataclasses.fields(schema)], _dotted_keys(schema)
    for key, value in content.items():
        # The parser would take options here too, such as eval.py's --json: files to overwrite.
        if key not in groups and key not in dotted:
            name = f"{key}.{next(iter(value))}" if isinstance(value, dict) and value else str(key)
            near = nearest_key(name, dotted)
            hint = f"did you mean {near}? " if near else ""
            is_foreign = path.name == CONFIG and not text.startswith(_HEADER)
            raise UserError(
                f"{path}: unknown key {shorten(name)}: {hint}a recipe has the groups "
                f"{', '.join(groups)}"
                + "; if the file is another program's, give a recipe with --config"
                * is_foreign
            )
    given = dict(content)
    for group, keys in content.items():
        if isinstance(keys, dict):
            given.update((f"{group}.{key}", value) for key, value in keys.items())
    single = [key.name for key in dataclasses.fields(schema) if not _takes_null(key.type)]
    for key in (*single, *_dotted_keys(schema, required=True)):  # the parser overlooks null
        if key in given and given[key] is None:
            raise UserError(f"--config {path}: {key} is null; give a value, or remove the key")
    groups = [content, *(group for group in content.values() if isinstance(group, dict))]
    for key, value in (item for group in groups for item in group.items()):
        is_long = str(key).rpartition(".")[2] in _LONG_LISTS
        if isinstance(value, list) and len(value) > _MAX_VALUES and not is_long:
            raise UserError(
                f"--config {path}: {shorten(key)} has {len(value):,} values; give at most "
                f"{_MAX_VALUES}"
            )
    return content


def require_outside_images(config: Config, output: Path) -> None:
    """Check that a run's folder is not among the images, where it would become a class.

    Raises:
        UserError: it is.
    """
    data = config.data
    if data.source != "imagefolder" or data.path is None:
        return
    for name in (data.train_folder, *[data.val_folder] * (not data.val_from_train)):
        images = Path(os.path.realpath(Path(os.path.expanduser(data.path)) / name))
        run = Path(os.path.realpath(output))
        if run == images or images in run.parents:
            raise UserError(
                f"--output {output}: lies among the images of {images}, where it would become a "
                "class; give a folder outside"
            )


def _dotted_keys(schema: type, required: bool = False) -> list[str]:
    """Return the keys of a schema's groups as "model.name": all, or those that can't be null."""
    return [
        f"{group.name}.{key.name}"
        for group in dataclasses.fields(schema)
        if dataclasses.is_dataclass(group.type)
        for key in dataclasses.fields(group.type)
        if not (required and _takes_null(key.type))
    ]


def _takes_null(kind: Any) -> bool:
    """Return whether a key of this type may be null; a group of keys may be empty."""
    return type(None) in get_args(kind) or dataclasses.is_dataclass(kind)


_MAX_VALUES = 1000  # jsonargparse takes time in proportion to the square of a list's length
_LONG_LISTS = {key.name for key in dataclasses.fields(DataConfig) if "ClassNames" in str(key.type)}


class _Quoting(yaml.SafeDumper):
    """Quotes every string, because YAML readers disagree on a bare 1e5."""


_Quoting.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def _plain(items: list[tuple[str, Any]]) -> dict:
    """Convert values to YAML's own types, without the subclasses that have a range."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        for kind in (bool, int, float):
            if isinstance(value, kind):
                return kind(value)
        return value

    return {key: plain(value) for key, value in items}
