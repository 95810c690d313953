"""Ours beside the peers: each in a process of its own, told in turn to run a round."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mindspore import nn

from src.build import build_model, image_size, without_flash_attention
from src.config import Config
from src.config_io import save_config
from src.errors import UserError
from src.models.complexity import complexity, uninitialised
from tools.benchmark.process import Side, usable_cores
from tools.benchmark.table import (
    print_compile,
    print_measured,
    summarise,
    warn_of_idle_work,
)
from tools.benchmark.workload import Plan, make_job, plan_matmul, plan_sides

MATMUL_SECONDS = 1.0


@dataclasses.dataclass
class Options:
    """What the command line says beyond the recipe.

    Args:
        mode: "infer", "train", "data" or "compile".
        batch_size: images a step.
        rounds: of each side; in mode "compile", fresh processes of each.
        seconds: of a round, about.
        threads: cores for every side; None takes all.
        images: of a pass in mode "data".
        peer: names or scripts.
        peer_python: the peers' interpreter.
        model_file: exported files to be further sides of "infer".
        engine: what runs them; nothing takes infer.py's choice.
        reference: name of the side whose speed the ratios compare; None takes ours.
        plain: whether ours without compiled operators is a further side.
        predictor: whether `Predictor` in a plain Python process is a further side of "infer".
    """

    mode: str
    batch_size: int = 16
    rounds: int = 5
    seconds: float = 3.0
    threads: int | None = None
    images: int = 1000
    peer: Sequence[str] = ()
    peer_python: str | None = None
    model_file: Sequence[str] = ()
    engine: Sequence[str] = ()
    reference: str | None = None
    plain: bool = False
    predictor: bool = False


def measure(config: Config, options: Options) -> dict[str, Any]:
    """Print and return what the sides do in alternating rounds.

    Raises:
        UserError: something that can't be measured, or a peer that fails.
    """
    cores = usable_cores(options.threads)
    with _prepared(config, options, len(cores)) as (net, job):
        plans = plan_sides(net, config, options, job)
        reference = options.reference or plans[0].name
        if reference not in (plan.name for plan in plans):
            names = ", ".join(plan.name for plan in plans)
            raise UserError(f"--reference {reference}: no such side; choose from {names}")
        macs = None if options.mode == "data" else complexity(net, image_size(config.model))
        matmul = [] if macs is None else [plan_matmul(job)]
        with contextlib.ExitStack() as stack:
            sides = [stack.enter_context(Side(plan, cores)) for plan in (*plans, *matmul)]
            started = start_all(sides, _parameters(net))
            rounds = alternate(sides, options.rounds, options.seconds)
    figures = {
        **_head(config, options, len(cores)),
        "sides": summarise(
            started,
            rounds,
            options.mode,
            None if macs is None else macs.total.total_macs,
            reference,
        ),
        "reference": reference,
    }
    print_measured(figures)
    warn_of_idle_work(rounds)
    return figures


def measure_compile(config: Config, options: Options) -> dict[str, Any]:
    """Print and return how long first calls take, each in a fresh process.

    Raises:
        UserError: as `measure`.
    """
    cores = usable_cores(options.threads)
    found: dict[tuple[str, str], list[dict]] = {}
    with _prepared(config, options, len(cores)) as (net, job):
        for _ in range(options.rounds):
            for task in ("infer", "train"):
                plans = plan_sides(net, config, options, {**job, "mode": task, "once": True})
                for name, answer in _start_alone(plans, cores, _parameters(net)).items():
                    found.setdefault((name, task), []).append(answer)
    figures = {
        **_head(config, options, len(cores)),
        "sides": [
            {
                "name": name,
                "task": task,
                "what": answers[0]["what"],
                "first_call_seconds": _median(answers, "first_call_seconds"),
                "first_calls": [answer["first_call_seconds"] for answer in answers],
                "prepare_seconds": _median(answers, "prepare_seconds"),
                "peak_memory": max(answer["peak_memory"] for answer in answers),
            }
            for (name, task), answers in found.items()
        ],
    }
    print_compile(figures)
    return figures


def start_all(sides: Sequence[Side], parameters: int | None = None) -> dict[str, dict]:
    """Prepare and warm up one side after the other; returns their answers by name.

    Raises:
        UserError: a peer whose network has not so many parameters, or ours on another device.
    """
    started = {}
    for side in sides:
        answer = started[side.name] = side.start()
        if answer.get("device", "CPU") != "CPU" and any(other.is_peer for other in sides):
            raise UserError(
                f"--peer: peers run on the CPU, ours on {answer['device']}; set runtime.device CPU"
            )
        theirs = answer.get("parameters", parameters)
        if theirs != parameters:
            raise UserError(
                f"{side.name} has {theirs:,} parameters, ours {parameters:,}: they would not do "
                "the same work"
            )
    return started


def alternate(sides: Sequence[Side], rounds: int, seconds: float) -> dict[str, list[dict]]:
    """Let the sides run in turn, every second time in reverse; their answers by name.

    The order changes so that a machine that slows down does so for each of them.
    """
    answers: dict[str, list[dict]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            length = min(seconds, MATMUL_SECONDS) if side.name == "matmul" else seconds
            answers[side.name].append(side.round(length))
    return answers


def _start_alone(plans: Sequence[Plan], cores: Sequence[int], parameters: int) -> dict[str, dict]:
    """As `start_all`, each side gone before the next one starts."""
    started = {}
    for plan in plans:
        with Side(plan, cores) as side:
            started.update(start_all([side], parameters))
    return started


@contextlib.contextmanager
def _prepared(config: Config, options: Options, threads: int) -> Iterator[tuple[nn.Cell, dict]]:
    """The network, whose shapes alone are of use, and the job with the recipe in a file."""
    training = dataclasses.replace(config.training, batch_size=options.batch_size)
    config = dataclasses.replace(config, training=training)
    with uninitialised():
        net = build_model(without_flash_attention(config))
    with tempfile.TemporaryDirectory(prefix="cvt-benchmark-") as folder:
        file = Path(folder) / "config.yaml"
        save_config(config, file)
        job = make_job(config, options.mode, options.batch_size, threads, options.images)
        yield net, {**job, "config_file": str(file)}


def _head(config: Config, options: Options, threads: int) -> dict[str, Any]:
    return {
        "mode": options.mode,
        "model": config.model.name,
        "image_size": list(image_size(config.model)),
        "num_classes": config.model.num_classes,
        "batch_size": options.batch_size,
        "precision": config.runtime.precision,
        "threads": threads,
        "rounds": options.rounds,
    }


def _parameters(net: nn.Cell) -> int:
    return sum(parameter.size for parameter in net.trainable_params())


def _median(answers: Sequence[dict], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)
