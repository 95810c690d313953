"""Checks several ranks: collectives, and training compared with a single rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from src.launch.job import msrun_interpreter
from src.launch.plan import HCCL_TIMEOUTS, visible_devices
from tools.check_device.checks.training import last_line
from tools.check_device.compare import check_limits, relative
from tools.check_device.limits import LIMITS
from tools.check_device.rank_program import SIZES
from tools.check_device.registry import RANK_COUNTS, Finding, NotHere, Setting

LATE_SECONDS = 150.0


def number_of_ranks(setting: Setting) -> int:
    """Return the number of ranks that the checks start.

    Raises:
        NotHere: this host has too few devices or cores.
    """
    available = len(visible_devices(setting.device, os.environ))
    wanted = setting.ranks or min(available, 2 if setting.device == "CPU" else RANK_COUNTS[-1])
    what = "cores" if setting.device == "CPU" else f"{setting.device} devices"
    if available < 2 or wanted > available:
        raise NotHere(f"{available} {what} on this host, {max(wanted, 2)} needed")
    return max(count for count in RANK_COUNTS if count <= wanted)


def run_ranks(setting: Setting, what: str, world: int, **arguments: Any) -> list[dict[str, Any]]:
    """Run a job of `rank_program` and return each rank's results.

    Raises:
        RuntimeError: a rank failed; the message has its last error.
    """
    folder = Path(setting.folder) / f"{what}-{world}"
    folder.mkdir(exist_ok=True)
    order = {"what": what, "folder": str(folder), "device": setting.device, **arguments}
    command = [*setting.worker[1:], "rank", json.dumps(order)]
    environment = {**os.environ, "GLOG_v": "3"}
    if world > 1:
        python = Path(msrun_interpreter())
        environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment.update({k: os.environ.get(k, v) for k, v in HCCL_TIMEOUTS.items()})
        if setting.device == "CPU":
            environment["LOCAL_WORLD_SIZE"] = str(world)
        options = [
            "--join=True", f"--worker_num={world}", f"--local_worker_num={world}",
            f"--master_port={free_port()}", f"--log_dir={folder}",
        ]  # fmt: skip
        command = ["-m", "mindspore.parallel.cluster.run", *options, python.name, *command]
    done = subprocess.run(
        [sys.executable, *command], cwd=setting.folder, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    found = []
    for rank in range(world):
        file = folder / f"rank_{rank}.json"
        if not file.exists():
            log = folder / f"worker_{rank}.log"
            words = log.read_text("utf-8", "replace") if log.exists() else done.stderr
            print(done.stdout[-2000:], done.stderr[-2000:], words[-4000:], sep="\n")
            raise RuntimeError(f"rank {rank} of {world} failed: {last_line(words)}")
        found.append(json.loads(file.read_text()))
    return found


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def collectives(setting: Setting) -> Finding:
    """Check that exchange is exact and that sums are equal on all ranks."""
    world = number_of_ranks(setting)
    found, faults = run_ranks(setting, "collectives", world), []
    for rank, each in enumerate(found):
        wrong = [what for what in ("texts", "broadcast", "gather") if not each[what]]
        wrong += [f"all-reduce of {size}" for size in SIZES if not each["exact"][size]]
        wrong += [
            f"all-reduce of {size} (other sums than rank 0)"
            for size in SIZES
            if each["sums"][size] != found[0]["sums"][size]
        ]
        faults += [f"rank {rank}: {what} is wrong" for what in wrong]
    slowest = {size: max(each["milliseconds"][size] for each in found) for size in SIZES}
    times = ", ".join(f"{size} {slowest[size]:.1f}" for size in SIZES)
    return Finding(
        f"{world} ranks, {len(faults)} faults; ms: {times}", "0 faults", not faults,
        hint="; ".join(faults[:6]), details={"ranks": world, "milliseconds": slowest},
    )  # fmt: skip


def data_parallel(setting: Setting) -> Finding:
    """Compare twenty steps on all ranks with one rank; all ranks must have equal weights."""
    world = number_of_ranks(setting)
    found = run_ranks(setting, "training", world)
    (alone,) = run_ranks(setting, "training", 1)
    column = 0 if setting.device == "CPU" else 1  # sums in another order round differently
    finding = check_limits(
        {
            "losses": relative(found[0]["losses"], alone["losses"]),
            "gradient norms": relative(found[0]["norms"], alone["norms"]),
        },
        {"losses": LIMITS["loss"][column], "gradient norms": 10 * LIMITS["gradient norm"][column]},
    )
    checksums = [each["checksum"] for each in found]
    different = [rank for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    if different:
        finding.passed = False
        finding.hint += f" ranks {different} have other weights than rank 0 (unequal checksums)"
    own, slowest = alone["milliseconds"], max(each["milliseconds"] for each in found)
    finding.measured += f"; {world} ranks {slowest:.0f} ms a step, one {own:.0f}"
    finding.details.update(
        ranks=world, checksums=checksums, messages=found[0]["messages"],
        milliseconds={"all ranks": slowest, "one": own},
    )  # fmt: skip
    return finding


def late_rank(setting: Setting) -> Finding:
    """Delay a rank by 150 s before a collective, longer than HCCL's default of 120 s."""
    if setting.device == "CPU":
        raise NotHere("CPU collectives time out before 150 s; this checks HCCL and NCCL")
    world = number_of_ranks(setting)
    found = run_ranks(setting, "late", world, late_seconds=LATE_SECONDS)
    right = all(each["right"] for each in found)
    return Finding(f"ranks waited {found[0]['waited']:.0f} s", f"{LATE_SECONDS:.0f} s", right)
