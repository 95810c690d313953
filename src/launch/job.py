"""Starts the ranks of a plan, follows them, and ends them all when one fails."""

from __future__ import annotations

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

from src.errors import UserError
from src.launch.plan import Plan

POLL_SECONDS = 0.5
MSRUN = str(Path(__file__).with_name("msrun.py"))
SET_BY_MSRUN = ("MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_ROLE", "RANK_SIZE")
REASON = re.compile(r"([\w.]+: )?[\w.]*(error|Error|Interrupt)\b.*: .")
# What MindSpore's heartbeat says where a rank of another host, or that host, is gone.
CLUSTER = re.compile(r"state of the cluster is error|meta server|heartbeat", re.IGNORECASE)
ELSEWHERE = "; a rank of another host ended or can't be reached: its host's log has the reason"
FAILED = re.compile(r"Worker process (\d+) exit with exception. Error code: (-?\d+)")


def describe(plan: Plan) -> str:
    """Each rank's environment and command as a shell would take them."""
    where = f"host {plan.node_rank + 1} of {plan.node_num}, {plan.world} ranks in all"
    by = shlex.join(["msrun", *_msrun_options(plan)])
    lines = [f"{where}; started by {by}"]
    for rank, own in plan.ranks.items():
        environment = {**plan.environment, **own}
        words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        words += [_interpreter(), *map(shlex.quote, plan.command)]
        lines += [f"rank {rank}, log {_log(plan, rank)}:", "  " + " ".join(words)]
    return "\n".join(lines)


def run(plan: Plan) -> int:
    """Start the plan's ranks on this host and wait for their end.

    Returns:
        0 where every rank ended well; else the code of the first that did not (128 + the signal
        where one ended it), after every other rank has been ended too.
    """
    try:
        plan.logs.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{plan.logs}: {error.strerror}; give another --output") from None
    job = _Job(plan)
    signals = {
        number: signal.signal(number, job.stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    console = _Console(_log(plan, min(plan.ranks)))
    try:
        while job.is_running():
            console.show()
            time.sleep(POLL_SECONDS)
    finally:
        job.end()
        console.show()
        for number, handler in signals.items():
            signal.signal(number, handler)
    if job.code:
        _explain(plan, job)
    return job.code


class _Console:
    """Copies what the first rank of this host prints."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.place = 0

    def show(self) -> None:
        if self.log.exists():
            with open(self.log, "rb") as file:
                file.seek(self.place)
                text = file.read()
            self.place += len(text)
            sys.stdout.write(text.decode("utf-8", "replace"))
            sys.stdout.flush()


class _Job:
    """msrun with its ranks and, on the first host, the scheduler."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ranks: dict[int, int] = {}  # process id -> rank
        self.scheduler: int | None = None
        self.code = 0
        self.failed: str | None = None  # what ended first, and how
        self.stops = 0
        with open(plan.logs / "msrun.log", "wb") as log:
            log.write((shlex.join(["msrun", *_msrun_options(plan)]) + "\n").encode())
        self.process = subprocess.Popen(
            [sys.executable, MSRUN, *_msrun_options(plan)],
            env=_environment(plan),
            stdin=subprocess.PIPE,  # msrun.py sees by it that this process is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the ranks through `stop`, once
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def stop(self, number: int, frame: object) -> None:
        """Hand a signal on to every rank; at the second one, end them at once."""
        self.stops += 1
        for pid in self.ranks:
            _send(pid, signal.SIGTERM if self.stops == 1 else signal.SIGKILL)

    def is_running(self) -> bool:
        """Whether msrun is still there."""
        self._find_processes()
        return self.process.poll() is None

    def end(self) -> None:
        """Leave no process of the job."""
        for pid in (*self.ranks, self.scheduler, self.process.pid):
            if pid is not None:
                _send(pid, signal.SIGKILL)
        self.reader.join(5)
        if self.process.wait() != 0 and self.code == 0:
            self.code, self.failed = 1, f"msrun failed ({self.plan.logs / 'msrun.log'})"

    def _read(self) -> None:
        """Keep msrun's words, and act when it says that a rank failed.

        It ends the other ranks itself, but then waits for the scheduler, which takes half a minute
        to notice, and ten where the ranks failed before they had met.
        """
        with open(self.plan.logs / "msrun.log", "ab") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                found = FAILED.search(line.decode("utf-8", "replace"))
                if found:
                    self._find_processes()
                    self._note_failure(int(found[1]), int(found[2]))
                    if self.scheduler is not None:
                        _send(self.scheduler, signal.SIGKILL)

    def _note_failure(self, pid: int, code: int) -> None:
        """Keep the first rank that did not end well."""
        if self.failed is None:
            rank = self.ranks.get(pid)
            name = "a rank" if rank is None else f"rank {rank}"
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.failed = f"{name} (process {pid}) ended by {cause}"
            self.code = 128 - code if code < 0 else code

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
            elif environ.get("MS_ROLE") == "MS_WORKER":
                self.ranks[child.pid] = int(environ["RANK_ID"])


def _environment(plan: Plan) -> dict[str, str]:
    """Return what msrun, and by it the ranks, get as environment."""
    ours = {k: v for k, v in plan.environment.items() if k not in SET_BY_MSRUN}
    environ = {**os.environ, **ours, "PYTHONUNBUFFERED": "1"}
    environ["PATH"] = f"{Path(_interpreter()).parent}{os.pathsep}{environ.get('PATH', '')}"
    # msrun tells of a failed rank at level 3, error; the ranks inherit the level.
    environ["GLOG_v"] = min(environ.get("GLOG_v", "3"), "3")
    return environ


def _explain(plan: Plan, job: _Job) -> None:
    """Say which rank failed, why where its log tells, and where the logs are."""
    if job.stops and job.code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        print(f"stopped as asked; go on with --resume. Logs: {plan.logs}", file=sys.stderr)
        return
    print(f"error: {job.failed}; the other ranks were ended", file=sys.stderr)
    for rank in plan.ranks:
        log = _log(plan, rank)
        lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
        reasons = [line for line in lines if REASON.match(line)]
        reason = reasons[-1] if reasons else "no error of its own"
        if plan.node_num > 1 and (not reasons or CLUSTER.search(reason)):
            reason += ELSEWHERE
        print(f"  rank {rank}: {reason}; {log}", file=sys.stderr)


def _log(plan: Plan, rank: int) -> Path:
    return plan.logs / f"worker_{rank}.log"


def _interpreter() -> str:
    """This interpreter under one of the two names that msrun can start."""
    folder = Path(sys.executable).parent
    for name in ("python", "python3"):
        if shutil.which(name, path=str(folder)):
            return str(folder / name)
    raise UserError(f"{folder}: no python or python3 beside {Path(sys.executable).name}")


def _msrun_options(plan: Plan) -> list[str]:
    """Return msrun's command line; it gives each rank the environment that the plan shows."""
    options = {
        "worker_num": plan.world,
        "local_worker_num": len(plan.ranks),
        "node_rank": plan.node_rank,
        "master_addr": plan.master_addr,
        "master_port": plan.master_port,
        "log_dir": plan.logs,
        "join": True,
        "tail_worker_log": -2,  # the console is ours
    }
    if plan.bind_core is not None:
        options["bind_core"] = plan.bind_core
    return [*(f"--{k}={v}" for k, v in options.items()), Path(_interpreter()).name, *plan.command]


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
