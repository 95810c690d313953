"""Reads untrusted YAML with limits on nesting and size."""

from __future__ import annotations

import re
from typing import Any

import yaml

from src.errors import shorten

# ImageNet-22k's 21,841 class names are half a MiB.
MAX_BYTES, MAX_DEPTH = 4 << 20, 20
_SCALARS = {  # those of YAML 1.2
    "tag:yaml.org,2002:int": r"-?(0|[1-9][0-9]*)$",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}


class _Strict(yaml.resolver.BaseResolver):
    """Rejects a duplicate key in a mapping; YAML would silently use the last one.

    Numbers are those of YAML 1.2, and dates are text: YAML 1.1 reads the class name 010 as 8 and
    1:30 as 90, and 1e-3 as text.
    """

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag not in (*_SCALARS, "tag:yaml.org,2002:timestamp")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line} repeats the key {shorten(key.value)}")
            keys.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern in _SCALARS.items():
    _Strict.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


class _Loader(_Strict, yaml.SafeLoader):
    pass


class _FastLoader(_Strict, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    pass


def read_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        yaml.YAMLError: it is invalid, has a duplicate key, is nested too deep, refers to itself, or
            has more than `MAX_BYTES` with its aliases expanded.
    """
    try:
        _check_size(text, _FastLoader)
        return yaml.load(text, _FastLoader)
    except yaml.scanner.ScannerError:  # libyaml rejects the escapes of paths that are not UTF-8
        _check_size(text, _Loader)
        return yaml.load(text, _Loader)


def _check_size(text: str, loader: type) -> None:
    sizes: dict[str, int] = {}  # characters of anchored nodes with their aliases expanded
    open_nodes: list[list] = [[None, 0]]  # anchor and size
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) > MAX_DEPTH:
                raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1 + len(event.value)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias {shorten(event.anchor)} refers to nothing before it")
            anchor, size = None, sizes[event.anchor]
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        open_nodes[-1][1] += size
        if open_nodes[-1][1] > MAX_BYTES:
            raise yaml.YAMLError(f"its aliases expand to more than {MAX_BYTES >> 20} MiB")
