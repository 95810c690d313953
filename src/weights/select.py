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

import shlex
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from src.errors import UserError
from src.weights.content import KeyPath, short, short_names
from src.weights.groups import (
    Group,
    Grouped,
    group_tensors,
    is_average_of,
    is_optimizer_state,
    undo_swap,
)
from src.weights.names import to_ours

_MINDSPORE = (".gamma", ".beta", ".moving_mean", ".moving_variance")


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
    grouped = group_tensors(tensors, known)
    complete = grouped.complete
    notes = undo_swap(grouped.groups, tensors)
    sets = [group for group in complete if not is_optimizer_state(group, complete)] or complete
    if not sets:
        names = grouped.unknown
        if not names:
            raise UserError("contains no weights, only training counters; give another file")
        naming, ours = to_ours(names.values(), known)
        ignored = _flatten(grouped.counters)
        return Selection({p: ours[n] for p, n in names.items()}, {}, naming, False, ignored, [])
    plain = [group for group in sets if not group.is_average]
    averages = {
        group: [other for other in plain if is_average_of(group, other, tensors)]
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
            name = shlex.quote(group.label)
            notes.append(f"{group.label} holds other weights: convert.py --entry {name}")
    skipped = [
        path[-1]
        for path in tensors
        if path[:-1] == chosen.entry and path not in names and ".".join(path) not in ignored
    ]
    if skipped:
        notes.append(f"skipped {short_names(skipped, 4)}")
    return Selection(names, renamed, naming, chosen in averages, ignored, notes)


def _choose(
    candidates: list[Group],
    complete: list[Group],
    entry: str | None,
    tensors: Mapping[KeyPath, Any],
) -> Group:
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
            name = shlex.quote(short(first.label))
            raise UserError(
                f"it holds {len(candidates)} sets of weights: {labels}; choose one: "
                f"python convert.py --src FILE --dst NEW.ckpt --entry {name}"
            )
    return first


def _fill_gaps(
    chosen: Group, grouped: Grouped, plain: list[Group]
) -> tuple[dict[str, KeyPath], Group | None, list[str]]:
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
    chosen: Group, base: Group | None, grouped: Grouped, selected: set[KeyPath]
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


def _provenance(chosen: Group) -> list[str]:
    notes = [f"read from {' > '.join(map(short, chosen.entry))}"] if chosen.entry else []
    if chosen.prefix:
        notes.append(f"prefix {short(chosen.prefix)} removed")
    return notes


def _flatten(kinds: dict[KeyPath, str]) -> dict[str, str]:
    return {".".join(path): kind for path, kind in kinds.items()}
