"""Trains the unfinished cells of a study and writes its table and plots."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from src.errors import UserError, join_names
from src.files import write_csv, write_json, write_text
from src.folder_lock import lock_folder
from src.json_reader import read_json
from tools.study.cell_state import CellState, read_cell_state
from tools.study.cells import Cell
from tools.study.networks import Network, check_networks
from tools.study.plots import plot_by_cost, plot_by_images, plot_curves
from tools.study.results import COLUMNS, Result, Spread, markdown, top1_by_seed
from tools.study.train_process import TrainProcess

logger = logging.getLogger("cvt")
INDEX_FILE = "images.json"
DATA_FILE = "data.json"  # checksums of each model's images
# Plots of accuracy in the course of training: the label and values of their horizontal axis.
CURVES = {
    "accuracy_epochs.png": ("epochs (passes over these images)", lambda r: r.passes),
    "accuracy_operations.png": (
        "training, 10^12 multiply-accumulates", lambda r: r.training_macs / 1e12
    ),
    "accuracy_time.png": ("training, minutes", lambda r: r.seconds / 60),
}  # fmt: skip
RESULT_FILES = ("cells.csv", "table.md", "accuracy_images.png", *CURVES, "accuracy_cost.png")


class StudyRunner:
    """Trains the cells of a study in a folder.

    Args:
        cells: all cells.
        output: the folder: a run for each cell in cells/, and the study's result files.
        only: pattern for the names of the cells to train; the result files cover all finished ones.

    Raises:
        UserError: a cell cannot be trained or was trained under other settings.
    """

    def __init__(self, cells: Sequence[Cell], output: Path, only: str = "*") -> None:
        self.cells = list(cells)
        self.output = output
        self.chosen = [cell for cell in cells if fnmatchcase(cell.name, only)]
        if not self.chosen:
            raise UserError(f"--only {only}: matches no cell; one is {cells[0].name}")
        self.states: dict[str, CellState] = {
            cell.name: read_cell_state(cell, self._folder(cell)) for cell in cells
        }
        self.networks: dict[str, Network] = check_networks(cells)
        for cell in cells:
            self._require_same_classes(cell)

    def _require_same_classes(self, cell: Cell) -> None:
        """Refuse to put results of other data into the tables."""
        before = self.states[cell.name].class_names
        if before and tuple(before) != self.networks[cell.model].class_names:
            now = join_names(self.networks[cell.model].class_names, 3)
            raise UserError(
                f"{self._folder(cell)}: was trained on the classes {join_names(before, 3)}, this "
                f"data set has {now}; give another --output, or the data of that cell"
            )

    def _require_same_images(self) -> None:
        """Refuse to continue with other images; classes of the same names may have them."""
        file = self.output / DATA_FILE
        now = {model: list(network.images) for model, network in self.networks.items()}
        try:
            before = read_json(file) if file.exists() else {}
            changed = any(before.get(model, images) != images for model, images in now.items())
        except (OSError, ValueError, AttributeError):
            raise UserError(f"{file}: is damaged; remove it if the images are the same") from None
        if changed:
            raise UserError(
                f"{self.output}: its cells were trained or evaluated on other images; give another "
                "--output, or the data of these cells"
            )
        write_json({**before, **now}, file)

    def _folder(self, cell: Cell) -> Path:
        return self.output / "cells" / cell.name

    def list_cells(self) -> None:
        """Print the chosen cells and how far each is."""
        for cell in self.chosen:
            state, network = self.states[cell.name], self.networks[cell.model]
            progress = f"{self._steps_done(cell)} of {cell.steps} steps"
            if state.finished:
                progress = f"done, top1 {state.rows[-1]['top1']:.2f}"
            print(
                f"{cell.name}: {network.parameters:,} parameters, {network.macs / 1e6:,.1f} MMACs; "
                f"{progress}"
            )

    def run(self) -> None:
        """Train the unfinished cells one after the other; rewrite the result files after each.

        Raises:
            UserError: cells that failed; the others are finished.
            SystemExit: 128 + the stop signal; the running cell has saved its state.
        """
        self._require_own_folder()
        todo = [cell for cell in self.chosen if not self.states[cell.name].finished]
        failed = []
        finished = sum(state.finished for state in self.states.values())
        logger.info("%d of %d cells are done, %d to train", finished, len(self.cells), len(todo))
        with lock_folder(self.output), TrainProcess() as process:
            (self.output / "cells").mkdir(exist_ok=True)
            self._require_same_images()
            for number, cell in enumerate(todo):
                left = self._time_left(todo[number:])
                logger.info("cell %d of %d: %s%s", number + 1, len(todo), cell.name, left)
                self._train(cell, process)
                state = self.states[cell.name]
                if not state.finished:
                    failed.append(cell.name)
                    continue
                self.write_results()
                logger.info("%s: top1 %.2f", cell.name, state.rows[-1]["top1"])
            self.write_results()
        if failed:
            raise UserError(
                f"{len(failed)} of {len(todo)} cells failed: {', '.join(failed)}; each one's error "
                "is printed above. The same command tries them again"
            )

    def _require_own_folder(self) -> None:
        """Refuse to overwrite files in a folder that no study has written."""
        if (self.output / "cells").is_dir():
            return
        for name in (DATA_FILE, *RESULT_FILES):
            if (self.output / name).exists():
                raise UserError(
                    f"{self.output}: {name} would be overwritten and was not written by a study; "
                    "give another --output"
                )

    def _train(self, cell: Cell, process: TrainProcess) -> None:
        folder = self._folder(cell)
        arguments = [*self._arguments(cell), f"--output={folder}"]
        if self.states[cell.name].resumable:
            arguments.append("--resume")
        logger.info("python train.py %s", shlex.join(arguments))
        code = process.run(arguments)
        self.states[cell.name] = read_cell_state(cell, folder)
        if code:
            logger.error("%s: train.py exited with code %d", cell.name, code)

    def _arguments(self, cell: Cell) -> list[str]:
        """Let all cells share one index of an image folder, so that it is checked only once."""
        data = cell.config.data
        shared = data.source == "imagefolder" and data.index is None
        return [*cell.arguments, *[f"--data.index={self.output / INDEX_FILE}"] * shared]

    def _steps_done(self, cell: Cell) -> int:
        rows = self.states[cell.name].rows
        return rows[-1]["step"] if rows else 0

    def _time_left(self, cells: Sequence[Cell]) -> str:
        """Estimate the time for some cells from the epochs of each model so far."""
        seconds: dict[str, float] = {}
        steps: dict[str, int] = {}
        for cell in self.cells:
            spent = sum(row["seconds"] for row in self.states[cell.name].rows)
            seconds[cell.model] = seconds.get(cell.model, 0.0) + spent
            steps[cell.model] = steps.get(cell.model, 0) + self._steps_done(cell)
        if not all(steps[cell.model] for cell in cells):
            return ""
        left = sum(
            (cell.steps - self._steps_done(cell)) * seconds[cell.model] / steps[cell.model]
            for cell in cells
        )
        return f"; about {timedelta(seconds=round(left))} left"

    def write_results(self) -> None:
        """Write cells.csv, table.md and the plots of the finished cells."""
        results = [
            Result(cell, self.networks[cell.model], self.states[cell.name].rows)
            for cell in self.cells
            if self.states[cell.name].finished
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
        for (model, size), values in top1_by_seed(results).items():
            spread = Spread.of(list(values.values()))
            points[model][size] = spread.mean, spread.deviation
        plot_by_images(points, self.output / "accuracy_images.png")
        by_size = {size: {} for size in sorted({r.cell.train_images for r in results})}
        for result in results:
            cell = result.cell
            by_size[cell.train_images].setdefault(cell.model, []).append(result)
        for name, (xlabel, positions) in CURVES.items():
            curves = {
                size: {
                    model: (positions(same[0]), np.array([each.curve for each in same]))
                    for model, same in ((m, by_model[m]) for m in points if m in by_model)
                }
                for size, by_model in by_size.items()
            }
            plot_curves(curves, list(points), xlabel, self.output / name)
        largest = max(by_size)
        costs = {
            model: (self.networks[model].parameters, self.networks[model].macs, sizes[largest])
            for model, sizes in points.items()
            if largest in sizes
        }
        plot_by_cost(costs, list(points), largest, self.output / "accuracy_cost.png")
