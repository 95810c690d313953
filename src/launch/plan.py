"""What `scripts/run_distribute_train.sh` is asked to do, checked before anything starts."""

from __future__ import annotations

import argparse
import glob
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from src.cli import parse, take_option
from src.config_io import default_output
from src.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("Ascend", "GPU", "CPU")
# Seconds, where the user sets none. HCCL's own 120 and 1836 are too short for what a rank may wait
# for: the others' compilation before the first collective of a graph, and rank 0 saving a state.
# Within CANN's bounds (7200 and 17340), and a multiple of 68, to which the 910 rounds down.
HCCL_TIMEOUTS = {"HCCL_CONNECT_TIMEOUT": "1800", "HCCL_EXEC_TIMEOUT": "7140"}
FIRST_PORT, LAST_PORT = 1024, 65535


@dataclass
class Plan:
    """A job as this host starts it.

    Args:
        target: Ascend, GPU or CPU.
        world: ranks on all hosts.
        ranks: the ranks of this host, each with the environment that makes it that rank.
        node_num, node_rank: hosts, and this one among them.
        master_addr, master_port: where the first host's scheduler listens.
        command: of every rank, after the interpreter.
        logs: folder of the ranks' logs.
        environment: set for every rank.
        bind_core: msrun's option, by which it binds ranks to cores; None leaves it out.
    """

    target: str
    world: int
    ranks: dict[int, dict[str, str]]
    node_num: int
    node_rank: int
    master_addr: str
    master_port: int
    command: list[str]
    logs: Path
    environment: dict[str, str] = field(default_factory=dict)
    bind_core: str | None = None


