# shellcheck shell=bash
# Sourced by the run_ scripts: the project's programs, called as zoo users are used to. They run in
# the user's folder, so that relative paths mean what they say.
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/environment.sh
source "$project/scripts/environment.sh"

# from_project FILE WORD...: run one of the project's files in the user's folder. Nothing is imported
# from there: an empty entry in PYTHONPATH, as CANN's set_env.sh leaves behind, would mean it.
from_project() {
  local user=$PWD entry paths=$project
  while IFS= read -r -d: entry; do [ -z "$entry" ] || paths+=:$entry; done <<<"${PYTHONPATH-}:"
  cd "$project" || return
  environment requirements.txt
  cd "$user" || return
  case $PYTHON in .venv/*) PYTHON=$project/$PYTHON ;; esac
  PYTHONPATH=$paths exec "$PYTHON" "$@"
}

# program NAME WORD...: show the command and run it; with --dry_run among the words only show it.
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

fail() {
  echo "error: $1" >&2
  exit 2
}

# recipe CONFIG: its path, as given or below the project.
recipe() {
  if [ -f "$1" ]; then
    echo "$1"
  elif [ -f "$project/$1" ]; then
    echo "$project/$1"
  else
    fail "CONFIG $1: no such file; give a recipe such as config/digits/cvt_nano.yaml"
  fi
}

# device_words NUMBER: sets device to the words that choose it of DEVICE_TARGET (Ascend by default).
device=()
device_words() {
  case ${DEVICE_TARGET:-Ascend} in
    Ascend | GPU | CPU) ;;
    *) fail "DEVICE_TARGET=$DEVICE_TARGET: choose Ascend, GPU or CPU" ;;
  esac
  case $1 in
    *[!0-9]* | '') fail "DEVICE_ID $1: must be a number, from 0" ;;
  esac
  # shellcheck disable=SC2034  # the scripts use it
  device=(--runtime.device "${DEVICE_TARGET:-Ascend}" --runtime.device_id "$1")
}

# usage_of SCRIPT: its head comment.
usage_of() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"
}
