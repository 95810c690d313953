"""What became of every tensor of a weight file, in a sentence and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from src.errors import UserError
from src.weights.content import short

Shape = tuple[int, ...]


@dataclass
class LoadReport:
    """What became of every tensor of a file and every parameter of a network.

    Names are the network's (of tensors it doesn't have, the file's).

    Args:
        path: the file.
        naming: the set of names it uses.
        loaded: names whose values were taken over.
        missing: parameters that the file doesn't have.
        unexpected: tensors that the network doesn't have.
        mismatched: (name, shape in the file, shape in the network).
        ignored: what kind of state of training a tensor was left as, by the file's name.
        new_head: parameters of the head that keep their initial values, as asked.
        interpolated: (name, grid in the file, grid in the network) of position embeddings.
        renamed: the file's name, where it is another, by name.
        cast: types other than the network's that were converted, and how often.
        notes: what else was in the file, and what was done in reading it.
        averaged: the file holds a moving average, and that was taken.
        shapes: (shape in the file or None, shape in the network or None) by name.
    """

    path: str
    naming: str = ""
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    new_head: list[str] = field(default_factory=list)
    interpolated: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    cast: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    averaged: bool = False
    shapes: dict[str, tuple[Shape | None, Shape | None]] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded from {self.path}"]
        parts[0] += " (the moving average)" if self.averaged else ""
        if self.renamed:
            parts.append(f"{self.naming}, {len(self.renamed)} renamed")
        parts += self.notes
        parts += [f"{count} cast from {kind}" for kind, count in self.cast.items()]
        for name, old_grid, grid in self.interpolated:
            parts.append(f"{name} interpolated from {_grid(old_grid)} to {_grid(grid)}")
        if self.ignored:
            kinds = Counter(self.ignored.values())
            listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            parts.append(f"left as state of training: {listed}")
        if self.new_head:
            parts.append(f"the head keeps its initial values ({_some(self.new_head)})")
        complaint = self.complaint()
        return "; ".join(parts) + (f"; NOT loaded: {complaint}" if complaint else "")

    def complaint(self) -> str:
        """One line that names what does not fit, or "" where everything does."""
        shapes = [f"{name} {list(there)} for {list(here)}" for name, there, here in self.mismatched]
        kinds = (
            (self.missing, "missing"),
            (self.unexpected, "unexpected"),
            (shapes, "of another shape"),
        )
        return "; ".join(f"{len(names)} {kind}: {_some(names)}" for names, kind in kinds if names)

    def table(self, everything: bool = True, limit: int | None = None) -> str:
        """A row per tensor: what became of it, our name, both shapes, the file's name if different.

        Args:
            everything: also the tensors that were simply loaded or left as state of training.
            limit: rows of each kind at most; a line tells how many more there are.
        """
        kinds: list[tuple[str, Sequence[str]]] = [
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("misshapen", [name for name, _, _ in self.mismatched]),
            ("new head", self.new_head),
            ("interpolated", [name for name, _, _ in self.interpolated]),
        ]
        if everything:
            special = {name for name, _, _ in self.interpolated}
            kinds.append(("loaded", [name for name in self.loaded if name not in special]))
        groups = [[self._row(kind, name) for name in names] for kind, names in kinds]
        if everything:
            left = self.ignored.items()
            groups.append([("left", kind, "", "", short(name, 160)) for name, kind in left])
        rows = [("", "parameter", "in the file", "in the network", "name in the file")]
        for group in groups:
            rows += group[:limit]
            if limit is not None and len(group) > limit:
                rows.append((group[0][0], f"... and {len(group) - limit} more", "", "", ""))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)

    def _row(self, kind: str, name: str) -> tuple[str, ...]:
        shapes = ["-" if s is None else str(list(s)) for s in self.shapes[name]]
        return (kind, short(name), *shapes, short(self.renamed.get(name, ""), 160))


class WeightsMismatch(UserError):
    """A file doesn't fit a network; `report` tells where."""

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def _grid(grid: Shape) -> str:
    return " x ".join(map(str, grid))


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(map(short, names[:count])) + (", ..." if len(names) > count else "")
