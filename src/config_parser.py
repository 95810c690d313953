"""The command line's parser: jsonargparse's, with one-line error messages."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

from src.config import Config
from src.errors import UserError, shorten
from src.hints import nearest_key
from src.yaml_reader import read_yaml

_read_yaml = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """Load YAML with the numbers of `read_yaml`; jsonargparse knows what is plain text.

    jsonargparse reads 010 as 8, and libyaml rejects the escapes of paths that are not UTF-8. A
    value that is a comment to YAML is a name, such as that of a folder.
    """
    if re.fullmatch(r"\s*#.*", text):
        return text
    try:
        value = _read_yaml(text)
    except yaml.scanner.ScannerError:
        return read_yaml(text)
    return value if isinstance(value, str) else read_yaml(text)


set_loader("yaml", _load_yaml, (yaml.YAMLError,))


class ConfigParser(ArgumentParser):
    """jsonargparse's parser with one-line error messages.

    Attributes:
        mappings: options whose values are mappings, with keys that may be options too.
    """

    mappings: frozenset[str] = frozenset()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        groups, names = self.key_groups(), [action.dest for action in self._actions]
        raise UserError(_simplify(message, [name for name in names if name not in groups]))

    def key_groups(self) -> set[str]:
        """Return the groups of dotted keys; jsonargparse makes each an option that reads a file."""
        return {action.dest.partition(".")[0] for action in self._actions if "." in action.dest}

    def read(self, argv: Sequence[str], keys: Namespace | None = None) -> Namespace:
        """Parse a command line.

        Args:
            argv: the words.
            keys: values of keys that the command line may override.

        Raises:
            UserError: an option or a value is invalid.
        """
        groups = self.key_groups()
        single = {action.dest for action in self._actions} - groups - self.mappings
        for word in argv:
            option = word.partition("=")[0]
            names = itertools.accumulate(option[2:].split(".")[:-1], "{}.{}".format)
            if option.startswith("--") and not single.isdisjoint(names):
                self.error(f"unrecognized arguments: {option}")  # jsonargparse sets a part of it
            if option.startswith("--") and option.endswith("+"):
                raise UserError(f"{shorten(option)}: cannot append; give the whole list")
            if option.startswith("--") and option[2:] in groups:
                self.error(f"unrecognized arguments: {option}")
        try:
            return self.parse_args(list(argv), keys)
        except RecursionError:
            raise UserError("the command line: a value is nested too deep") from None


_UNKNOWN_KEY = (
    re.compile(r"unrecognized arguments: --?(?P<key>[A-Za-z][\w.-]*)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>[\w.]+)'"),
    re.compile(r"(?:Option|Key) '(?P<key>[\w.]+)' is not (?:accepted|expected)"),
)


def _is_of_recipe(key: str) -> bool:
    group, _, name = key.partition(".")
    return hasattr(getattr(Config(), group, None), name) if name else False


def _simplify(message: str, known: Sequence[str]) -> str:
    message = " ".join(message.split())
    for pattern in _UNKNOWN_KEY:
        found = pattern.search(message)
        if found:
            key = ".".join(part for part in found.groups() if part)
            if "config" in known and _is_of_recipe(key):
                return (
                    f"{key}: is a key of recipes; set it there, and give the recipe with --config"
                )
            near = nearest_key(key, known)
            hint = f"did you mean {near}? " if near else ""
            return f"unknown key {shorten(key)}: {hint}--help lists every key"
    message = re.sub(r'Parser key "([^"]+)":', r"\1:", message)
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("typing.", "")
    union = re.match(r"(\S+) Does not .*Subtypes: \[(.*)\] Errors: .*Given value: (.*)", message)
    names = re.match(r"(\S+) Does not .* Not of type ClassNames: (.*?) - Expected a", message)
    if names and union:
        message = f"{names[1]} {names[2]}. Got value: {shorten(union[3])}"
    elif union:
        message = f"{union[1]} Expected one of {union[2]}. Got value: {shorten(union[3])}"
    return shorten(message, 600)
