"""Check that a device computes CvT correctly: python -m tools.check_device [--device D]."""

from __future__ import annotations

import dataclasses
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from src import cli
from src.errors import UserError, executable, printable
from src.files import is_json, require_replaceable, write_json
from src.training.stop_signal import SIGNALS
from tools.check_device import table
from tools.check_device.registry import CHECKS, RANK_COUNTS, Check, Setting
from tools.check_device.runner import FAILED, Result, run_checks

WORKER = ("-m", "tools.check_device.worker")
DESCRIPTION = (
    "Check that a device computes CvT correctly. Exit code: 0 if no check failed, 1 if one failed, "
    "2 for an invalid option."
)


def parse(argv: Sequence[str]) -> Any:
    """Parse the command line.

    Raises:
        UserError: an option is unknown or invalid.
    """
    _, arguments = cli.parse(argv, "-m tools.check_device", DESCRIPTION, add_arguments, None)
    if arguments.ranks and arguments.ranks not in RANK_COUNTS:
        *others, most = RANK_COUNTS
        choices = f"{', '.join(map(str, others))} or {most}"
        raise UserError(f"--ranks {arguments.ranks}: give {choices}, or leave it out")
    if arguments.report:
        require_replaceable(arguments.report, "--report", _is_report, arguments.force)
    return arguments


def _is_report(path: Path) -> bool:
    return is_json(path, lambda content: {"device", "checks", "passed"} <= content.keys())


def add_arguments(parser) -> None:
    """Add the options."""
    parser.add_argument(
        "--device", choices=("auto", "Ascend", "GPU", "CPU"), default="auto",
        help="auto takes the first of Ascend, GPU, CPU that MindSpore finds",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, default=0,
        help="devices for checks with several ranks: 2, 3, 4, 6 or 8; 0: all of this host, at most "
        "8, or 2 on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--full", action="store_true",
        help="also check every published network, wait 150 s for a late rank, and measure speed "
        "for each jit level and form of the depthwise convolution",
    )  # fmt: skip
    parser.add_argument("--report", type=str, help="write everything to this JSON file too")
    parser.add_argument(
        "--force", action="store_true", help="replace a file that is not an earlier report"
    )
    parser.add_argument(
        "--only", nargs="+", action="extend", type=str, help="run only these checks of the table"
    )


def select_checks(only: Sequence[str] | None, full: bool) -> list[Check]:
    """Return the checks to run.

    Raises:
        UserError: a name is unknown.
    """
    if only is None:
        return [check for check in CHECKS if full or not check.full]
    names = [check.name for check in CHECKS]
    for name in only:
        if name not in names:
            raise UserError(f"--only {name!r}: no such check; choose from {', '.join(names)}")
    return [check for check in CHECKS if check.name in ("environment", *only)]


def check_device(
    checks: Sequence[Check], setting: Setting, write: Callable[[str], None]
) -> tuple[list[Result], Setting]:
    """Run the checks and print the table; if the first check fails, the others do not run.

    Returns:
        The results, and the setting with the selected device.
    """

    def show(result: Result) -> None:
        write("\n".join(map(printable, table.line(result).split("\n"))))

    write(table.head())
    first = run_checks(checks[:1], setting, show)
    if first[0].status == FAILED:
        write("The device cannot be used, so the other checks did not run.")
        return first, setting
    setting = dataclasses.replace(setting, device=first[0].finding.details["device"])
    return first + run_checks(checks[1:], setting, show), setting


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


@executable
def main(argv: list[str]) -> None:
    """Run the checks, print the table, write the report."""
    arguments = parse(argv)
    for number in SIGNALS:  # run the `finally` that kills the worker
        signal.signal(number, _exit)
    checks, start = select_checks(arguments.only, arguments.full), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="check-device-") as folder:
        worker = [sys.executable, *WORKER]
        setting = Setting(arguments.device, arguments.ranks, arguments.full, folder, worker)
        results, setting = check_device(checks, setting, lambda text: print(text, flush=True))
    print(table.summary(results, time.monotonic() - start))
    if arguments.report:
        write_json(table.report(results, setting.device), arguments.report)
        print(f"Report: {arguments.report}")
    sys.exit(any(result.status == FAILED for result in results))


if __name__ == "__main__":
    main()
