#!/usr/bin/env bash
# The whole test suite from a bare clone. Arguments go to pytest: bash scripts/run_tests.sh tests/models
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment requirements-dev.txt

PATH=$("$PYTHON" -c 'import sys; print(sys.exec_prefix)')/bin:$PATH
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
if command -v shellcheck >/dev/null; then
  shellcheck -x scripts/*.sh .ci/run
else
  echo "shellcheck is not installed: the scripts go unchecked"
fi
exec "$PYTHON" -m pytest "$@"
