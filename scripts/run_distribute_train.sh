#!/usr/bin/env bash
# Train on several devices of one host or of many:
#   bash scripts/run_distribute_train.sh CONFIG DATA [DEVICE_NUM] [--dry_run] [--key value ...]
# --help lists the arguments and the variables (DEVICE_TARGET, NODE_NUM, MASTER_ADDR ...).
set -euo pipefail
# shellcheck source=scripts/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"
from_project "$project/src/launch/__main__.py" "$@"
