"""Start a plan's ranks with msrun, monitor them, and stop all of them when one fails.

Beyond what msrun does, this returns the failed rank's exit code, prints the last error of each
rank's log, kills the scheduler after a failure (it needs up to ten minutes to notice), and forwards
stop signals to the ranks.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from src.errors import UserError, discard_output
from src.launch.plan import Plan
from src.training.stop_signal import SAME_REQUEST_SECONDS, SIGNALS

POLL_SECONDS = 0.5
MSRUN = str(Path(__file__).with_name("msrun.py"))
STOP_CODES = tuple(128 + number for number in SIGNALS)
SET_BY_MSRUN = ("MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_ROLE", "RANK_SIZE")
ERROR_LINE = re.compile(r"([\w.]+: )?[\w.]*(error|Error|Interrupt)\b.*: .")
OTHER_HOSTS = (
    "  a rank of another host may have failed first, or be unreachable: see the logs of all hosts, "
    "and whether all use the same DEVICE_NUM"
)
# msrun's message when a rank has failed: process id, exit code (negative: signal).
RANK_FAILED = re.compile(r"Worker process (\d+) exit with exception. Error code: (-?\d+)")
USER_ERROR = re.compile(r"^[\w.]+\.py: error: ", re.MULTILINE)  # from `src.errors.executable`
RANK_ENDS = re.compile(r"rank \d+ ends with exit code (\d+)")  # from `Ranks.announce_end`


def describe(plan: Plan) -> str:
    """Return msrun's command and each rank's environment and command in shell syntax."""
    host = f"host {plan.node_rank + 1} of {plan.node_num}, {plan.world} ranks in total"
    lines = [f"{host}; started by {shlex.join(['msrun', *_msrun_options(plan)])}"]
    for rank, variables in plan.ranks.items():
        environment = {**plan.environment, **variables}
        words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        words += [msrun_interpreter(), *map(shlex.quote, plan.command)]
        lines += [f"rank {rank}, log {_log_file(plan, rank)}:", "  " + " ".join(words)]
    return "\n".join(lines)


def run(plan: Plan) -> int:
    """Start the plan's ranks on this host and wait until all have exited.

    Returns:
        0 if every rank succeeded; else the exit code of the first that failed (128 + the signal
        if a signal killed it). The other ranks have been killed.

    Raises:
        UserError: the log folder cannot be created.
    """
    try:
        plan.logs.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{plan.logs}: {error.strerror}; give another --output") from None
    job = _Job(plan)
    handlers = {number: signal.signal(number, job.forward_signal) for number in SIGNALS}
    log = _LogFollower(_log_file(plan, min(plan.ranks)))
    try:
        while job.is_running():
            log.print_new()
            time.sleep(POLL_SECONDS)
    finally:
        job.kill()
        log.print_new()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if job.stop_signal and job.exit_code in STOP_CODES:
        job.exit_code = 128 + job.stop_signal  # MindSpore's graphs turn SIGINT into SIGTERM
    if job.exit_code:
        _report_failure(plan, job)
    return job.exit_code


class _LogFollower:
    """Prints what is appended to a log file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def print_new(self) -> None:
        if self.path.exists():
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                text = file.read()
            self.offset += len(text)
            try:
                sys.stdout.write(self.decode(text))
                sys.stdout.flush()
            except OSError:  # the terminal or `| tee` has ended; the ranks go on, or save and end
                discard_output()


