"""Formats the results for the console and the report file."""

from __future__ import annotations

import math
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tools.check_device.registry import CHECKS
from tools.check_device.runner import FAILED, NOT_HERE, Result

WIDTHS = (max(len(check.name) for check in CHECKS), 52, 13)
INDENT = "    "


def head() -> str:
    """Return the table's header."""
    name, measured, allowed = (
        word.ljust(width) for word, width in zip(("check", "measured", "allowed"), WIDTHS)
    )
    return f"{name}  {measured}  {allowed}  seconds"


def line(result: Result) -> str:
    """Return a check's line, with the likely cause if it failed."""
    finding, name = result.finding, result.check.name.ljust(WIDTHS[0])
    if result.status == NOT_HERE:
        return f"{name}  not here: {finding.measured}"
    text = f"{name}  {finding.measured.ljust(WIDTHS[1])}  {finding.allowed.ljust(WIDTHS[2])}"
    text += f"  {result.seconds:7.1f}  {result.status}"
    if result.status == FAILED:
        causes = [f"likely cause: {result.check.cause}", *filter(None, [finding.hint])]
        for cause in causes:
            text += "\n" + textwrap.fill(
                cause, 100, initial_indent=INDENT, subsequent_indent=2 * INDENT
            )
    return text


def summary(results: Sequence[Result], seconds: float) -> str:
    """Return one line on all checks."""
    counts = Counter(result.status for result in results)
    words = ", ".join(f"{number} {status}" for status, number in counts.items())
    return f"{len(results)} checks: {words}; {seconds / 60:.1f} minutes"


def report(results: Sequence[Result], device: str) -> dict[str, Any]:
    """Return the content of the report file."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": device,
        "passed": all(result.status != FAILED for result in results),
        "checks": [
            {
                "name": result.check.name,
                "status": result.status,
                "measured": result.finding.measured,
                "allowed": result.finding.allowed,
                "seconds": round(result.seconds, 2),
                "hint": result.finding.hint,
                "details": _as_json(result.finding.details),
                **({"log": result.log} if result.log else {}),
            }
            for result in results
        ],
    }


def _as_json(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by text."""
    if isinstance(value, dict):
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
