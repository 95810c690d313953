"""Start distributed training; scripts/run_distribute_train.sh runs this module."""

from __future__ import annotations

import os
import sys

from src.errors import executable
from src.launch.job import describe, run
from src.launch.plan import read_plan

USAGE = """\
usage: bash scripts/run_distribute_train.sh CONFIG DATA [DEVICE_NUM] [--dry_run] [--bind_core]
                                            [--key value ...]

  CONFIG       recipe, for example config/imagenet/cvt_13_224.yaml
  DATA         data folder, or - for the recipe's data.path
  DEVICE_NUM   devices to use on this host (default: all visible devices)
  --dry_run    print each rank's command and environment without starting it
  --bind_core  let msrun bind each rank to cores near its device, or to the cores you give:
               --bind_core='{"device0": ["0-11"], "device1": ["12-23"]}'
  --key value  options of train.py: --output DIR, --resume, --optimizer.lr 1e-3 ...

environment variables:
  DEVICE_TARGET     Ascend (default), GPU or CPU
  NODE_NUM          number of hosts (default 1); start this script on each host
  NODE_RANK         index of this host, from 0 (default 0)
  MASTER_ADDR       address of host 0
  MASTER_PORT       port of the scheduler on host 0 (default 8118)
  PYTHON            Python interpreter
HCCL timeouts in seconds, unless already set: HCCL_CONNECT_TIMEOUT=1800, HCCL_EXEC_TIMEOUT=7140
"""


@executable
def main(argv: list[str]) -> None:
    """Start distributed training, or print the commands that would start it."""
    if "--help" in argv or "-h" in argv or not argv:
        print(USAGE)
        sys.exit(0 if argv else 2)
    plan, dry_run = read_plan(argv, os.environ, USAGE)
    print(describe(plan), flush=True)
    if not dry_run:
        sys.exit(run(plan))


if __name__ == "__main__":
    main()