class _Job:
    """msrun, its ranks and, on the first host, its scheduler."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ranks: dict[int, int] = {}  # process id -> rank
        self.scheduler: int | None = None  # process id
        self.exit_code = 0
        self.failure: str | None = None  # the first rank that failed, and how
        self.has_ended = False  # a rank crashed after it had announced its end
        self.stop_signal, self.stop_time = 0, 0.0  # the first that this process received
        self.is_stopped = False  # the ranks have saved and ended after a signal to any of them
        with open(plan.logs / "msrun.log", "wb") as log:
            command = shlex.join(["msrun", *_msrun_options(plan)])
            log.write(os.fsencode(f"{command}\n"))
        self.process = subprocess.Popen(
            [sys.executable, MSRUN, *_msrun_options(plan)],
            env=_environment(plan),
            stdin=subprocess.PIPE,  # its end tells msrun.py that this process has exited
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the ranks once, through forward_signal
        )
        self.reader = threading.Thread(target=self._read_output, daemon=True)
        self.reader.start()

    def forward_signal(self, number: int, frame: object) -> None:
        """Forward a signal to every rank; send SIGKILL at the second request.

        Signals within `SAME_REQUEST_SECONDS` are one request. Before msrun has started any rank,
        there is nothing to save, and msrun is killed.
        """
        self._find_processes()
        if not self.stop_signal:
            self.stop_signal, self.stop_time = number, time.monotonic()
            if not self.ranks:
                self.exit_code = 128 + number
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
        elif time.monotonic() - self.stop_time > SAME_REQUEST_SECONDS:
            number = signal.SIGKILL
        else:
            return
        for pid in list(self.ranks):
            _send(pid, number)

    def is_running(self) -> bool:
        """Return whether msrun is running."""
        self._find_processes()
        return self.process.poll() is None

    def kill(self) -> None:
        """Kill every process of the job that is still running."""
        for pid in (*self.ranks, self.scheduler, self.process.pid):
            if pid is not None:
                _send(pid, signal.SIGKILL)
        self.reader.join(5)
        if self.process.wait() != 0 and self.exit_code == 0 and not self.has_ended:
            self.exit_code, self.failure = 1, f"msrun failed ({self.plan.logs / 'msrun.log'})"

    def _read_output(self) -> None:
        """Log msrun's output, and kill the scheduler when a rank has failed.

        msrun kills the other ranks itself, but then waits for the scheduler, which needs 30 s to
        notice, and 10 minutes if the ranks failed before they had connected.
        """
        with open(self.plan.logs / "msrun.log", "ab") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                match = RANK_FAILED.search(line.decode("utf-8", "replace"))
                if match:
                    self._find_processes()
                    self._record_failure(int(match[1]), int(match[2]))
                    # Ranks of other hosts may still be leaving the cluster after their end.
                    several = self.has_ended and self.plan.node_num > 1
                    if self.scheduler is not None and not several:
                        _send(self.scheduler, signal.SIGKILL)

    def _record_failure(self, pid: int, code: int) -> None:
        """Record the first failure; later ones are its consequences.

        A rank may crash while it leaves the cluster (see `Ranks.announce_end`). After it has
        announced its end, that is not a failure: all ranks have done their work. After a user's
        error, its exit code was to be 2.
        """
        if self.failure is None and not self.has_ended:
            rank = self.ranks.get(pid)
            log = _read_log(self.plan, rank) if rank is not None else ""
            end = RANK_ENDS.search(log)
            self.is_stopped = end is not None and int(end[1]) in STOP_CODES
            if code < 0 and end:
                self.has_ended, code = True, int(end[1])
                if code == 0:
                    return
            elif code < 0 and USER_ERROR.search(log):
                code = 2
            name = "a rank" if rank is None else f"rank {rank}"
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.failure = f"{name} (process {pid}) ended by {cause}"
            self.exit_code = 128 - code if code < 0 else code

    def _find_processes(self) -> None:
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.Error:
            return
        for child in children:
            try:
                environ = child.environ()
            except psutil.Error:
                continue
            if environ.get("MS_ROLE") == "MS_SCHED":
                self.scheduler = child.pid
            elif environ.get("MS_ROLE") == "MS_WORKER" and child.pid not in self.ranks:
                self.ranks[child.pid] = int(environ["RANK_ID"])
                if self.stop_signal:  # it started after the request
                    _send(child.pid, self.stop_signal)


def _environment(plan: Plan) -> dict[str, str]:
    """Return the environment of msrun, which its ranks inherit."""
    ours = {k: v for k, v in plan.environment.items() if k not in SET_BY_MSRUN}
    # A container's LOCAL_WORLD_SIZE would divide each rank's cores again (`_bind_to_own_cores`).
    given = {k: v for k, v in os.environ.items() if k != "LOCAL_WORLD_SIZE"}
    environ = {**given, **ours, "PYTHONUNBUFFERED": "1"}
    environ["PATH"] = f"{Path(msrun_interpreter()).parent}{os.pathsep}{environ.get('PATH', '')}"
    # msrun logs a rank's failure at level 3 (error), which a higher level would hide.
    environ["GLOG_v"] = min(environ.get("GLOG_v", "3"), "3")
    return environ


def _report_failure(plan: Plan, job: _Job) -> None:
    """Print which rank failed, the last error in each rank's log, and where the logs are."""
    if job.exit_code in STOP_CODES and (job.stop_signal or job.is_stopped):
        states = plan.logs.parent.parent / "checkpoints"
        saved = plan.node_rank > 0 or any(states.glob("step-*.ckpt"))  # host 0 has the run
        advice = "continue with --resume" if saved else "nothing was saved yet"
        print(f"stopped by request; {advice}. Logs: {plan.logs}", file=sys.stderr)
        return
    print(f"error: {job.failure}; the other ranks were stopped", file=sys.stderr)
    logs = {rank: _read_log(plan, rank) for rank in plan.ranks}
    for rank, log in logs.items():
        errors = [line for line in log.splitlines() if ERROR_LINE.match(line)]
        reason = errors[-1] if errors else "no error in its log"
        print(f"  rank {rank}: {reason}; {_log_file(plan, rank)}", file=sys.stderr)
    # A lost rank has many messages (heartbeat, collective, connection); a user's error is local.
    if plan.node_num > 1 and not any(map(USER_ERROR.search, logs.values())):
        print(OTHER_HOSTS, file=sys.stderr)


def _log_file(plan: Plan, rank: int) -> Path:
    return plan.logs / f"worker_{rank}.log"


def _read_log(plan: Plan, rank: int) -> str:
    log = _log_file(plan, rank)
    return log.read_text("utf-8", "replace") if log.exists() else ""


def msrun_interpreter() -> str:
    """Return this interpreter's path under a name that msrun recognises: python or python3.

    Raises:
        UserError: in its folder, neither is this interpreter.
    """
    folder = Path(sys.executable).parent
    for name in ("python", "python3"):
        found = shutil.which(name, path=str(folder))
        if found and os.path.samefile(found, sys.executable):
            return str(folder / name)
    raise UserError(
        f"PYTHON={sys.executable}: msrun needs it as python or python3 in {folder}; use an "
        "interpreter of a virtual environment"
    )


def _msrun_options(plan: Plan) -> list[str]:
    """Return msrun's arguments, which give each rank the environment in the plan."""
    options = {
        "worker_num": plan.world,
        "local_worker_num": len(plan.ranks),
        "node_rank": plan.node_rank,
        "master_addr": plan.master_addr,
        "master_port": plan.master_port,
        "log_dir": plan.logs,
        "join": True,
        "tail_worker_log": -2,  # print nothing: _LogFollower does
    }
    if plan.bind_core is not None:
        options["bind_core"] = plan.bind_core
    return [
        *(f"--{k}={v}" for k, v in options.items()),
        Path(msrun_interpreter()).name,
        *plan.command,
    ]


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
