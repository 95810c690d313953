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
REASON = re.compile(r"([\w.]+: )?[\w.]*(error|Error|Interrupt)\b.*: .")
FAILED = re.compile(r"Worker process (\d+) exit with exception. Error code: (-?\d+)")


def describe(plan: Plan) -> str:
    """Each rank's environment and command as a shell would take them."""
    where = f"host {plan.node_rank + 1} of {plan.node_num}, {plan.world} ranks in all"
    by = f"rank table {plan.rank_table}" if plan.rank_table else " ".join(_msrun(plan))
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
    job = (_TableJob if plan.rank_table else _MsrunJob)(plan)
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
    """What both starts share: the ranks' processes, and how the first failed one ended."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ranks: dict[int, int] = {}  # process id -> rank
        self.code = 0
        self.failed: str | None = None
        self.stops = 0

    def stop(self, number: int, frame: object) -> None:
        """Hand a signal on to every rank; at the second one, end them at once."""
        self.stops += 1
        for pid in self.ranks:
            _send(pid, signal.SIGTERM if self.stops == 1 else signal.SIGKILL)

    def fail(self, pid: int, code: int) -> None:
        """Note the first rank that did not end well."""
        if self.failed is None:
            rank = self.ranks.get(pid)
            name = "a rank" if rank is None else f"rank {rank}"
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.failed = f"{name} (process {pid}) ended by {cause}"
            self.code = 128 - code if code < 0 else code

    def end(self) -> None:
        """Leave no process of the job."""
        for pid in self.ranks:
            _send(pid, signal.SIGKILL)


class _MsrunJob(_Job):
    """Ranks and scheduler under msrun."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        environ["PATH"] = f"{Path(_interpreter()).parent}{os.pathsep}{environ.get('PATH', '')}"
        # msrun tells of a failed rank at level 3, error; the ranks inherit the level.
        environ["GLOG_v"] = min(environ.get("GLOG_v", "3"), "3")
        if "LOCAL_WORLD_SIZE" in plan.environment:
            environ["LOCAL_WORLD_SIZE"] = plan.environment["LOCAL_WORLD_SIZE"]
        self.scheduler: int | None = None
        with open(plan.logs / "msrun.log", "wb") as log:
            log.write((" ".join(_msrun(plan)) + "\n").encode())
        self.process = subprocess.Popen(
            [sys.executable, *_msrun(plan)[1:]],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the ranks through `stop`, once
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

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
                    self._find_ranks()
                    self.fail(int(found[1]), int(found[2]))
                    if self.scheduler is not None:
                        _send(self.scheduler, signal.SIGKILL)

    def is_running(self) -> bool:
        """Whether msrun is still there."""
        self._find_ranks()
        return self.process.poll() is None

    def _find_ranks(self) -> None:
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

    def end(self) -> None:
        """Leave no process of the job."""
        super().end()
        for pid in (self.scheduler, self.process.pid):
            if pid is not None:
                _send(pid, signal.SIGKILL)
        self.reader.join(5)
        if self.process.wait() != 0 and self.code == 0:
            self.code, self.failed = 1, f"msrun failed ({self.plan.logs / 'msrun.log'})"


class _TableJob(_Job):
    """Ranks of a rank table: HCCL needs no scheduler."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.processes: list[subprocess.Popen] = []
        for rank, own in plan.ranks.items():
            environ = {**os.environ, **plan.environment, **own, "PYTHONUNBUFFERED": "1"}
            with open(_log(plan, rank), "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, *plan.command],
                    env=environ,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)
            self.ranks[process.pid] = rank

    def is_running(self) -> bool:
        """Whether every rank is well and one still runs."""
        for process in self.processes:
            if process.poll():
                self.fail(process.pid, process.returncode)
        return self.failed is None and any(p.returncode is None for p in self.processes)

    def end(self) -> None:
        """Leave no process of the job."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


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
        print(f"  rank {rank}: {reasons[-1] if reasons else 'no error'}; {log}", file=sys.stderr)


def _log(plan: Plan, rank: int) -> Path:
    return plan.logs / f"worker_{rank}.log"


def _interpreter() -> str:
    """This interpreter under one of the two names that msrun can start."""
    folder = Path(sys.executable).parent
    for name in ("python", "python3"):
        if shutil.which(name, path=str(folder)):
            return str(folder / name)
    raise UserError(f"{folder}: no python or python3 beside {Path(sys.executable).name}")


def _msrun(plan: Plan) -> list[str]:
    """msrun's command line; it gives each rank the environment that the plan shows."""
    words = ["msrun", "-m", "mindspore.parallel.cluster.run"]
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
    words += [f"--{name}={value}" for name, value in options.items()]
    return [*words, Path(_interpreter()).name, *plan.command]


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
