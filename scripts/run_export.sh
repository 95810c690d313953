#!/usr/bin/env bash
# Export a checkpoint into its folder:
#   bash scripts/run_export.sh CONFIG CKPT FORMAT [--dry_run] [--key value ...]
# CONFIG - uses the run's own configuration. FORMAT is mindir, onnx or air. DEVICE_TARGET
# (default Ascend) matters only for air; the others are written on the CPU. Further options are
# passed to export.py.
set -euo pipefail
# shellcheck source=scripts/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"
case ${1-} in -h | --help) usage_of "$0"; exit ;; esac
[ $# -ge 3 ] || fail "CONFIG, CKPT and FORMAT are required; see --help"
config=$1 checkpoint=$2 format=$3
shift 3
device_words ""
[ -e "$checkpoint" ] || fail "CKPT $checkpoint: no such file; give a checkpoint"
words=(--ckpt "$checkpoint" --format "$format")
if [ "$config" != - ]; then
  config=$(recipe "$config")
  words+=(--config "$config")
fi
program export.py "${words[@]}" "${device[@]}" "$@"
