"""Which of a file's tensors are the weights: under which entry and prefix, and what lies beside.

Training scripts nest weights in dicts (`state_dict`, `net`, `ema`) and in modules (`model.`,
`module.backbone.`), in any combination, and put optimizers' state and second sets beside them. The
names of a network's parameters are known, so whatever stands in front of them is the place where a
set of weights lies. MindSpore's optimizers name their state alike, `moments.NAME`: a copy of a set
with a longer prefix is state, unless it is named as an average or has BatchNorm's statistics, which
no optimizer keeps.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from src.errors import UserError
from src.weights.content import Place, short
from src.weights.names import split_prefix, to_ours

# What PyTorch's wrappers insert anywhere into a name: torch.compile, FSDP, activation checkpoints.
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = ("num_batches_tracked", "global_step", "learning_rate")
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")
_MINDSPORE = (".gamma", ".beta", ".moving_mean", ".moving_variance")
_AVERAGES = {"ema", "teacher", "swa", "averaged", "average", "shadow", "polyak", "avg"}
_MAX_GROUPS, _MAX_SETS = 200, 32  # of an honest file: under ten
_TOP = "top"  # what --entry calls a set that has neither entry nor prefix


class Selection(NamedTuple):
    """The weights among a file's tensors.

    Args:
        names: our name of each tensor taken, by its place.
        renamed: the file's name where it is another, by ours.
        naming: the set of names the file uses.
        averaged: a moving average was taken.
        ignored: what kind of state of training a tensor beside them is, by the file's name.
        notes: entry, prefix, and other weights that were not taken.
    """

    names: dict[Place, str]
    renamed: dict[str, str]
    naming: str
    averaged: bool
    ignored: dict[str, str]
    notes: list[str]


@dataclass(eq=False)
class _Group:
    """Tensors with known names behind one entry and prefix."""

    entry: Place
    prefix: str
    places: dict[str, Place] = field(default_factory=dict)  # by the name behind the prefix

    @property
    def label(self) -> str:
        return ".".join([*self.entry, self.prefix.rstrip(".")]).strip(".") or _TOP

    @property
    def averaged(self) -> bool:
        words = [re.split(r"[_\-\s]", part.lower()) for part in self.label.split(".")]
        return any(_AVERAGES & {*each} and each[0] != "exp" for each in words)

    @property
    def of_optimizer(self) -> bool:
        return any("optim" in key.lower() for key in self.entry)

    @property
    def statistics(self) -> bool:
        return any(name.endswith(_STATISTICS) for name in self.places)

    def added_by(self, copy: _Group) -> str:
        """What stands before this set's prefix in a copy of a part of it; "" for another set."""
        added = copy.prefix[: len(copy.prefix) - len(self.prefix)]
        whole = self.entry == copy.entry and copy.prefix == added + self.prefix
        return (
            added
            if whole and added[-1:] == "." and copy.places.keys() <= self.places.keys()
            else ""
        )


@dataclass
class _Sorted:
    """The tensors of a file: sets of known names, counters of training, and all others.

    `whole` are the groups that are not just some layers.
    """

    groups: list[_Group]
    whole: list[_Group]
    counters: dict[Place, str]
    strange: dict[Place, str]  # the name without what PyTorch's wrappers insert


def select(
    found: Mapping[Place, Any], known: Collection[str] = (), entry: str | None = None
) -> Selection:
    """Choose the weights among all tensors of a file.

    Args:
        found: the tensors, anything with `shape` and `ndim`, by place.
        known: the parameters' names of the network to load.
        entry: the entry or prefix to take where there are several sets; by default an average.

    Raises:
        UserError: no weights of a known network, or several sets to choose from.
    """
    lying = _sort(found, known)
    whole = lying.whole
    sets = [group for group in whole if not _is_state(group, whole)] or whole
    if not sets:
        names = lying.strange
        if not names:
            raise UserError("no weights in it, only counters of training")
        naming, ours = to_ours(names.values(), known)
        ignored = _joined(lying.counters)
        return Selection({p: ours[n] for p, n in names.items()}, {}, naming, False, ignored, [])
    chosen = _choose(sets, whole, entry, found)
    places, base, notes = _complete(chosen, lying, sets)
    ignored, left = _beside(chosen, base, lying, {*places.values()})
    naming, ours = to_ours([*places, *left], known)
    names = {place: ours[name] for name, place in {**places, **left}.items()}
    renamed = {ours[name]: name for name in places if ours[name] != name}
    notes = _provenance(chosen) + notes
    for group in sets:
        if group is not chosen and not (group is base and group.entry == chosen.entry):
            notes.append(f"{group.label} holds other weights: convert.py --entry {group.label}")
    aside = [
        place[-1]
        for place in found
        if place[:-1] == chosen.entry and place not in names and ".".join(place) not in ignored
    ]
    if aside:
        notes.append(f"left aside {_some(aside)}")
    return Selection(names, renamed, naming, chosen.averaged, ignored, notes)


def _sort(found: Mapping[Place, Any], known: Collection[str]) -> _Sorted:
    groups: dict[tuple[Place, str], _Group] = {}
    lying = _Sorted([], [], {}, {})
    for place, tensor in found.items():
        name = _WRAPPERS.sub("", place[-1])
        last = name.rpartition(".")[2]
        split = split_prefix(name, known)
        if split is not None:
            key = (place[:-1], split[0])
            group = groups.setdefault(key, _Group(*key))
            if group.places.setdefault(split[1], place) != place:
                raise UserError(f"{short(split[1])} comes twice, also as {short(place[-1])}")
        elif last in _COUNTERS or tensor.ndim == 0 or (last == name and tensor.ndim == 1):
            lying.counters[place] = last  # a number or list that belongs to no layer
        else:
            lying.strange[place] = name
    lying.groups = list(groups.values())
    largest = max((len(group.places) for group in lying.groups), default=0)
    lying.whole = [group for group in lying.groups if 2 * len(group.places) >= largest]
    if len(lying.groups) > _MAX_GROUPS or len(lying.whole) > _MAX_SETS:
        raise UserError(
            f"its tensors have {len(groups)} different prefixes; save the weights of one CvT alone"
        )
    return lying


