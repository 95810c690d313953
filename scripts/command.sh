# shellcheck shell=bash
# Sourced by the run_*.sh scripts, which call the project's programs with the model zoo's arguments.
# The programs run in the user's folder, so that relative paths refer to it.
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# from_project FILE WORD...: run a project file in the user's folder. Remove empty entries from
# PYTHONPATH, as CANN's set_env.sh leaves them: they would import modules from the user's folder.
from_project() {
  local user=$PWD entry paths=$project
  while IFS= read -r -d: entry; do [ -z "$entry" ] || paths+=:$entry; done <<<"${PYTHONPATH-}:"
  cd "$project" || return
  environment requirements.txt
  cd "$user" || return
  case $PYTHON in .venv/*) PYTHON=$project/$PYTHON ;; esac
  PYTHONPATH=$paths exec "$PYTHON" "$@"
}

# program NAME WORD...: print the command and run it; with --dry_run only print it.
program() {
  local name=$1 word show=0 words=()
  shift
  for word in "$@"; do
    if [ "$word" = --dry_run ]; then show=1; else words+=("$word"); fi
  done
  printf 'python %s' "$name"
  printf ' %q' "${words[@]}"
  echo
  [ $show = 1 ] || from_project "$project/$name" "${words[@]}"
}

# recipe CONFIG: print the recipe's path, as given or relative to the project.
recipe() {
  if [ -f "$1" ]; then
    echo "$1"
  elif [ -f "$project/$1" ]; then
    echo "$project/$1"
  else
    fail "CONFIG $1: no such file; give a recipe such as config/digits/cvt_nano.yaml"
  fi
}

# device_words NUMBER: set the array device to the options for device NUMBER of DEVICE_TARGET.
# Without a number the program takes DEVICE_ID of the environment, or its recipe's device.
device=()
device_words() {
  case ${DEVICE_TARGET:-Ascend} in
    Ascend | GPU | CPU) ;;
    *) fail "DEVICE_TARGET=$DEVICE_TARGET: choose Ascend, GPU or CPU" ;;
  esac
  # shellcheck disable=SC2034  # used by the scripts
  device=(--runtime.device "${DEVICE_TARGET:-Ascend}")
  case $1 in
    '') ;;
    *[!0-9]*) fail "DEVICE_ID $1: give the number of a device, starting from 0" ;;
    *) device+=(--runtime.device_id "$1") ;;
  esac
}
