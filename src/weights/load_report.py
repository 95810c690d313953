"""Report how a weight file was loaded, in one line and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from src.errors import UserError
from src.weights.content import short, short_names

Shape = tuple[int, ...]


@dataclass
class LoadReport:
    """The outcome for every tensor of a file and every parameter of a network.

    Names are the network's; for unexpected tensors, the file's.

    Args:
        path: the file.
        naming: the naming scheme it uses.
        loaded: parameters set from the file.
        missing: parameters that are not in the file.
        unexpected: tensors that are not in the network.
        mismatched: (name, shape in the file, shape in the network).
        ignored: tensors of training state: their kind by the file's name.
        new_head: head parameters that keep their initial values (`new_head=True`).
        interpolated: (name, grid in the file, grid in the network) of position embeddings.
        renamed: the file's name by the network's name, where they differ.
        cast: how many tensors were converted from each other dtype.
        notes: short phrases on skipped entries and conversions.
        averaged: whether the weights are a moving average.
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
            parts.append(f"training state skipped: {listed}")
        if self.new_head:
            parts.append(f"the head keeps its initial values ({short_names(self.new_head, 3)})")
        misfits = self.describe_misfits()
        return "; ".join(parts) + (f"; NOT loaded: {misfits}" if misfits else "")

    def misfits(self) -> set[str]:
        """Return the names of everything that does not fit."""
        return {*self.missing, *self.unexpected, *(name for name, _, _ in self.mismatched)}

    def describe_misfits(self) -> str:
        """Return one line that names what does not fit, or "" if everything fits."""
        shapes = [f"{name} {list(there)} for {list(here)}" for name, there, here in self.mismatched]
        kinds = (
            (self.missing, "missing"),
            (self.unexpected, "unexpected"),
            (shapes, "of another shape"),
        )
        return "; ".join(
            f"{len(names)} {kind}: {short_names(names, 3)}" for names, kind in kinds if names
        )

    def table(self, everything: bool = True, limit: int | None = None) -> str:
        """Return a table: outcome, name, both shapes, and the file's name if it differs.

        Args:
            everything: include tensors that were loaded unchanged, and training state.
            limit: maximum number of rows per outcome; a last row counts the others.
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
            skipped = self.ignored.items()
            groups.append([("left", kind, "", "", short(name, 160)) for name, kind in skipped])
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
    """A weight file does not fit the network; `report` has the details."""

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report


def _grid(grid: Shape) -> str:
    return " x ".join(map(str, grid))
