"""Computes results from the answers of the measured processes and prints them as tables."""

from __future__ import annotations

import logging
import statistics
from typing import Any

from src.models.complexity import format_table
from tools.benchmark.worker import MATMUL_SIZE

logger = logging.getLogger("cvt")

PASSES = {"infer": 1, "train": 3}  # a backward pass costs two forward ones
CLOCK_TICK = 0.01  # seconds; the resolution of a process's CPU time
MOST_IDLE = 0.05  # cores that a side may keep busy during another's turn


def summarise(
    started: dict[str, dict],
    rounds: dict[str, list[dict]],
    mode: str,
    macs: int | None,
    reference: str,
) -> list[dict[str, Any]]:
    """Compute the results of each side.

    Args:
        started: each side's first answer.
        rounds: each side's answers to the rounds, in their order.
        mode: "infer", "train" or "data".
        macs: of the network per image; None in mode "data".
        reference: the side whose speed is divided by the others'.

    Returns:
        For each side name, what, images_per_second (median of its rounds; all in `rounds`), ratio
        (median over the rounds of reference / this side), images_per_core_second (of CPU time),
        first_call_seconds, prepare_seconds; with macs also peak_memory in bytes, gflops (a MAC is
        two) and fraction_of_peak (of "matmul", the last side, which has no ratio).
    """
    speeds = {
        name: [r["images"] / r["seconds"] for r in answers] for name, answers in rounds.items()
    }
    sides = []
    for name, answers in rounds.items():
        is_matmul = name == "matmul"
        side = {
            "name": name,
            "what": started[name]["what"],
            "first_call_seconds": started[name]["first_call_seconds"],
            "prepare_seconds": started[name]["prepare_seconds"],
        }
        if not is_matmul:
            side.update(
                images_per_second=statistics.median(speeds[name]),
                rounds=speeds[name],
                ratio=statistics.median(a / b for a, b in zip(speeds[reference], speeds[name])),
                images_per_core_second=statistics.median(
                    a["images"] / max(a["cpu_seconds"], CLOCK_TICK) for a in answers
                ),
            )
        if macs is not None:
            flops = 2 * (MATMUL_SIZE**3 if is_matmul else macs * PASSES[mode])
            side["gflops"] = statistics.median(speeds[name]) * flops / 1e9
            side["peak_memory"] = answers[-1]["peak_memory"]
        sides.append(side)
    for side in sides if macs is not None else ():
        side["fraction_of_peak"] = side["gflops"] / sides[-1]["gflops"]
    return sides


def warn_of_idle_work(rounds: dict[str, list[dict]]) -> None:
    """Warn of sides that used the CPU during another's turn, which distorts the results."""
    for name, answers in rounds.items():
        others = sum(r["seconds"] for n, all_ in rounds.items() if n != name for r in all_[:-1])
        idle = sum(answer["idle_cpu_seconds"] for answer in answers[1:])
        if others and idle / others > MOST_IDLE:
            logger.warning(
                "%s kept %.2f cores busy during the others' turns: the results are unreliable",
                name, idle / others,
            )  # fmt: skip


def print_measured(result: dict[str, Any]) -> None:
    """Print a line for each side, and its software."""
    _print_title(result)
    networks = "gflops" in result["sides"][0]
    head = ["", "img/s", "of all rounds", f"{result['reference']} is", "img/core s", "first call"]
    rows = [head + ["memory", "GFLOP/s", "of matmul"] * networks]
    for side in result["sides"]:
        cells = [side["name"], "", "", "", "", ""]
        if "rounds" in side:
            low, high = min(side["rounds"]), max(side["rounds"])
            cells = [
                side["name"],
                f"{side['images_per_second']:.4g}",
                f"{low:.4g} to {high:.4g}",
                "" if side["name"] == result["reference"] else f"{side['ratio']:.2f} x",
                f"{side['images_per_core_second']:.4g}",
                f"{side['first_call_seconds']:.1f} s",
            ]
        if networks:
            cells += [
                f"{side['peak_memory'] / 1e6:.0f} MB",
                f"{side['gflops']:.4g}",
                f"{100 * side['fraction_of_peak']:.1f} %",
            ]
        rows.append(cells)
    print(format_table(rows))
    for side in result["sides"]:
        print(f"{side['name']}: {side['what']}")


def print_compile(result: dict[str, Any]) -> None:
    """Print a line for each side and task."""
    _print_title(result)
    rows = [["", "task", "first call", "of all", "before it", "memory"]]
    for side in result["sides"]:
        calls = side["first_calls"]
        rows.append(
            [
                side["name"],
                side["task"],
                f"{side['first_call_seconds']:.1f} s",
                f"{min(calls):.1f} to {max(calls):.1f} s",
                f"{side['prepare_seconds']:.1f} s",
                f"{side['peak_memory'] / 1e6:.0f} MB",
            ]
        )
    print(format_table(rows))


def _print_title(result: dict[str, Any]) -> None:
    height, width = result["image_size"]
    network = "" if result["mode"] == "data" else f"{result['model']}, {result['precision']}, "
    print(
        f"{result['mode']}: {network}image {height} x {width}, batch {result['batch_size']}, "
        f"cores for each side: {result['threads']}, medians of rounds: {result['rounds']}"
    )