def read_plan(argv: Sequence[str], environ: Mapping[str, str], usage: str) -> tuple[Plan, bool]:
    """The plan of a command line and its environment, and whether it is only to be shown.

    Raises:
        UserError: an argument, device, port, configuration or data that can't be used.
    """
    parser = argparse.ArgumentParser(usage=usage, add_help=False, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--bind_core", nargs="?", const="True")
    parser.add_argument("config")
    parser.add_argument("data")
    parser.add_argument("devices", nargs="?")
    own, keys = _split(list(argv))
    arguments = parser.parse_args(own)
    _check_bind_core(arguments.bind_core)
    target = environ.get("DEVICE_TARGET", "Ascend")
    if target not in TARGETS:
        raise UserError(f"DEVICE_TARGET={target}: choose one of {', '.join(TARGETS)}")
    command = _train_command(arguments.config, arguments.data, target, keys)
    logs = Path(command[-1]) / "ranks" / time.strftime("%Y%m%d-%H%M%S")
    if "RANK_TABLE_FILE" in environ:
        raise UserError(
            "RANK_TABLE_FILE: jobs start by msrun, which needs no rank table; unset it, and give "
            "NODE_NUM, NODE_RANK and MASTER_ADDR for several hosts"
        )
    plan = _plan(target, arguments.devices, command, logs, environ)
    if arguments.bind_core is not None:
        plan.bind_core = arguments.bind_core
        plan.environment.pop("LOCAL_WORLD_SIZE", None)  # the cores are shared out already
    if not arguments.dry_run and plan.node_rank == 0:
        _require_free(plan.master_port)
    return plan, arguments.dry_run


def _refuse(message: str) -> None:
    raise UserError(f"{message}; --help shows how to call it")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The script's own words, and the keys for train.py behind them."""
    own, keys = [], []
    for word in argv:
        is_own = word.partition("=")[0] in ("--dry_run", "--bind_core")
        (own if is_own or not keys and not word.startswith("--") else keys).append(word)
    return sorted(
        own, key=lambda word: word.startswith("--")
    ), keys  # a flag takes no word after it


def _check_bind_core(value: str | None) -> None:
    if value in (None, "True"):
        return
    try:
        cores = json.loads(value)
    except ValueError:
        cores = None
    if not isinstance(cores, dict) or not all(isinstance(c, list) for c in cores.values()):
        raise UserError(
            f"--bind_core={value}: leave the value out, or give msrun's form, as "
            """--bind_core='{"device0": ["0-11"], "device1": ["12-23"]}'"""
        )


def _train_command(config: str, data: str, target: str, keys: list[str]) -> list[str]:
    """train.py with its arguments, the run's folder last; everything absolute and checked."""
    file = next((p for p in (Path(config), ROOT / config) if p.is_file()), None)
    if file is None:
        raise UserError(f"CONFIG {config}: no such file; give a recipe, as config/digits/*.yaml")
    words = ["--config", str(file.resolve())]
    if data != "-":
        if not Path(data).expanduser().exists():
            raise UserError(f"DATA {data}: no such folder; give the data's, or - for the config's")
        words += ["--data.path", str(Path(data).expanduser().resolve())]
    keys, output = take_option(keys, "--output")
    words += ["--runtime.device", target, *keys]

    def add_arguments(parser) -> None:
        parser.add_argument("--resume", nargs="?", const=True)
        parser.add_argument("--accept_changes", action="store_true")
        parser.add_argument("--finetune", type=str)

    parse(words, "train.py", "", add_arguments)  # finds unknown keys now, and once
    output = Path(output or default_output(str(file)))
    return [str(ROOT / "train.py"), *words, "--output", str(output.resolve())]


def _plan(
    target: str, devices: str | None, command: list[str], logs: Path, environ: Mapping[str, str]
) -> Plan:
    node_num = _integer(environ, "NODE_NUM", 1, 1)
    node_rank = _integer(environ, "NODE_RANK", 0, 0)
    if node_rank >= node_num:
        raise UserError(f"NODE_RANK={node_rank}: hosts count from 0 to NODE_NUM-1={node_num - 1}")
    if node_num > 1 and "MASTER_ADDR" not in environ:
        raise UserError(f"NODE_NUM={node_num}: give the first host's address as MASTER_ADDR")
    port = _integer(environ, "MASTER_PORT", 8118, FIRST_PORT)
    if port > LAST_PORT:
        raise UserError(f"MASTER_PORT={port}: ports end at {LAST_PORT}")
    visible = visible_devices(target, environ)
    local = len(visible) if devices is None else _count(devices)
    if local > len(visible) or local < 1:
        what = "cores" if target == "CPU" else f"{target} devices"
        raise UserError(
            f"DEVICE_NUM {local}: {len(visible)} {what} are visible on this host; ask for fewer, "
            "or choose another DEVICE_TARGET (Ascend, GPU, CPU)"
        )
    first = node_rank * local
    ranks = {
        first + i: {"RANK_ID": str(first + i), "DEVICE_ID": str(i), "MS_NODE_ID": str(first + i)}
        for i in range(local)
    }
    address = environ.get("MASTER_ADDR", "127.0.0.1")
    world = local * node_num
    environment = {
        "MS_WORKER_NUM": str(world),
        "MS_SCHED_HOST": address,
        "MS_SCHED_PORT": str(port),
        "MS_ROLE": "MS_WORKER",
        "RANK_SIZE": str(world),
    }
    if target == "Ascend":
        environment.update({k: environ.get(k, v) for k, v in HCCL_TIMEOUTS.items()})
    if target == "CPU":
        environment["LOCAL_WORLD_SIZE"] = str(local)  # src.device shares the cores out by it
    return Plan(
        target, world, ranks, node_num, node_rank, address, port, command, logs, environment
    )


def _count(devices: str) -> int:
    if not devices.isdigit():
        raise UserError(f"DEVICE_NUM {devices}: must be a number of devices on this host")
    return int(devices)


def _integer(environ: Mapping[str, str], name: str, default: int, least: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdigit() or int(value) < least:
        raise UserError(f"{name}={value}: must be a whole number, {least} or more")
    return int(value)


def visible_devices(target: str, environ: Mapping[str, str]) -> list[int]:
    """Numbers of the devices on this host; of cores on a CPU."""
    if target == "CPU":
        affinity = getattr(os, "sched_getaffinity", None)
        return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))
    variable = "ASCEND_RT_VISIBLE_DEVICES" if target == "Ascend" else "CUDA_VISIBLE_DEVICES"
    if environ.get(variable):
        return list(range(len(environ[variable].split(","))))
    pattern = "/dev/davinci[0-9]*" if target == "Ascend" else "/dev/nvidia[0-9]*"
    prefix = pattern.partition("[")[0]
    return sorted(int(p[len(prefix) :]) for p in glob.glob(pattern) if p[len(prefix) :].isdigit())


def _require_free(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"MASTER_PORT={port}: {error.strerror}; another job runs here, or choose another"
            ) from None
