#!/usr/bin/env bash
# Train on one device:
#   bash scripts/run_standalone_train.sh CONFIG DATA [DEVICE_ID] [--dry_run] [--key value ...]
# DATA - uses the recipe's data. DEVICE_TARGET is Ascend (default), GPU or CPU. Without DEVICE_ID,
# runtime.device_id of the recipe counts, else DEVICE_ID of the environment, else 0. Further options
# are passed to train.py.
set -euo pipefail
# shellcheck source=scripts/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"
case ${1-} in -h | --help) usage_of "$0"; exit ;; esac
[ $# -ge 2 ] || fail "CONFIG and DATA are required; see --help"
config=$(recipe "$1") data=$2
shift 2
case ${1---} in --*) id= ;; *) id=$1; shift ;; esac
device_words "$id"
words=(--config "$config")
if [ "$data" != - ]; then
  [ -e "$data" ] || fail "DATA $data: no such folder; give the data folder, or - for the one in the configuration"
  words+=(--data.path "$data")
fi
program train.py "${words[@]}" "${device[@]}" "$@"
