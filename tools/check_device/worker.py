"""The process that runs checks: python -m tools.check_device.worker ROLE JSON.

Role "checks" runs checks one after another and writes an event for each start and end to the file
descriptor that it is given. The other roles are programs that checks start. After an exception the
process ends, since a device may be unusable then; whoever started it goes on with a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import sys
import time
import traceback
from typing import Any

LONGEST = 600  # characters of an error's message


def main(argv: list[str]) -> None:
    """Play a role."""
    role, text = argv
    from src.device import prepare_environment

    prepare_environment()
    arguments = json.loads(text)
    if role == "checks":
        run_checks(**arguments)
    elif role == "rank":
        from tools.check_device import rank_program

        rank_program.main(**arguments)
    elif role == "cpu":
        from tools.check_device import cpu_program

        cpu_program.main(**arguments)
    else:
        raise SystemExit(f"no such role: {role}")


def run_checks(names: list[str], setting: dict[str, Any], events: int) -> None:
    """Run checks of one process."""
    from tools.check_device.registry import CHECKS, Finding, NotHere, Setting

    atexit.register(end_children)  # what a check has started ends with it
    setting = Setting(**setting)
    checks = {check.name: check for check in CHECKS}
    with os.fdopen(events, "w", buffering=1) as file:

        def send(**event: Any) -> None:
            file.write(json.dumps(event, default=str) + "\n")

        is_set_up = False
        for name in names:
            check = checks[name]
            send(start=name)
            start = time.perf_counter()
            try:
                if check.uses_device and not is_set_up:
                    set_up(setting.device, dict(check.runtime))
                    is_set_up = True
                finding = check.run(setting)
            except NotHere as reason:
                send(end=name, not_here=str(reason), seconds=time.perf_counter() - start)
                continue
            except Exception as error:
                traceback.print_exc()
                line = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
                finding = Finding(f"{type(error).__name__}", passed=False, hint=line[:LONGEST])
                send(end=name, finding=dataclasses.asdict(finding), seconds=0, broken=True)
                return
            seconds = time.perf_counter() - start
            send(end=name, finding=dataclasses.asdict(finding), seconds=seconds)


def end_children() -> None:
    """End every process that this one has started."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def set_up(device: str, runtime: dict[str, Any]) -> None:
    """Choose the device as train.py does."""
    from src.config import RuntimeConfig
    from src.device import setup

    setup(RuntimeConfig(device=device, **runtime))


if __name__ == "__main__":
    main(sys.argv[1:])
