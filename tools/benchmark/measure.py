"""Measures our code and peers side by side, each in its own process, in alternating rounds."""

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
from src.models import uninitialised
from src.models.complexity import complexity
from tools.benchmark.process import BenchmarkProcess, select_cores
from tools.benchmark.table import print_compile, print_measured, summarise, warn_of_idle_work
from tools.benchmark.workload import Options, make_job, plan_matmul, plan_sides

MATMUL_SECONDS = 1.0


def measure(config: Config, options: Options) -> dict[str, Any]:
    """Print and return the speed of each side.

    Raises:
        UserError: something cannot be measured, or a peer fails.
    """
    cores = select_cores(options.threads)
    with _prepare(config, options, len(cores)) as (net, job):
        plans = plan_sides(net, config, options, job)
        reference = options.reference or plans[0].name
        if reference not in (plan.name for plan in plans):
            names = ", ".join(plan.name for plan in plans)
            raise UserError(f"--reference {reference}: no such side; choose from {names}")
        macs = None
        if options.mode != "data":
            macs = complexity(net, image_size(config.model)).total.total_macs
            plans.append(plan_matmul(job))
        with contextlib.ExitStack() as stack:
            sides = [stack.enter_context(BenchmarkProcess(plan, cores)) for plan in plans]
            started = start_all(sides, _count_parameters(net))
            rounds = alternate(sides, options.rounds, options.seconds)
    result = {
        **_describe(config, options, len(cores)),
        "sides": summarise(started, rounds, options.mode, macs, reference),
        "reference": reference,
    }
    print_measured(result)
    warn_of_idle_work(rounds)
    return result


def measure_compile(config: Config, options: Options) -> dict[str, Any]:
    """Print and return how long first calls take, each in a new process.

    Raises:
        UserError: as in `measure`.
    """
    cores = select_cores(options.threads)
    answers: dict[tuple[str, str], list[dict]] = {}
    with _prepare(config, options, len(cores)) as (net, job):
        for _ in range(options.rounds):
            for task in ("infer", "train"):
                job = {**job, "mode": task, "once": True}
                for plan in plan_sides(net, config, options, job):
                    with BenchmarkProcess(plan, cores) as process:
                        answer = start_all([process], _count_parameters(net))[plan.name]
                    answers.setdefault((plan.name, task), []).append(answer)
    result = {
        **_describe(config, options, len(cores)),
        "sides": [
            {
                "name": name,
                "task": task,
                "what": found[0]["what"],
                "first_call_seconds": statistics.median(a["first_call_seconds"] for a in found),
                "first_calls": [answer["first_call_seconds"] for answer in found],
                "prepare_seconds": statistics.median(a["prepare_seconds"] for a in found),
                "peak_memory": max(answer["peak_memory"] for answer in found),
            }
            for (name, task), found in answers.items()
        ],
    }
    print_compile(result)
    return result


def start_all(
    sides: Sequence[BenchmarkProcess], parameters: int | None = None
) -> dict[str, dict[str, Any]]:
    """Prepare and warm up one side after the other; returns their first answers by name.

    Raises:
        UserError: a peer's number of parameters differs, or ours runs on another device.
    """
    answers = {}
    for side in sides:
        answer = answers[side.name] = side.start()
        if answer.get("device", "CPU") != "CPU" and any(other.is_peer for other in sides):
            raise UserError(
                f"--peer: peers run on the CPU, ours on {answer['device']}; set runtime.device CPU"
            )
        theirs = answer.get("parameters", parameters)
        if theirs != parameters:
            raise UserError(
                f"{side.name} has {theirs:,} parameters, ours {parameters:,}; the networks must be "
                "the same"
            )
    return answers


def alternate(
    sides: Sequence[BenchmarkProcess], rounds: int, seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Run the sides in turn, every second time in reverse; returns their answers by name.

    The order changes so that a machine that slows down does so for every side.
    """
    answers: dict[str, list[dict]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            length = min(seconds, MATMUL_SECONDS) if side.name == "matmul" else seconds
            answers[side.name].append(side.run_round(length))
    return answers


@contextlib.contextmanager
def _prepare(config: Config, options: Options, threads: int) -> Iterator[tuple[nn.Cell, dict]]:
    """Yield the network, uninitialised, and the job with the recipe in a temporary file."""
    training = dataclasses.replace(config.training, batch_size=options.batch_size)
    config = dataclasses.replace(config, training=training)
    with uninitialised():
        net = build_model(without_flash_attention(config))
    with tempfile.TemporaryDirectory(prefix="cvt-benchmark-") as folder:
        file = Path(folder) / "config.yaml"
        save_config(config, file)
        job = make_job(config, options.mode, options.batch_size, threads, options.images)
        yield net, {**job, "config_file": str(file)}


def _describe(config: Config, options: Options, threads: int) -> dict[str, Any]:
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


def _count_parameters(net: nn.Cell) -> int:
    return sum(parameter.size for parameter in net.trainable_params())
