#!/usr/bin/env bash
# Check that this device computes CvT correctly, in about ten minutes:
#   bash scripts/check_device.sh [--device auto|Ascend|GPU|CPU] [--ranks N] [--full]
#                                [--only NAME ...] [--report FILE.json]
# Prints a line for each check; the exit code is 0 if none failed. The report has all measured values
# and can be attached to an issue.
set -euo pipefail
# shellcheck source=scripts/command.sh
source "$(dirname "${BASH_SOURCE[0]}")/command.sh"
from_project "$project/tools/check_device/__main__.py" "$@"
