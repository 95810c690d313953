#!/usr/bin/env bash
# Install the test tools, check the style and run the tests, with one worker per core plus one, at most 17.
#   bash scripts/run_tests.sh                everything
#   bash scripts/run_tests.sh --quick        without distributed jobs, fault campaigns and full-size networks
#   bash scripts/run_tests.sh tests/models   other arguments go to pytest
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment requirements-dev.txt

PATH=$("$PYTHON" -c 'import sys; print(sys.exec_prefix)')/bin:$PATH
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if command -v shellcheck >/dev/null; then
  shellcheck -x scripts/*.sh .ci/run
else
  echo "shellcheck is not installed: skipping the shell scripts"
fi
# Use one worker more than cores, because some wait for processes of their test. Each runs MindSpore,
# which takes up to 2 GB.
PYTEST_XDIST_AUTO_NUM_WORKERS=${PYTEST_XDIST_AUTO_NUM_WORKERS-$("$PYTHON" -c 'import psutil
from src.cores import cpu_count
print(max(1, min(cpu_count() + 1, 17, psutil.virtual_memory().available >> 31)))')}
export PYTEST_XDIST_AUTO_NUM_WORKERS
# One thread each, because threads that wait for another one spin on the core that it needs. Tests that
# need more set the number themselves.
export OMP_NUM_THREADS=${OMP_NUM_THREADS-1}
words=(-n auto --dist loadfile --no-loadscope-reorder)
if [ "${1-}" = --quick ]; then
  shift
  words+=(-m "not big and not slow")
fi
exec "$PYTHON" -m pytest "${words[@]}" "$@"
