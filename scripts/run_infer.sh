#!/usr/bin/env bash
# Classify an image or a folder of images:
#   bash scripts/run_infer.sh MODEL INPUT [--dry_run] [--key value ...]
# MODEL is an exported file or a run's checkpoint. DEVICE_TARGET is Ascend (default), GPU or CPU.
# Further options are passed to infer.py.
set -euo pipefail
# shellcheck source=scripts/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"
case ${1-} in -h | --help) usage_of "$0"; exit ;; esac
[ $# -ge 2 ] || fail "MODEL and INPUT are required; see --help"
model=$1 input=$2
shift 2
device_words ""
[ -e "$model" ] || fail "MODEL $model: no such file"
[ -e "$input" ] || fail "INPUT $input: no such file or folder"
program infer.py --model "$model" --input "$input" "${device[@]}" "$@"
