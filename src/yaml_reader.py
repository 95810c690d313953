"""Reads untrusted YAML with limits on nesting and size."""

from __future__ import annotations

from typing import Any

import yaml

from src.errors import shorten

# ImageNet-22k's 21,841 class names are half a MiB.
MAX_BYTES, MAX_DEPTH = 4 << 20, 20


class _UniqueKeys:
    """Rejects a duplicate key in a mapping; YAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"line {line} repeats the key {shorten(key.value)}")
            keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Loader(_UniqueKeys, yaml.SafeLoader):
    pass


class _FastLoader(_UniqueKeys, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
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
