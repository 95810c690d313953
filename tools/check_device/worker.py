"""The process that runs checks: python -m tools.check_device.worker ROLE JSON.

Role "checks" runs checks one after another and sends a message for each through a connection. The
other roles are programs that checks start. After an exception the process ends, because the device
may be unusable; the runner starts a new one for the remaining checks.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

MAX_MESSAGE = 600  # characters of an error's message


def main(argv: list[str]) -> None:
    """Run a role with its arguments."""
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


def run_checks(names: list[str], setting: dict[str, Any], connection: int) -> None:
    """Run the checks of one process; an empty message says that it is ready."""
    from tools.check_device.registry import CHECKS, Finding, NotHere, Setting

    atexit.register(_kill_children)
    sender = Connection(connection, readable=False)

    def send(**message: Any) -> None:
        sender.send_bytes(json.dumps(message, default=str).encode())

    setting = Setting(**setting)
    checks = {check.name: check for check in CHECKS}
    is_set_up = False
    send()
    for name in names:
        check = checks[name]
        start = time.perf_counter()
        try:
            if check.uses_device and not is_set_up:
                _set_up(setting.device, dict(check.runtime))
                is_set_up = True
            finding = check.run(setting)
        except NotHere as reason:
            send(not_here=str(reason), seconds=time.perf_counter() - start)
            continue
        except Exception as error:
            traceback.print_exc()
            line = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
            finding = Finding(type(error).__name__, passed=False, hint=line[:MAX_MESSAGE])
            send(finding=dataclasses.asdict(finding), seconds=0, broken=True)
            return
        send(finding=dataclasses.asdict(finding), seconds=time.perf_counter() - start)


def _kill_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _set_up(device: str, runtime: dict[str, Any]) -> None:
    """Choose the device as train.py does."""
    from src.config import RuntimeConfig
    from src.device import setup

    setup(RuntimeConfig(device=device, **runtime))


if __name__ == "__main__":
    main(sys.argv[1:])
