"""Where a deployed network's time goes, by kind of operator."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np

PROFILED = 4  # batches


def profile(path: Path, images: np.ndarray) -> dict[str, float]:
    """Milliseconds of a batch by kind of operator; MindSpore's profiler works once a process."""
    from mindspore import Profiler

    from src.deploy.engines import open_model

    forward, folder = open_model(path), path.with_suffix(".profile")
    forward(images)
    profiler = Profiler(output_path=str(folder))
    for _ in range(PROFILED):
        forward(images)
    profiler.stop()
    rows = csv.DictReader(next(folder.rglob("cpu_op_type_info_*.csv")).read_text().splitlines())
    shutil.rmtree(folder)
    return {row["op_type"]: float(row["total_compute_time"]) / PROFILED for row in rows}


def profile_table(unfused: dict[str, float], fused: dict[str, float]) -> list[str]:
    """Milliseconds a batch, the dearest kind of operator first."""
    kinds = sorted({*unfused, *fused}, key=lambda kind: -unfused.get(kind, 0))
    rows = [f"| | {' | '.join(kinds)} | sum |", "|---" * (len(kinds) + 2) + "|"]
    for name, times in (("unfused", unfused), ("fused", fused)):
        cells = [*(times.get(kind, 0) for kind in kinds), sum(times.values())]
        rows.append(f"| {name} | {' | '.join(f'{each:,.0f}' for each in cells)} |")
    return rows
