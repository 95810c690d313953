"""A study from its grid to its files: what is not done yet is trained, then told."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from src.errors import UserError
from src.files import write_csv, write_text
from src.training.run import lock_folder
from tools.study.cells import Run, Trainings, look
from tools.study.grid import Cell
from tools.study.networks import Network, networks_of
from tools.study.pace import Pace, in_words
from tools.study.plots import plot_by_cost, plot_by_images, plot_curves
from tools.study.results import COLUMNS, Result, Spread, markdown, top1s

logger = logging.getLogger("cvt")
INDEX_FILE = "images.json"
# Plots of the course of training: the axis and where an evaluation lies on it.
COURSES = {
    "accuracy_epochs.png": ("epochs (passes over these images)", lambda r: r.passes),
    "accuracy_operations.png": (
        "training, 10^12 multiply-accumulates", lambda r: r.training_macs / 1e12
    ),
    "accuracy_time.png": ("training, minutes on this machine", lambda r: r.seconds / 60),
}  # fmt: skip
OWN_FILES = ("cells.csv", "table.md", "accuracy_images.png", *COURSES, "accuracy_cost.png")


class StudyRun:
    """The cells of a study in a folder.

    Args:
        cells: all of them.
        output: the folder: a run for each cell in cells/, and the study's own files.
        only: pattern of the names of the cells to train; the files tell of all that are finished.

    Raises:
        UserError: cells that can't be trained, or that were trained under other settings.
    """

    def __init__(self, cells: Sequence[Cell], output: Path, only: str = "*") -> None:
        self.cells = list(cells)
        self.output = output
        self.chosen = [cell for cell in cells if fnmatchcase(cell.name, only)]
        if not self.chosen:
            raise UserError(f"--only {only}: no cell has such a name; one is {cells[0].name}")
        self.runs = {cell.name: look(cell, self.folder(cell)) for cell in cells}
        self.networks: dict[str, Network] = networks_of(cells)

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell's run."""
        return self.output / "cells" / cell.name

    def show(self) -> None:
        """Print the chosen cells, and how far each is."""
        for cell in self.chosen:
            run, network = self.runs[cell.name], self.networks[cell.model]
            done = run.rows[-1]["step"] if run.rows else 0
            state = f"{done} of {cell.steps} steps"
            if run.done:
                state = f"done, top1 {run.rows[-1]['top1']:.2f}"
            print(
                f"{cell.name}: {network.parameters:,} parameters, {network.macs / 1e6:,.1f} MMACs; "
                f"{state}"
            )

    def train(self) -> None:
        """Train what is not done, one process at a time, and write the files behind each cell.

        Raises:
            UserError: cells that failed; the others are done by then.
            SystemExit: 128 + the signal that asked to stop; the run is saved.
        """
        self._require_own_folder()
        pace, failed = Pace(), []
        for cell in self.cells:
            pace.learn(cell, self.runs[cell.name].rows)
        todo = [cell for cell in self.chosen if not self.runs[cell.name].done]
        with lock_folder(self.output), Trainings() as trainings:
            (self.output / "cells").mkdir(exist_ok=True)
            self._estimate(todo, pace, trainings)
            for number, cell in enumerate(todo, 1):
                logger.info("cell %d of %d: %s", number, len(todo), cell.name)
                run = self._train(cell, trainings)
                if not run.done:
                    failed.append(cell.name)
                    continue
                pace.learn(cell, run.rows)
                self.write()
                logger.info(
                    "%s: top1 %.2f; cells left: %s",
                    cell.name, run.rows[-1]["top1"], self._left(todo[number:], pace),
                )  # fmt: skip
            self.write()
        if failed:
            raise UserError(
                f"{len(failed)} of {len(todo)} cells failed: {', '.join(failed)}; why stands above "
                "each. The same command tries them again"
            )

    def _require_own_folder(self) -> None:
        """Refuse a folder that is no study's and has files of the names that a study writes."""
        if (self.output / "cells").is_dir():
            return
        for name in OWN_FILES:
            if (self.output / name).exists():
                raise UserError(
                    f"{self.output}: {name} there is not of a study and would be replaced; give "
                    "another --output"
                )

    def _train(self, cell: Cell, trainings: Trainings) -> Run:
        folder = self.folder(cell)
        words = [*self._words(cell), f"--output={folder}"]
        if self.runs[cell.name].begun:
            words.append("--resume")
        logger.info("python train.py %s", shlex.join(words))
        code = trainings.run(words)
        run = self.runs[cell.name] = look(cell, folder)
        if code:
            logger.error("%s: train.py ended with exit code %d", cell.name, code)
        return run

    def _words(self, cell: Cell) -> list[str]:
        """Folders of images are checked once for all cells, not once for each."""
        data = cell.config.data
        shared = data.source == "imagefolder" and data.index is None
        return [*cell.words, *[f"--data.index={self.output / INDEX_FILE}"] * shared]

    def _estimate(self, todo: Sequence[Cell], pace: Pace, trainings: Trainings) -> None:
        for cell in todo:
            if not pace.knows(cell):
                logger.info("measuring some steps of %s for an estimate", cell.model)
                pace.probe(cell, self._words(cell), trainings, self.output / ".estimate")
        done = sum(run.done for run in self.runs.values())
        logger.info(
            "%d of %d cells are done; to train: %s", done, len(self.cells), self._left(todo, pace)
        )

    def _left(self, cells: Sequence[Cell], pace: Pace) -> str:
        if not cells:
            return "nothing"
        known = [cell for cell in cells if pace.knows(cell)]
        rows = {cell.name: self.runs[cell.name].rows for cell in known}
        done = {name: lines[-1]["step"] if lines else 0 for name, lines in rows.items()}
        text = (
            f"{len(cells)} of them, about "
            f"{in_words(sum(pace.left(cell, done[cell.name]) for cell in known))}"
        )
        unknown = len(cells) - len(known)
        return f"{text} and {unknown} that could not be measured" if unknown else text

    def write(self) -> None:
        """Write cells.csv, table.md and the plots of what is done."""
        results = [
            Result(cell, self.networks[cell.model], self.runs[cell.name].rows)
            for cell in self.cells
            if self.runs[cell.name].done
        ]
        rows = [result.row() for result in results]
        write_csv(
            COLUMNS, [[row[key] for key in COLUMNS] for row in rows], self.output / "cells.csv"
        )
        write_text(markdown(self.cells, results), self.output / "table.md")
        if results:
            self._plot(results)

    def _plot(self, results: Sequence[Result]) -> None:
        points: dict[str, dict[int, tuple[float, float]]] = {c.model: {} for c in self.cells}
        for (model, size), values in top1s(results).items():
            spread = Spread.of(list(values.values()))
            points[model][size] = spread.mean, spread.deviation
        plot_by_images(points, self.output / "accuracy_images.png")
        by_size = {size: {} for size in sorted({r.cell.train_images for r in results})}
        for result in results:
            cell = result.cell
            by_size[cell.train_images].setdefault(cell.model, []).append(result)
        for name, (xlabel, positions) in COURSES.items():
            curves = {
                size: {
                    model: (positions(same[0]), np.array([each.curve for each in same]))
                    for model, same in ((m, by_model[m]) for m in points if m in by_model)
                }
                for size, by_model in by_size.items()
            }
            plot_curves(curves, xlabel, self.output / name)
        largest = max(by_size)
        costs = {
            model: (self.networks[model].parameters, self.networks[model].macs, sizes[largest])
            for model, sizes in points.items()
            if largest in sizes
        }
        plot_by_cost(costs, largest, self.output / "accuracy_cost.png")
