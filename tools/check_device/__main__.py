"""Check that a device computes CvT correctly: python -m tools.check_device [--device D]."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import tempfile
import time

from src.errors import UserError, executable, printable
from src.files import require_replaceable, write_json
from tools.check_device import table
from tools.check_device.registry import CHECKS, Check, Setting
from tools.check_device.runner import FAILED, Result, run_checks

WORKER = ("-m", "tools.check_device.worker")
EPILOG = "Exit code: 0 where nothing failed, 1 where a check failed, 2 for a wrong option."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Report an option in one line."""
        raise UserError(f"{message}; --help lists the options")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: an option that is unknown or can't be used.
    """
    parser = _Parser(
        prog="check_device", description="Check that a device computes CvT correctly.",
        epilog=EPILOG, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "Ascend", "GPU", "CPU"), default="auto",
        help="auto takes the first of Ascend, GPU, CPU that MindSpore finds",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, default=0, metavar="N",
        help="devices for the checks of several ranks; default: all of this host, 8 at most, and "
        "2 on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--full", action="store_true",
        help="also check every published network, wait 150 s for a late rank, and measure speed "
        "for each jit level and form of the depthwise convolution",
    )  # fmt: skip
    parser.add_argument("--report", metavar="FILE.json", help="write everything to this file too")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="run only these checks of the table"
    )
    arguments = parser.parse_args(argv)
    if arguments.ranks < 0 or arguments.ranks == 1:
        raise UserError(f"--ranks {arguments.ranks}: give 2 or more, or leave it out")
    if arguments.report:
        require_replaceable(arguments.report, "--report", lambda path: path.suffix == ".json")
    return arguments


def choose(only: list[str] | None, full: bool) -> list[Check]:
    """The checks that run.

    Raises:
        UserError: a name that no check has.
    """
    if only is None:
        return [check for check in CHECKS if full or not check.full]
    names = [check.name for check in CHECKS]
    for name in only:
        if name not in names:
            raise UserError(f"--only {name!r}: no such check; choose from {', '.join(names)}")
    return [check for check in CHECKS if check.name in ("environment", *only)]


def check_device(
    checks: list[Check], setting: Setting, write=print
) -> tuple[list[Result], Setting]:
    """Run the checks and print the table; the first check decides whether there are others.

    Returns:
        The results, and the setting with the device that was chosen.
    """

    def show(result: Result) -> None:
        write(printable_lines(table.line(result)))

    write(table.head())
    first = run_checks(checks[:1], setting, show)
    if first[0].status == FAILED:
        write("The device can't be used, so the other checks did not run.")
        return first, setting
    setting = dataclasses.replace(setting, device=first[0].finding.details["device"])
    return first + run_checks(checks[1:], setting, show), setting


def printable_lines(text: str) -> str:
    """Text whose only control characters are its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


@executable
def main(argv: list[str]) -> None:
    """Run the checks, print the table, write the report."""
    arguments = parse(argv)
    for number in (signal.SIGINT, signal.SIGTERM):  # so that no check stays behind
        signal.signal(number, _stop)
    checks, start = choose(arguments.only, arguments.full), time.monotonic()
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
