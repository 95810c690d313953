"""What `scripts/run_distribute_train.sh` is asked to do, checked before anything starts."""

from __future__ import annotations

import argparse
import glob
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from src.command_line import default_output, parse, take_option
from src.errors import UserError
from src.launch.rank_table import ranks_of_this_host, read_rank_table

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("Ascend", "GPU", "CPU")
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
        rank_table: the start is by this table and without msrun.
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
    rank_table: str | None = None


def read_plan(argv: Sequence[str], environ: Mapping[str, str], usage: str) -> tuple[Plan, bool]:
    """The plan of a command line and its environment, and whether it is only to be shown.

    Raises:
        UserError: an argument, device, port, configuration or data that can't be used.
    """
    parser = argparse.ArgumentParser(usage=usage, add_help=False, allow_abbrev=False)
    parser.error = _refuse
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("config")
    parser.add_argument("data")
    parser.add_argument("devices", nargs="?")
    own, keys = _split(list(argv))
    arguments = parser.parse_args(own)
    target = environ.get("DEVICE_TARGET", "Ascend")
    if target not in TARGETS:
        raise UserError(f"DEVICE_TARGET={target}: choose one of {', '.join(TARGETS)}")
    command = _train_command(arguments.config, arguments.data, target, keys)
    logs = Path(command[-1]) / "ranks" / time.strftime("%Y%m%d-%H%M%S")
    table = environ.get("RANK_TABLE_FILE")
    if table:
        plan = _plan_by_table(table, target, arguments.devices, command, logs, environ)
    else:
        plan = _plan_by_msrun(target, arguments.devices, command, logs, environ)
        if not arguments.dry_run and plan.node_rank == 0:
            _require_free(plan.master_port)
    return plan, arguments.dry_run


def _refuse(message: str) -> None:
    raise UserError(f"{message}; --help shows how to call it")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The script's own words, and the keys for train.py behind them."""
    own, keys = [], []
    for word in argv:
        is_key = word.startswith("--") and word != "--dry_run"
        (keys if keys and word != "--dry_run" or is_key else own).append(word)
    return own, keys


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


def _plan_by_msrun(
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
    if target == "CPU":
        environment["LOCAL_WORLD_SIZE"] = str(local)  # src.runtime shares the cores out by it
    return Plan(
        target, world, ranks, node_num, node_rank, address, port, command, logs, environment
    )


def _plan_by_table(
    table: str,
    target: str,
    devices: str | None,
    command: list[str],
    logs: Path,
    environ: Mapping[str, str],
) -> Plan:
    if target != "Ascend":
        raise UserError(f"RANK_TABLE_FILE is for Ascend, not DEVICE_TARGET={target}; unset one")
    servers = read_rank_table(table)
    server, devices_here = ranks_of_this_host(servers, environ.get("NODE_RANK"), table)
    if devices is not None and _count(devices) != len(devices_here):
        raise UserError(
            f"DEVICE_NUM {devices}: {table} gives this host {len(devices_here)} devices; leave it "
            "out, or write another table"
        )
    visible = visible_devices(target, environ)
    for device in devices_here:
        if visible and device.device_id not in visible:
            raise UserError(f"{table}: device {device.device_id} is not on this host")
    world = sum(len(devices) for devices in servers.values())
    ranks = {
        d.rank_id: {"RANK_ID": str(d.rank_id), "DEVICE_ID": str(d.device_id)} for d in devices_here
    }
    environment = {"RANK_TABLE_FILE": str(Path(table).resolve()), "RANK_SIZE": str(world)}
    node_rank = list(servers).index(server)
    return Plan(
        target, world, ranks, len(servers), node_rank, server, 0, command, logs, environment,
        rank_table=table,
    )  # fmt: skip


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
