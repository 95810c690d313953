# shellcheck shell=bash
# Sourced by the scripts, in the user's folder.
unset CDPATH # with it, `cd scripts/..` may go to another folder
# Let glibc keep freed memory for the next use: MindSpore compiles with 9 % less processor time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.tcache_count=60000}
case ${PYTHON-} in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;;
esac

# environment FILE: set $PYTHON to an interpreter with all packages of FILE: the active one if
# `import mindspore` works (an Ascend host), otherwise .venv, created with $PYTHON (default python3)
# and filled in one pip call.
environment() {
  local requirements=$1 base=${PYTHON:-python3} modules stamp digest numpy
  case $(uname -s) in MINGW* | MSYS* | CYGWIN*)
    echo "error: Windows is not supported; run this in WSL 2" >&2
    return 2
    ;;
  esac
  modules='jsonargparse docstring_parser matplotlib mlxtend tqdm yaml PIL onnx'
  if [ "$requirements" != requirements.txt ]; then
    modules+=' pytest xdist ruff onnxruntime fastapi uvicorn'
    [ "$(uname -m)" != x86_64 ] || modules+=' openvino'
  fi
  # Import MindSpore alone, which depends on the host's drivers; the others would take half a second.
  if "$base" -c "import mindspore, sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, '$modules'.split())))" 2>/dev/null; then
    PYTHON=$base
    return
  fi
  if "$base" -c 'import mindspore' 2>/dev/null; then
    echo "MindSpore is installed, but not all of $requirements: installing the rest"
    # Keep the installed NumPy if this MindSpore supports it. Without the bound, pip would install
    # NumPy 2 as another package's dependency.
    numpy=$("$base" -c "import mindspore
old = tuple(map(int, mindspore.__version__.split('.')[:2])) < (2, 9)
print('numpy<2' if old else 'numpy')" 2>/dev/null | tail -n 1) || return
    { grep -hEv '^(#|-r|mindspore|numpy)' requirements.txt "$requirements"; echo "$numpy"; } | sort -u |
      tr '\n' '\0' | xargs -0 "$base" -m pip install -q --disable-pip-version-check || return
    PYTHON=$base
    return
  fi
  if is_complete .venv; then
    # Hosts with different processors may share the folder.
    [ ! -e .venv/machine ] || [ "$(cat .venv/machine)" = "$(uname -m)" ] || {
      echo "error: .venv is for $(cat .venv/machine), this host is $(uname -m); remove .venv, or use a" \
        "copy of the project for each" >&2
      return 2
    }
    [ -z "${PYTHON-}" ] || same_version "$base" .venv/bin/python || return 2
    base=.venv/bin/python
  elif "$base" -c 'import importlib.metadata as m; m.version("mindspore")' 2>/dev/null; then
    echo "error: $base has MindSpore but cannot import it ($("$base" -c 'import mindspore' 2>&1 |
      tail -n 1)); repair it, or choose another interpreter with PYTHON" >&2
    return 2
  fi
  "$base" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' || {
    echo "error: $base is not Python 3.9 to 3.12; choose one, for example PYTHON=python3.11 bash $0" >&2
    return 2
  }
  stamp=.venv/installed-$requirements
  digest=$(cat requirements.txt "$requirements" | cksum)
  if ! is_complete .venv || [ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]; then
    fill_venv "$base" "$requirements" "$digest" "$stamp" 9>>requirements.txt || return
  fi
  PYTHON=.venv/bin/python
}

# fill_venv PYTHON FILE DIGEST STAMP: install a file's packages into .venv. A second script, or another
# host with the same folder, waits for the first (file descriptor 9 is its lock) and finds it done.
fill_venv() {
  if command -v flock >/dev/null && ! flock -n 9; then
    echo "another script is installing into .venv; waiting for it"
    flock 9
  fi
  if is_complete .venv && [ "$(cat "$4" 2>/dev/null)" = "$3" ]; then
    return
  fi
  echo "installing $2 into .venv (a minute or two, once)"
  is_complete .venv || make_venv "$1" || return
  .venv/bin/python -m pip install -q --disable-pip-version-check -r "$2" || return
  echo "$3" >"$4"
}

# is_complete VENV: it has Python and pip. Without Debian's python3-venv, only Python is made.
is_complete() {
  [ -x "$1/bin/python" ] && [ -x "$1/bin/pip" ]
}

# make_venv PYTHON: create .venv; replace an unfinished one, but only if this script created it.
make_venv() {
  local code=0
  if [ -L .venv ] || { [ -e .venv ] && [ ! -e .venv/machine ]; }; then
    echo "error: .venv has no pip and was not made by this script; activate it, install pip in it, or" \
      "move it away" >&2
    return 2
  fi
  "$1" -m venv --clear .venv || code=$?
  [ ! -d .venv ] || uname -m >.venv/machine
  return "$code"
}

# same_version PYTHON PYTHON: refuse to use the second for the first if their versions differ.
same_version() {
  local given made version='import sys; print("%d.%d" % sys.version_info[:2])'
  given=$("$1" -c "$version") && made=$("$2" -c "$version") || return
  [ "$given" = "$made" ] || {
    echo "error: PYTHON=$1 is Python $given, and .venv has $made; remove .venv, or leave PYTHON out" >&2
    return 2
  }
}

fail() {
  echo "error: $1" >&2
  exit 2
}

# usage_of SCRIPT: print its head comment.
usage_of() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"
}
