"""Plan the part of a distributed job that this host starts."""

from __future__ import annotations

import glob
import ipaddress
import itertools
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from src.cores import usable_cores
from src.errors import UserError

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


def build_plan(
    target: str, devices: str | None, command: list[str], logs: Path, environ: Mapping[str, str]
) -> Plan:
    """Plan the ranks of this host from DEVICE_NUM and the environment variables of the job.

    Args:
        target: "Ascend", "GPU" or "CPU".
        devices: DEVICE_NUM; None uses all visible devices.
        command: arguments of the Python interpreter.
        logs: folder of the ranks' logs.
        environ: the environment variables.

    Raises:
        UserError: the number of devices or a variable is invalid.
    """
    node_num = _integer(environ, "NODE_NUM", 1, 1)
    node_rank = _integer(environ, "NODE_RANK", 0, 0)
    if node_rank >= node_num:
        raise UserError(f"NODE_RANK={node_rank}: must be from 0 to NODE_NUM-1={node_num - 1}")
    if node_num > 1 and not environ.get("MASTER_ADDR"):
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
    # On one host, a MASTER_ADDR may be left from Kubernetes or torchrun.
    address = environ["MASTER_ADDR"] if node_num > 1 else "127.0.0.1"
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
    if not devices.isdecimal():
        raise UserError(f"DEVICE_NUM {devices}: must be a whole number")
    return int(devices)


def _integer(environ: Mapping[str, str], name: str, default: int, least: int) -> int:
    value = environ.get(name, str(default))
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{name}={value}: must be a whole number, {least} or more")
    return int(value)


def visible_devices(target: str, environ: Mapping[str, str]) -> list[int]:
    """Return the indices of this host's devices that a job may use; on CPUs, of its cores."""
    if target == "CPU":
        return usable_cores()
    variable = "ASCEND_RT_VISIBLE_DEVICES" if target == "Ascend" else "CUDA_VISIBLE_DEVICES"
    if environ.get(variable):
        entries = map(str.strip, environ[variable].split(","))
        named = itertools.takewhile(lambda entry: entry[:1] not in ("", "-"), entries)
        return list(range(sum(entry != "NoDevFiles" for entry in named)))
    pattern = "/dev/davinci[0-9]*" if target == "Ascend" else "/dev/nvidia[0-9]*"
    prefix = pattern.partition("[")[0]
    return sorted(int(p[len(prefix) :]) for p in glob.glob(pattern) if p[len(prefix) :].isdigit())


def check_master_address(address: str, node_rank: int, dry_run: bool) -> None:
    """Check MASTER_ADDR of a job on several hosts.

    msrun starts the scheduler where the address, resolved, is that of a network interface. Unless
    that is the first host alone, ranks wait for a scheduler for ten minutes.

    Args:
        address: host name or address.
        node_rank: index of this host.
        dry_run: only check what holds on any host, because the plan may be for another.

    Raises:
        UserError: the address does not resolve, or cannot be the first host's.
    """
    if dry_run and address != "localhost":
        try:
            ipaddress.ip_address(address)
        except ValueError:  # a name may resolve in the cluster only
            return
    try:
        found = socket.gethostbyname(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise UserError(
            f"MASTER_ADDR={address}: {reason}; give the first host's IPv4 address"
        ) from None
    name = address if found == address else f"{address} ({found})"
    if ipaddress.ip_address(found).is_loopback:
        raise UserError(
            f"MASTER_ADDR={name}: other hosts cannot reach it; give the first host's IPv4 address"
        )
    if dry_run:
        return
    interfaces = psutil.net_if_addrs().values()
    is_here = any(found == each.address for addresses in interfaces for each in addresses)
    if is_here != (node_rank == 0):
        raise UserError(
            f"MASTER_ADDR={name}: is {'' if is_here else 'not '}an address of this host, which has "
            f"NODE_RANK={node_rank}; give the first host's IPv4 address, and NODE_RANK=0 only there"
        )
