"""Select the weights among all tensors of a checkpoint.

Training scripts (PyTorch Lightning, timm, MMPretrain, DDP) nest weights in dicts (`state_dict`,
`net`, `ema`) and modules (`model.`, `module.backbone.`) in any combination, beside optimizer state
and further sets of weights. The parameter names of a network are known, so whatever precedes a
known name is the entry and prefix of a set of weights. MindSpore's optimizers name their state
`moments.NAME`, so a set that repeats another one's names under a longer prefix is optimizer state,
unless its prefix names an average or it has BatchNorm statistics, which no optimizer keeps. A name
such as "teacher" does not make an average: a distilled network's teacher is another network.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from src.errors import UserError
from src.weights.content import KeyPath, short, short_names
from src.weights.names import split_prefix, to_ours

# Inserted anywhere into names by torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = ("num_batches_tracked", "global_step", "learning_rate")
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")
_MINDSPORE = (".gamma", ".beta", ".moving_mean", ".moving_variance")
_AVERAGES = {"ema", "teacher", "swa", "averaged", "average", "shadow", "polyak", "avg"}
# PyTorch's and mindspore.experimental's optimizers: exp_avg, max_exp_avg_sq, square_avg, grad_avg.
_OPTIMIZER_WORDS = {"exp", "sq", "square", "squared", "grad", "grads", "gradient", "moment"}
_HEADS = ("head.", "classifier.")
_NUMBER = re.compile(r"\.(\d{1,4})(?=\.)")
_MAX_GROUPS, _MAX_SETS = 200, 32  # ordinary files have fewer than ten
_TOP = "top"  # the --entry name of a set without entry and prefix


class Selection(NamedTuple):
    """The weights selected from a file.

    Args:
        names: our name of each selected tensor, by key path.
        renamed: the file's name by ours, where they differ.
        naming: the naming scheme of the file.
        averaged: whether the weights are a moving average.
        ignored: the kind of each tensor of training state, by the file's name.
        notes: entry, prefix, and sets of weights that were not selected.
    """

    names: dict[KeyPath, str]
    renamed: dict[str, str]
    naming: str
    averaged: bool
    ignored: dict[str, str]
    notes: list[str]


@dataclass(eq=False)
class _Group:
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
        return any("optim" in key.lower() for key in self.entry)

    @property
    def has_statistics(self) -> bool:
        return any(name.endswith(_STATISTICS) for name in self.paths)

    def prefix_added_by(self, copy: _Group) -> str:
        """Return what a copy of some of these tensors has before their prefix; "" if it is none."""
        added = copy.prefix[: len(copy.prefix) - len(self.prefix)]
        same = self.entry == copy.entry and copy.prefix == added + self.prefix
        is_copy = same and added[-1:] == "." and copy.paths.keys() <= self.paths.keys()
        return added if is_copy else ""


@dataclass
class _Grouped:
    """A file's tensors: groups with known names, training counters, and all others.

    `complete` are the groups that are not just a few layers: they have half of the largest group's
    tensors, or blocks in all of its stages, such as a small student of a large teacher.
    """

    groups: list[_Group]
    complete: list[_Group]
    counters: dict[KeyPath, str]
    unknown: dict[KeyPath, str]  # names without what PyTorch's wrappers insert


def select(
    tensors: Mapping[KeyPath, Any], known: Collection[str] = (), entry: str | None = None
) -> Selection:
    """Select the weights among all tensors of a file.

    No framework is recognised by its name: Lightning's `state_dict` and `model.`, DDP's `module.`
    and others are entries and prefixes like any other.

    Args:
        tensors: anything with `shape` and `ndim`, by key path.
        known: parameter names of the network to load.
        entry: the entry or prefix to select if there are several sets; by default an average.

    Raises:
        UserError: no weights of a known network, or several sets and no `entry`.
    """
    grouped = _group(tensors, known)
    complete = grouped.complete
    notes = _undo_swap(grouped.groups, tensors)
    sets = [group for group in complete if not _is_optimizer_state(group, complete)] or complete
    if not sets:
        names = grouped.unknown
        if not names:
            raise UserError("contains no weights, only training counters; give another file")
        naming, ours = to_ours(names.values(), known)
        ignored = _flatten(grouped.counters)
        return Selection({p: ours[n] for p, n in names.items()}, {}, naming, False, ignored, [])
    plain = [group for group in sets if not group.is_average]
    averages = {
        group: [other for other in plain if _is_average_of(group, other, tensors)]
        for group in sets
        if group.is_average
    }
    averages = {group: others for group, others in averages.items() if others or not plain}
    chosen = _choose([*averages] or sets, complete, entry, tensors)
    paths, base, more = _fill_gaps(chosen, grouped, averages.get(chosen, []))
    notes += more
    ignored, unknown = _classify_others(chosen, base, grouped, {*paths.values()})
    naming, ours = to_ours([*paths, *unknown], known)
    names = {path: ours[name] for name, path in {**paths, **unknown}.items()}
    renamed = {ours[name]: name for name in paths if ours[name] != name}
    notes = _provenance(chosen) + notes
    for group in sets:
        if group is not chosen and not (group is base and group.entry == chosen.entry):
            notes.append(f"{group.label} holds other weights: convert.py --entry {group.label}")
    skipped = [
        path[-1]
        for path in tensors
        if path[:-1] == chosen.entry and path not in names and ".".join(path) not in ignored
    ]
    if skipped:
        notes.append(f"skipped {short_names(skipped, 4)}")
    return Selection(names, renamed, naming, chosen in averages, ignored, notes)


def _group(tensors: Mapping[KeyPath, Any], known: Collection[str]) -> _Grouped:
    groups: dict[tuple[KeyPath, str], _Group] = {}
    grouped = _Grouped([], [], {}, {})
    for path, tensor in tensors.items():
        name = _WRAPPERS.sub("", path[-1])
        last = name.rpartition(".")[2]
        split = split_prefix(name, known)
        if split is not None:
            key = (path[:-1], split[0])
            group = groups.setdefault(key, _Group(*key))
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
    largest = max(grouped.groups, key=lambda group: len(group.paths), default=_Group((), ""))
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


def _undo_swap(groups: list[_Group], tensors: Mapping[KeyPath, Any]) -> list[str]:
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


def _equally_deep(one: _Group, other: _Group) -> bool:
    """Return whether the stages that both have are equally deep."""
    depths, others = _depths(one.paths), _depths(other.paths)
    return all(depths[parent] == others[parent] for parent in depths.keys() & others.keys())


def _is_average_of(average: _Group, plain: _Group, tensors: Mapping[KeyPath, Any]) -> bool:
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


def _is_optimizer_state(group: _Group, complete: list[_Group]) -> bool:
    if group.is_in_optimizer or group.is_average:
        return group.is_in_optimizer
    others = [other for other in complete if other is not group]
    return not group.has_statistics and any(
        other.has_statistics and _equally_deep(group, other) or other.prefix_added_by(group)
        for other in others
    )


def _choose(
    candidates: list[_Group],
    complete: list[_Group],
    entry: str | None,
    tensors: Mapping[KeyPath, Any],
) -> _Group:
    """Return the set that `entry` names; without `entry`, the only one of the candidates.

    Raises:
        UserError: no set has this entry, or several sets differ.
    """
    if entry is not None:
        candidates = [group for group in complete if group.label == entry] or [
            group
            for group in complete
            if entry in group.label.split(".") or group.label.startswith(f"{entry}.")
        ]
        if not candidates:
            labels = short_names([group.label for group in complete], 8)
            raise UserError(f"no weights under --entry {short(entry)}; choose one of: {labels}")
    first = candidates[0]
    for other in candidates[1:]:
        # Tensors not yet read from the file are equal if they are the same part of it.
        if not all(
            type(tensors[path]) is not np.ndarray
            and name in first.paths
            and tensors[first.paths[name]] == tensors[path]
            for name, path in other.paths.items()
        ):
            labels = short_names([group.label for group in candidates], 8)
            raise UserError(
                f"it holds {len(candidates)} sets of weights: {labels}; choose one: "
                f"python convert.py --src FILE --dst NEW.ckpt --entry {short(first.label)}"
            )
    return first


def _fill_gaps(
    chosen: _Group, grouped: _Grouped, plain: list[_Group]
) -> tuple[dict[str, KeyPath], _Group | None, list[str]]:
    """Add a head outside the chosen prefix, and to an average the tensors that it lacks.

    Args:
        chosen: the chosen set.
        grouped: all groups of the file.
        plain: the sets that the chosen one is an average of.

    Returns:
        Key paths by name; the plain weights that an average belongs to, if any; notes.
    """
    paths, notes = dict(chosen.paths), []
    for group in grouped.groups:
        outside = group.entry == chosen.entry and group.prefix != chosen.prefix
        if (
            outside
            and chosen.prefix.startswith(group.prefix)
            and not group.paths.keys() & paths.keys()
            and group not in grouped.complete
        ):
            paths.update(group.paths)
            notes.append(f"with {short_names(list(group.paths), 4)} from {group.label}")
    copied = [group for group in plain if group.prefix_added_by(chosen)]
    base = (copied or plain)[0] if len(copied or plain) == 1 else None
    if base is not None:
        rest = {name: path for name, path in base.paths.items() if name not in paths}
        if rest:
            paths.update(rest)
            notes.append(f"{len(rest)} tensors without an average read from {base.label}")
    return paths, base, notes


def _classify_others(
    chosen: _Group, base: _Group | None, grouped: _Grouped, selected: set[KeyPath]
) -> tuple[dict[str, str], dict[str, KeyPath]]:
    """Classify the other tensors in the dict of the weights.

    Returns:
        Kinds of training state by the file's name. Key paths, by the name after the prefix, of
        tensors that are among the weights but have no known name.
    """
    ignored = _flatten({p: kind for p, kind in grouped.counters.items() if p[:-1] == chosen.entry})
    unknown: dict[str, KeyPath] = {}
    origins = [chosen, *([base] if base else [])]
    prefixes = sorted({group.prefix for group in origins}, key=len, reverse=True)

    by_mindspore = any(name.endswith(_MINDSPORE) for each in origins for name in each.paths)
    unknown_names = tuple(grouped.unknown.values())
    prefixes_with_unknown = {
        group.prefix
        for group in grouped.groups
        if by_mindspore and any(name.startswith(group.prefix) for name in unknown_names)
    }

    def strip_prefix(name: str) -> str | None:
        return next((name[len(each) :] for each in prefixes if name.startswith(each)), None)

    for group in grouped.groups:
        if group is chosen or group.entry != chosen.entry or {*group.paths.values()} <= selected:
            continue
        origin = next((each for each in origins if each.prefix_added_by(group)), None)
        kind = origin.prefix_added_by(group).rstrip(".") if origin else f"of {group.label}"
        kind = "not averaged" if group is base else kind
        # A small group can be the state of a MindSpore optimizer that trains only a few layers. It
        # is not if tensors with unknown names share its prefix: then it is part of another module.
        partial = origin is not None and by_mindspore and group.prefix not in prefixes_with_unknown
        if group in grouped.complete or partial:
            ignored.update(_flatten({p: kind for p in group.paths.values() if p not in selected}))
            continue
        for name, path in group.paths.items():
            rest = strip_prefix(group.prefix + name)
            if rest is not None:
                unknown[rest] = path
    for path, name in grouped.unknown.items():
        rest = strip_prefix(name) if path[:-1] == chosen.entry else None
        if rest is not None:
            unknown[rest] = path
    return ignored, unknown


def _provenance(chosen: _Group) -> list[str]:
    notes = [f"read from {' > '.join(map(short, chosen.entry))}"] if chosen.entry else []
    if chosen.prefix:
        notes.append(f"prefix {short(chosen.prefix)} removed")
    return notes


def _flatten(kinds: dict[KeyPath, str]) -> dict[str, str]:
    return {".".join(path): kind for path, kind in kinds.items()}
