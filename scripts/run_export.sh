#!/usr/bin/env bash
# Export a checkpoint, beside it:
#   bash scripts/run_export.sh CONFIG CKPT FORMAT [--dry_run] [--key value ...]
# CONFIG - means that of the checkpoint's run; FORMAT is mindir, onnx or air; DEVICE_TARGET is Ascend
# (default), GPU or CPU; keys go to export.py.
set -euo pipefail
# shellcheck source=scripts/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"
case ${1-} in -h | --help) usage_of "$0"; exit ;; esac
[ $# -ge 3 ] || fail "CONFIG, CKPT and FORMAT are needed; --help shows how to call it"
config=$1 checkpoint=$2 format=$3
shift 3
device_words 0
[ -e "$checkpoint" ] || fail "CKPT $checkpoint: no such file; give a checkpoint"
words=(--ckpt "$checkpoint" --format "$format" --output "${checkpoint%.*}.$format")
if [ "$config" != - ]; then
  config=$(recipe "$config")
  words+=(--config "$config")
fi
program export.py "${words[@]}" "${device[@]}" "$@"
