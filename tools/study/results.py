"""Results of a study: a row for each finished cell, means and standard deviations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tools.study.cells import Cell
from tools.study.networks import Network

COLUMNS = (
    "model", "train_images", "seed", "steps", "epochs", "top1", "top5", "loss", "best_top1",
    "train_loss", "seconds", "parameters", "macs",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A finished cell, its network, and the rows of its metrics.jsonl."""

    cell: Cell
    network: Network
    rows: list[dict]

    @property
    def top1(self) -> float:
        """Top-1 of the last weights in per cent; held-out accuracy does not select them."""
        return self.rows[-1]["top1"]

    @property
    def passes(self) -> np.ndarray:
        """Passes over the training images before each evaluation."""
        training = self.cell.config.training
        images = training.batch_size * training.accumulate
        return np.array([row["step"] for row in self.rows]) * images / self.cell.train_images

    @property
    def training_macs(self) -> np.ndarray:
        """Multiply-accumulates of training until each evaluation.

        A step costs three forward passes: the forward pass itself, the gradients of the layers'
        inputs and those of their weights.
        """
        return 3 * self.network.macs * self.passes * self.cell.train_images

    @property
    def seconds(self) -> np.ndarray:
        """Wall-clock time until each evaluation, compiling and evaluations included."""
        return np.cumsum([row["seconds"] for row in self.rows])

    @property
    def curve(self) -> np.ndarray:
        """Top-1 at each evaluation, in per cent."""
        return np.array([row["top1"] for row in self.rows])

    def row(self) -> dict[str, str | int | float]:
        """Return its row of cells.csv; `epochs` are passes over the training images."""
        last = self.rows[-1]
        metrics = {key: last[key] for key in ("top1", "top5", "loss", "train_loss")}
        return {
            "model": self.cell.model,
            "train_images": self.cell.train_images,
            "seed": self.cell.seed,
            "steps": last["step"],
            "epochs": round(float(self.passes[-1]), 2),
            **metrics,
            "best_top1": max(row["top1"] for row in self.rows),
            "seconds": round(sum(row["seconds"] for row in self.rows), 1),
            "parameters": self.network.parameters,
            "macs": self.network.macs,
        }


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of some values; the latter is NaN for one value."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute both from at least one value."""
        deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
        return cls(float(np.mean(values)), float(deviation), len(values))

    def text(self, form: str = ".2f") -> str:
        """Format mean, deviation and number of values for a table."""
        deviation = "" if self.count == 1 else f" ± {self.deviation:.2f}"
        return f"{self.mean:{form}}{deviation} ({self.count})"


def top1_by_seed(results: Sequence[Result]) -> dict[tuple[str, int], dict[int, float]]:
    """Return top-1 by seed for each (model, training images) that has finished cells."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for result in results:
        cell = result.cell
        found.setdefault((cell.model, cell.train_images), {})[cell.seed] = result.top1
    return found


def markdown(cells: Sequence[Cell], results: Sequence[Result]) -> str:
    """Return the tables of a study in Markdown."""
    models, sizes = (
        list(dict.fromkeys(getattr(cell, key) for cell in cells))
        for key in ("model", "train_images")
    )
    found = top1_by_seed(results)
    networks = {result.cell.model: result.network for result in results}

    def entry(model: str, size: int) -> str:
        values = found.get((model, size))
        return Spread.of(list(values.values())).text() if values else "–"

    def costs(model: str) -> list[str]:
        network = networks.get(model)
        return [f"{network.parameters:,}", f"{network.macs / 1e6:,.1f}"] if network else ["–", "–"]

    head = ["model", "parameters", "MMACs", *(f"{size:,} images" for size in sizes)]
    rows = [[f"`{m}`", *costs(m), *(entry(m, size) for size in sizes)] for m in models]
    parts = [_caption(cells, results), _table(head, rows)]
    if len(models) > 1:
        reference = models[0]
        parts += [
            f"Difference in top-1 to `{reference}` in points, over the seeds that both have:",
            _differences(reference, models[1:], sizes, found),
        ]
    return "\n\n".join(parts) + "\n"


def _differences(
    reference: str,
    models: Sequence[str],
    sizes: Sequence[int],
    found: dict[tuple[str, int], dict[int, float]],
) -> str:
    def entry(model: str, size: int) -> str:
        first, other = found.get((reference, size), {}), found.get((model, size), {})
        ahead = [other[seed] - first[seed] for seed in other if seed in first]
        return Spread.of(ahead).text("+.2f") if ahead else "–"

    head = ["model", *(f"{size:,} images" for size in sizes)]
    return _table(head, [[f"`{m}`", *(entry(m, size) for size in sizes)] for m in models])


def _caption(cells: Sequence[Cell], results: Sequence[Result]) -> str:
    def values(of: Callable[[Cell], int | float]) -> str:
        return " / ".join(f"{value:,}" for value in dict.fromkeys(map(of, cells)))

    images = values(lambda cell: cell.config.training.batch_size * cell.config.training.accumulate)
    averaged = {cell.config.training.ema_decay > 0 for cell in cells}
    weights = {
        frozenset({True}): "the weights' moving average",
        frozenset({False}): "the weights",
    }.get(frozenset(averaged), "the weights (their moving average for models that have one)")
    held_out = " / ".join(f"{n:,}" for n in dict.fromkeys(r.network.held_out for r in results))
    return (
        f"Top-1 accuracy in % on {held_out or 'the'} held-out images, of {weights} after the last "
        f"of {values(lambda cell: cell.steps)} steps of {images} images: mean ± sample standard "
        f"deviation (number of seeds). Held-out accuracy selects nothing within a run. "
        f"{len(results)} of {len(cells)} runs are finished."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