def _is_state(group: _Group, whole: list[_Group]) -> bool:
    """Whether a set is an optimizer's, not weights."""
    if group.of_optimizer or group.averaged:
        return group.of_optimizer
    others = [other for other in whole if other is not group]
    return not group.statistics and any(
        other.statistics or other.added_by(group) for other in others
    )


def _choose(
    sets: list[_Group], whole: list[_Group], entry: str | None, found: Mapping[Place, Any]
) -> _Group:
    candidates = [group for group in sets if group.averaged] or sets
    if entry is not None:
        candidates = [group for group in whole if group.label == entry] or [
            group
            for group in whole
            if entry in group.label.split(".") or group.label.startswith(f"{entry}.")
        ]
        if not candidates:
            labels = _some([group.label for group in whole], 8)
            raise UserError(f"no weights under {short(entry)}; --entry may be one of: {labels}")
    first = candidates[0]
    for other in candidates[1:]:
        # Tensors that are still in the file are equal if they are the same part of it.
        if not all(
            type(found[place]) is not np.ndarray
            and name in first.places
            and found[first.places[name]] == found[place]
            for name, place in other.places.items()
        ):
            labels = _some([group.label for group in candidates], 8)
            raise UserError(
                f"it holds {len(candidates)} sets of weights: {labels}; choose one: "
                f"python convert.py --src FILE --dst NEW.ckpt --entry {short(first.label)}"
            )
    return first


def _complete(
    chosen: _Group, lying: _Sorted, sets: list[_Group]
) -> tuple[dict[str, Place], _Group | None, list[str]]:
    """The chosen tensors with a head from outside the prefix, or what has no average from the rest.

    Returns:
        Places by name; the plain weights that belong to an average; notes.
    """
    places, notes = dict(chosen.places), []
    for group in lying.groups:
        outside = group.entry == chosen.entry and group.prefix != chosen.prefix
        if (
            outside
            and chosen.prefix.startswith(group.prefix)
            and not group.places.keys() & places.keys()
            and group not in lying.whole
        ):
            places.update(group.places)
            notes.append(f"with {_some(list(group.places))} from {group.label}")
    plain = [group for group in sets if group is not chosen and not group.averaged]
    copied = [group for group in plain if group.added_by(chosen)]
    base = (copied or plain)[0] if len(copied or plain) == 1 and chosen.averaged else None
    if base is not None:
        rest = {name: place for name, place in base.places.items() if name not in places}
        if rest and places.keys() & base.places.keys():
            places.update(rest)
            notes.append(f"{len(rest)} tensors without an average taken from {base.label}")
    return places, base, notes


def _beside(
    chosen: _Group,
    base: _Group | None,
    lying: _Sorted,
    taken: set[Place],
) -> tuple[dict[str, str], dict[str, Place]]:
    """What else lies in the dict of the weights.

    Returns:
        Kinds of state of training by the file's name; and, by the name behind the prefix, places
        of tensors that belong to the weights' set but have no name of a known network.
    """
    ignored = _joined({p: kind for p, kind in lying.counters.items() if p[:-1] == chosen.entry})
    left: dict[str, Place] = {}
    origins = [chosen, *([base] if base else [])]
    prefixes = sorted({group.prefix for group in origins}, key=len, reverse=True)

    by_mindspore = any(name.endswith(_MINDSPORE) for each in origins for name in each.places)
    strange = tuple(lying.strange.values())
    with_strange = {
        group.prefix
        for group in lying.groups
        if by_mindspore and any(name.startswith(group.prefix) for name in strange)
    }

    def belongs(name: str) -> str | None:
        return next((name[len(each) :] for each in prefixes if name.startswith(each)), None)

    for group in lying.groups:
        if group is chosen or group.entry != chosen.entry or {*group.places.values()} <= taken:
            continue
        origin = next((each for each in origins if each.added_by(group)), None)
        kind = origin.added_by(group).rstrip(".") if origin else f"of {group.label}"
        kind = "not averaged" if group is base else kind
        # MindSpore's optimizers name the state of a few trained layers so, too; other tensors with
        # the names of layers behind a prefix are among some that have names that no layer has.
        partial = origin is not None and by_mindspore and group.prefix not in with_strange
        if group in lying.whole or partial:
            ignored.update(
                _joined({place: kind for place in group.places.values() if place not in taken})
            )
            continue
        for name, place in group.places.items():
            rest = belongs(group.prefix + name)
            if rest is not None:
                left[rest] = place
    for place, name in lying.strange.items():
        rest = belongs(name) if place[:-1] == chosen.entry else None
        if rest is not None:
            left[rest] = place
    return ignored, left


def _provenance(chosen: _Group) -> list[str]:
    notes = [f"taken from {' > '.join(map(short, chosen.entry))}"] if chosen.entry else []
    if chosen.prefix:
        notes.append(f"prefix {short(chosen.prefix)} cut off")
    return notes


def _joined(kinds: dict[Place, str]) -> dict[str, str]:
    return {".".join(place): kind for place, kind in kinds.items()}


def _some(names: list[str], count: int = 4) -> str:
    return ", ".join(map(short, names[:count])) + (", ..." if len(names) > count else "")
