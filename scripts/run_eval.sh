#!/usr/bin/env bash
# Evaluate a checkpoint:
#   bash scripts/run_eval.sh CONFIG DATA CKPT [DEVICE_ID] [--dry_run] [--key value ...]
# CONFIG - uses the run's own configuration, DATA - the configuration's data. DEVICE_TARGET is Ascend
# (default), GPU or CPU. Without DEVICE_ID, runtime.device_id of CONFIG counts, else DEVICE_ID of the
# environment, else 0. Further options are passed to eval.py.
set -euo pipefail
# shellcheck source=scripts/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"
case ${1-} in -h | --help) usage_of "$0"; exit ;; esac
[ $# -ge 3 ] || fail "CONFIG, DATA and CKPT are required; see --help"
config=$1 data=$2 checkpoint=$3
shift 3
case ${1---} in --*) id= ;; *) id=$1; shift ;; esac
device_words "$id"
[ -e "$checkpoint" ] || fail "CKPT $checkpoint: no such file; give a checkpoint"
words=(--ckpt "$checkpoint")
if [ "$config" != - ]; then
  config=$(recipe "$config")
  words+=(--config "$config")
fi
if [ "$data" != - ]; then
  [ -e "$data" ] || fail "DATA $data: no such folder; give the data folder, or - for the one in the configuration"
  words+=(--data.path "$data")
fi
program eval.py "${words[@]}" "${device[@]}" "$@"
