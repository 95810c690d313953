#!/usr/bin/env bash
# The whole test suite from a bare clone. Arguments go to pytest: bash scripts/run_tests.sh tests/models
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment requirements-dev.txt

if "$PYTHON" -m ruff --version >/dev/null 2>&1; then
  "$PYTHON" -m ruff check .
  "$PYTHON" -m ruff format --check .
fi
exec "$PYTHON" -m pytest "$@"
