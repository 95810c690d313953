"""Parse and check the arguments of scripts/run_distribute_train.sh before anything starts."""

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
# Seconds, unless the user sets them. HCCL's defaults, 120 and 1836, are too short: a rank waits for
# the others to compile before a graph's first collective, and for rank 0 to save a state.
# CANN allows up to 7200 and 17340; the 910 rounds the second down to a multiple of 68.
HCCL_TIMEOUTS = {"HCCL_CONNECT_TIMEOUT": "1800", "HCCL_EXEC_TIMEOUT": "7140"}
FIRST_PORT, LAST_PORT = 1024, 65535


@dataclass
class Plan:
    """The part of a job that this host starts.

    Args:
        world: number of ranks on all hosts.
        ranks: this host's ranks, each with the environment variables that identify it.
        node_num, node_rank: number of hosts, and index of this host.
        master_addr, master_port: address of the scheduler, on the first host.
        command: arguments of the Python interpreter, the same for every rank.
        logs: folder of the ranks' logs.
        environment: environment variables of every rank.
        bind_core: value of msrun's --bind_core; None omits it.
    """

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
    """Return the plan for a command line and its environment, and whether --dry_run is set.

    Raises:
        UserError: an argument, device, port, configuration or data path is invalid.
    """
    parser = argparse.ArgumentParser(usage=usage, add_help=False, allow_abbrev=False)
    parser.error = _raise_usage_error
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--bind_core", nargs="?", const="True")
    parser.add_argument("config")
    parser.add_argument("data")
    parser.add_argument("devices", nargs="?")
    launch_words, keys = _split_arguments(argv)
    arguments = parser.parse_args(launch_words)
    _check_bind_core(arguments.bind_core)
    target = environ.get("DEVICE_TARGET", "Ascend")
    if target not in TARGETS:
        raise UserError(f"DEVICE_TARGET={target}: choose one of {', '.join(TARGETS)}")
    command = _train_command(arguments.config, arguments.data, target, keys)
    logs = Path(command[-1]) / "ranks" / time.strftime("%Y%m%d-%H%M%S")
    if "RANK_TABLE_FILE" in environ:
        raise UserError(
            "RANK_TABLE_FILE: msrun starts the ranks without a rank table; unset it, and for "
            "several hosts set NODE_NUM, NODE_RANK and MASTER_ADDR"
        )
    plan = _build_plan(target, arguments.devices, command, logs, environ)
    if arguments.bind_core is not None:
        plan.bind_core = arguments.bind_core
        # src.device would divide a rank's cores by it, but msrun has divided them already.
        plan.environment.pop("LOCAL_WORLD_SIZE", None)
    if not arguments.dry_run and plan.node_rank == 0:
        _require_free(plan.master_port)
    return plan, arguments.dry_run


def _raise_usage_error(message: str) -> None:
    raise UserError(f"{message}; see --help")


def _split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into this script's arguments and the options of train.py."""
    positional, flags, keys = [], [], []
    for word in argv:
        if word.partition("=")[0] in ("--dry_run", "--bind_core"):
            flags.append(word)
        elif keys or word.startswith("--"):
            keys.append(word)
        else:
            positional.append(word)
    return [*positional, *flags], keys  # flags last, or --bind_core would consume a positional


def _check_bind_core(value: str | None) -> None:
    if value in (None, "True"):
        return
    try:
        cores = json.loads(value)
    except ValueError:
        cores = None
    if not isinstance(cores, dict) or not all(isinstance(c, list) for c in cores.values()):
        raise UserError(
            f"--bind_core={value}: omit the value, or give it in msrun's form: "
            """--bind_core='{"device0": ["0-11"], "device1": ["12-23"]}'"""
        )


def _train_command(config: str, data: str, target: str, keys: list[str]) -> list[str]:
    """Return train.py and its checked arguments with absolute paths; --output DIR comes last."""
    file = next((p for p in (Path(config), ROOT / config) if p.is_file()), None)
    if file is None:
        raise UserError(
            f"CONFIG {config}: no such file; give a recipe such as config/digits/cvt_nano.yaml"
        )
    words = ["--config", str(file.resolve())]
    if data != "-":
        if not Path(data).expanduser().exists():
            raise UserError(
                f"DATA {data}: no such folder; give a data folder, or - for the recipe's data.path"
            )
        words += ["--data.path", str(Path(data).expanduser().resolve())]
    keys, output = take_option(keys, "--output")
    words += ["--runtime.device", target, *keys]

    def add_arguments(parser) -> None:
        parser.add_argument("--resume", nargs="?", const=True)
        parser.add_argument("--accept_changes", action="store_true")
        parser.add_argument("--finetune", type=str)

    parse(words, "train.py", "", add_arguments)  # reports an invalid key once, not once per rank
    output = Path(output or default_output(str(file)))
    return [str(ROOT / "train.py"), *words, "--output", str(output.resolve())]


def _build_plan(
    target: str, devices: str | None, command: list[str], logs: Path, environ: Mapping[str, str]
) -> Plan:
    node_num = _integer(environ, "NODE_NUM", 1, 1)
    node_rank = _integer(environ, "NODE_RANK", 0, 0)
    if node_rank >= node_num:
        raise UserError(f"NODE_RANK={node_rank}: must be from 0 to NODE_NUM-1={node_num - 1}")
    if node_num > 1 and "MASTER_ADDR" not in environ:
        raise UserError(f"NODE_NUM={node_num}: set MASTER_ADDR to the first host's address")
    port = _integer(environ, "MASTER_PORT", 8118, FIRST_PORT)
    if port > LAST_PORT:
        raise UserError(f"MASTER_PORT={port}: must be at most {LAST_PORT}")
    visible = len(visible_devices(target, environ))
    local = visible if devices is None else _count(devices)
    if not 1 <= local <= visible:
        kind = "cores" if target == "CPU" else f"{target} devices"
        raise UserError(
            f"DEVICE_NUM {local}: this host has {visible} visible {kind}; give a number that it "
            "has, or set another DEVICE_TARGET (Ascend, GPU, CPU)"
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
        environment["LOCAL_WORLD_SIZE"] = str(local)  # src.device divides the cores by it
    return Plan(world, ranks, node_num, node_rank, address, port, command, logs, environment)


def _count(devices: str) -> int:
    if not devices.isdigit():
        raise UserError(f"DEVICE_NUM {devices}: must be a whole number")
    return int(devices)


def _integer(environ: Mapping[str, str], name: str, default: int, least: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdigit() or int(value) < least:
        raise UserError(f"{name}={value}: must be a whole number, {least} or more")
    return int(value)


def visible_devices(target: str, environ: Mapping[str, str]) -> list[int]:
    """Return the indices of this host's devices that a job may use; on CPUs, of its cores."""
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
                f"MASTER_PORT={port}: {error.strerror}; another job may be using it: set another"
            ) from None
