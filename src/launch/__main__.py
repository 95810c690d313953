"""The program behind scripts/run_distribute_train.sh."""

from __future__ import annotations

import os
import sys

from src.errors import executable
from src.launch.job import describe, run
from src.launch.plan import read_plan

USAGE = """\
usage: bash scripts/run_distribute_train.sh CONFIG DATA [DEVICE_NUM] [--dry_run] [--bind_core]
                                            [--key value ...]

  CONFIG       recipe, as config/imagenet/cvt_13_224.yaml
  DATA         the data's folder, or - for the recipe's own
  DEVICE_NUM   devices of this host; default: all that are visible
  --dry_run    show each rank's command and environment, start nothing
  --bind_core  let msrun bind each rank to cores near its device; with a value, to the value's:
               --bind_core='{"device0": ["0-11"], "device1": ["12-23"]}'
  --key value  for train.py: --output DIR, --resume, --optimizer.lr 1e-3 ...

from the environment:
  DEVICE_TARGET     Ascend (default), GPU or CPU
  NODE_NUM          hosts (default 1); start this script on each of them
  NODE_RANK         number of this host, from 0
  MASTER_ADDR       address of host 0
  MASTER_PORT       its port for the ranks to meet (default 8118)
  PYTHON            the interpreter
for HCCL, where it is not already set: HCCL_CONNECT_TIMEOUT (1800), HCCL_EXEC_TIMEOUT (7140)
"""


@executable
def main(argv: list[str]) -> None:
    """Start a distributed training, or show how it would be started."""
    if "--help" in argv or "-h" in argv or not argv:
        print(USAGE)
        sys.exit(0 if argv else 2)
    plan, only_show = read_plan(argv, os.environ, USAGE)
    print(describe(plan), flush=True)
    if not only_show:
        sys.exit(run(plan))


if __name__ == "__main__":
    main()
