"""Group a checkpoint's tensors into sets of weights, and tell how the sets are related.

A set is what has known parameter names under one entry and prefix: a network's weights, its moving
average, an optimizer's state, or another network such as a distilled network's teacher.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from src.errors import UserError
from src.weights.content import KeyPath, short
from src.weights.names import split_prefix

# Inserted anywhere into names by torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = ("num_batches_tracked", "global_step", "learning_rate")
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")
_AVERAGES = {"ema", "teacher", "swa", "averaged", "average", "shadow", "polyak", "avg"}
# PyTorch's and mindspore.experimental's optimizers: exp_avg, max_exp_avg_sq, square_avg, grad_avg.
_OPTIMIZER_WORDS = {"exp", "sq", "square", "squared", "grad", "grads", "gradient", "moment"}
_HEADS = ("head.", "classifier.")
_NUMBER = re.compile(r"\.(\d{1,4})(?=\.)")
_MAX_GROUPS, _MAX_SETS = 200, 32  # ordinary files have fewer than ten
_TOP = "top"  # the --entry name of a set without entry and prefix


@dataclass(eq=False)
class Group:
    """Tensors with known names under one entry and prefix."""

    entry: KeyPath
    prefix: str
    paths: dict[str, KeyPath] = field(default_factory=dict)  # by the name after the prefix
    swapped: bool = False  # the entry's name says the opposite of what it holds

    @property
    def label(self) -> str:
        return ".".join([*self.entry, self.prefix.rstrip(".")]).strip(".") or _TOP

    @property
    def is_average(self) -> bool:
        words = [re.split(r"[_\-\s]", part.lower()) for part in self.label.split(".")]
        named = any(_AVERAGES & {*each} and not _OPTIMIZER_WORDS & {*each} for each in words)
        return named != self.swapped

    @property
    def is_in_optimizer(self) -> bool:
        return any(re.search("optim(?!al)", key.lower()) for key in self.entry)

    @property
    def has_statistics(self) -> bool:
        return any(name.endswith(_STATISTICS) for name in self.paths)

    def prefix_added_by(self, copy: Group) -> str:
        """Return what a copy of some of these tensors has before their prefix; "" if it is none."""
        added = copy.prefix[: len(copy.prefix) - len(self.prefix)]
        same = self.entry == copy.entry and copy.prefix == added + self.prefix
        is_copy = same and added[-1:] == "." and copy.paths.keys() <= self.paths.keys()
        return added if is_copy else ""


@dataclass
class Grouped:
    """A file's tensors: groups with known names, training counters, and all others.

    `complete` are the groups that are not just a few layers: they have half of the largest group's
    tensors, or blocks in all of its stages, such as a small student of a large teacher.
    """

    groups: list[Group]
    complete: list[Group]
    counters: dict[KeyPath, str]
    unknown: dict[KeyPath, str]  # names without what PyTorch's wrappers insert


def group_tensors(tensors: Mapping[KeyPath, Any], known: Collection[str]) -> Grouped:
    """Group a file's tensors by the entry and prefix before their known names.

    Args:
        tensors: anything with `shape` and `ndim`, by key path.
        known: parameter names of the network to load.

    Raises:
        UserError: a name occurs twice in a set, or there are too many sets.
    """
    groups: dict[tuple[KeyPath, str], Group] = {}
    grouped = Grouped([], [], {}, {})
    for path, tensor in tensors.items():
        name = _WRAPPERS.sub("", path[-1])
        last = name.rpartition(".")[2]
        split = split_prefix(name, known)
        if split is not None:
            key = (path[:-1], split[0])
            group = groups.setdefault(key, Group(*key))
            if group.paths.setdefault(split[1], path) != path:
                raise UserError(
                    f"{short(split[1])} occurs twice, also as {short(path[-1])}; save it again "
                    "without the duplicate"
                )
        elif last in _COUNTERS or tensor.ndim == 0 or (last == name and tensor.ndim == 1):
            grouped.counters[path] = last  # a number or list that belongs to no layer
        else:
            grouped.unknown[path] = name
    grouped.groups = list(groups.values())
    largest = max(grouped.groups, key=lambda group: len(group.paths), default=Group((), ""))
    stages = _depths(largest.paths).keys()
    grouped.complete = [
        group
        for group in grouped.groups
        if 2 * len(group.paths) >= len(largest.paths)
        or (stages and _depths(group.paths).keys() == stages)
    ]
    if len(grouped.groups) > _MAX_GROUPS or len(grouped.complete) > _MAX_SETS:
        raise UserError(
            f"its tensors have {len(groups)} different prefixes; save the weights of one CvT alone"
        )
    return grouped


def undo_swap(groups: list[Group], tensors: Mapping[KeyPath, Any]) -> list[str]:
    """Mark what MMEngine's EMAHook swaps before it saves; return a note if it did.

    `state_dict` has the average then, and `ema_state_dict`, which counts the steps, the weights.
    """
    raw = ("ema_state_dict",)
    swapped = [group for group in groups if group.entry in (raw, ("state_dict",))]
    if (*raw, "steps") not in tensors or len({group.entry for group in swapped}) < 2:
        return []
    for group in swapped:
        group.swapped = True
    return ["saved by MMEngine's EMAHook, which puts the average into state_dict"]


def _depths(names: Collection[str]) -> dict[str, int]:
    """Return the largest number in each numbered list of modules: {"stage2.blocks": 9}."""
    depths: dict[str, int] = {}
    for name in names:
        for found in _NUMBER.finditer(name):
            parent, number = name[: found.start()], int(found[1])
            depths[parent] = max(number, depths.get(parent, 0))
    return depths


def _equally_deep(one: Group, other: Group) -> bool:
    """Return whether the stages that both have are equally deep."""
    depths, others = _depths(one.paths), _depths(other.paths)
    return all(depths[parent] == others[parent] for parent in depths.keys() & others.keys())


def is_average_of(average: Group, plain: Group, tensors: Mapping[KeyPath, Any]) -> bool:
    """Return whether two sets belong to one network, so that either may fill the other's gaps.

    Their tensors have equal shapes and as many blocks. An average may lack BatchNorm's statistics
    and whole frozen modules, but no part of a module and no head.
    """
    shared = average.paths.keys() & plain.paths.keys()
    if not shared or any(
        tuple(tensors[average.paths[name]].shape) != tuple(tensors[plain.paths[name]].shape)
        for name in shared
    ):
        return False
    if not _equally_deep(average, plain):
        return False
    modules = {""}
    for name in shared:
        modules.update(name[:at] for at, letter in enumerate(name) if letter == ".")
    gaps = average.paths.keys() ^ plain.paths.keys()
    gaps = [name for name in gaps if not name.endswith(_STATISTICS)]
    return not any(
        name.rpartition(".")[0] in modules or (name.startswith(_HEADS) and name in plain.paths)
        for name in gaps
    )


def is_optimizer_state(group: Group, complete: list[Group]) -> bool:
    """Return whether a set is optimizer state beside the others: no optimizer keeps statistics."""
    if group.is_in_optimizer or group.is_average:
        return group.is_in_optimizer
    others = [other for other in complete if other is not group]
    return not group.has_statistics and any(
        other.has_statistics and _equally_deep(group, other) or other.prefix_added_by(group)
        for other in others
    )
