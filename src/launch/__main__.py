"""Start distributed training; scripts/run_distribute_train.sh runs this module."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from src.cli import find_resumed_run, parse, require_free_port, take_option
from src.config_io import default_output, require_outside_images
from src.errors import UserError, executable
from src.launch.job import describe, run
from src.launch.plan import Plan, build_plan, check_master_address

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("Ascend", "GPU", "CPU")
USAGE = """\
usage: bash scripts/run_distribute_train.sh CONFIG DATA [DEVICE_NUM] [--dry_run] [--bind_core]
                                            [--key value ...]

  CONFIG       recipe, for example config/imagenet/cvt_13_224.yaml
  DATA         data folder, or - for the recipe's data.path
  DEVICE_NUM   devices to use on this host, the same on all hosts (default: all visible devices;
               on CPUs, all cores)
  --dry_run    print each rank's command and environment without starting it
  --bind_core  let msrun bind each rank to cores near its device, or to the cores you give:
               --bind_core='{"device0": ["0-11"], "device1": ["12-23"]}'
  --key value  options of train.py: --output DIR, --resume, --optimizer.lr 1e-3 ...

environment variables:
  DEVICE_TARGET     Ascend (default), GPU or CPU
  NODE_NUM          number of hosts (default 1); start this script on each host
  NODE_RANK         index of this host, from 0 (default 0)
  MASTER_ADDR       address of host 0; ignored with one host
  MASTER_PORT       port of the scheduler on host 0 (default 8118)
  PYTHON            Python interpreter
  ASCEND_RT_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES   devices to use, such as 4,5,6,7
HCCL timeouts in seconds, unless already set: HCCL_CONNECT_TIMEOUT=1800, HCCL_EXEC_TIMEOUT=7140
"""


@executable
def main(argv: list[str]) -> None:
    """Start distributed training, or print the commands that would start it."""
    if "--help" in argv or "-h" in argv or not argv:
        print(USAGE)
        sys.exit(0 if argv else 2)
    plan, dry_run = read_plan(argv, os.environ)
    print(describe(plan), flush=True)
    if not dry_run:
        sys.exit(run(plan))


def read_plan(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[Plan, bool]:
    """Return the plan for a command line and its environment, and whether --dry_run is set.

    Raises:
        UserError: an argument, device, port, configuration or data path is invalid.
    """
    parser = argparse.ArgumentParser(usage=USAGE, add_help=False, allow_abbrev=False)
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
    is_first = environ.get("NODE_RANK", "0") == "0"
    command = _train_command(arguments.config, arguments.data, target, keys, is_first)
    logs = Path(command[-1]) / "ranks" / time.strftime("%Y%m%d-%H%M%S")
    if "RANK_TABLE_FILE" in environ:
        raise UserError(
            "RANK_TABLE_FILE: msrun starts the ranks without a rank table; unset it, and for "
            "several hosts set NODE_NUM, NODE_RANK and MASTER_ADDR"
        )
    plan = build_plan(target, arguments.devices, command, logs, environ)
    if plan.node_num > 1:  # hosts may share the folder and start in the same second
        plan.logs = logs.with_name(f"{logs.name}-host{plan.node_rank}")
    if arguments.bind_core is not None:
        plan.bind_core = arguments.bind_core
        # src.device would divide a rank's cores by it, but msrun has divided them already.
        plan.environment.pop("LOCAL_WORLD_SIZE", None)
    if plan.node_num > 1 and (plan.node_rank == 0 or not arguments.dry_run):
        check_master_address(plan.master_addr, plan.node_rank, arguments.dry_run)
    if not arguments.dry_run and plan.node_rank == 0:
        require_free_port(plan.master_port, "MASTER_PORT=", address="")
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


def _train_command(
    recipe: str, data: str, target: str, keys: list[str], is_first: bool
) -> list[str]:
    """Return train.py and its checked arguments with absolute paths; --output DIR comes last."""
    file = next((p for p in (Path(recipe), ROOT / recipe) if p.is_file()), None)
    if file is None:
        raise UserError(
            f"CONFIG {recipe}: no such file; give a recipe such as config/digits/cvt_nano.yaml"
        )
    words = ["--config", str(file.resolve())]
    if data != "-":
        if not Path(os.path.expanduser(data)).exists():
            raise UserError(
                f"DATA {data}: no such folder; give a data folder, or - for the recipe's data.path"
            )
        words += ["--data.path", str(Path(os.path.expanduser(data)).resolve())]
    words += ["--runtime.device", target, *keys]
    _, words = find_resumed_run(words, is_first)
    words, output = take_option(words, "--output")

    def add_arguments(parser) -> None:
        parser.add_argument("--resume", nargs="?", const=True)
        parser.add_argument("--accept_changes", action="store_true")
        parser.add_argument("--finetune", type=str)

    # Reports an invalid key once, not once per rank.
    config, _ = parse(words, "train.py", "", add_arguments)
    output = Path(os.path.expanduser(output or default_output(str(file))))
    require_outside_images(config, output)
    return [str(ROOT / "train.py"), *words, "--output", str(output.resolve())]


if __name__ == "__main__":
    main()
