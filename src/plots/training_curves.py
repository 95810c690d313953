"""Draw the training curves of a run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from src.plots.image_files import save_figure


def plot_curves(rows: list[dict], path: Path) -> None:
    """Draw loss and accuracy by epoch.

    Args:
        rows: the objects of metrics.jsonl, in order.
        path: the file.
    """
    epochs = [row["epoch"] for row in rows]
    evaluated = [row for row in rows if row["top1"] is not None]
    eval_epochs = [row["epoch"] for row in evaluated]
    figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot, which may need a display
    losses, accuracies = figure.subplots(1, 2)
    losses.plot(epochs, [row["train_loss"] for row in rows], marker=".", label="training")
    losses.plot(eval_epochs, [row["loss"] for row in evaluated], marker=".", label="held out")
    losses.set(xlabel="epoch", ylabel="cross entropy")
    best = max((row["top1"] for row in evaluated), default=0)
    top1, top5 = ([row[key] for row in evaluated] for key in ("top1", "top5"))
    accuracies.plot(eval_epochs, top1, marker=".", label=f"top-1 (best {best:.2f})")
    accuracies.plot(eval_epochs, top5, marker=".", label="top-5")
    accuracies.set(xlabel="epoch", ylabel="held-out accuracy, %")
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path, dpi=100)
