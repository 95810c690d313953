"""How a job ends when a rank crashes or is stopped: stand-ins for the program, run by msrun."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from src import distributed
from src.launch import job
from src.launch.job import _Job, _LogFollower, _report_failure, run
from src.launch.plan import build_plan
from src.training.stop_signal import SIGNALS
from tests.conftest import ROOT

# MindSpore's clean-up at exit crashes now and then; by then every rank has announced its end.
PROGRAM = """
import os, signal, sys, time
if os.environ["MS_ROLE"] == "MS_WORKER":
    if sys.argv[2:] == ["announced"]:
        print(f"rank {os.environ['RANK_ID']} ends with exit code {sys.argv[1]}", flush=True)
    elif sys.argv[2:]:
        print(f"{sys.argv[0].split('/')[-1]}: error: fewer images (30)", flush=True)
    if os.environ["RANK_ID"] == "1":
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGSEGV)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, code, message",
    [
        (["0", "announced"], 0, ""),
        (["143", "announced"], 143, "stopped by request"),
        (["2", "refused"], 2, "fewer images (30)"),
        (["0"], 139, "ended by SIGSEGV; the other ranks were stopped"),
    ],
)
def test_a_crash_after_the_announced_end_is_no_failure(
    tmp_path, capsys, free_port, words, code, message
):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environ = {**os.environ, "MASTER_PORT": str(free_port)}
    plan = build_plan("CPU", "2", [str(program), *words], tmp_path / "logs", environ)
    start = time.monotonic()
    assert run(plan) == code
    assert time.monotonic() - start < 60
    printed = capsys.readouterr().err
    assert message in printed if message else not printed


@pytest.mark.parametrize(
    "last_line, hosts, is_named",
    [
        ("RuntimeError: The state of the cluster is error, total nodes num: 2", 2, True),
        ("RuntimeError: AllReduce failed: receiving from rank 1 timed out", 2, True),
        ("", 2, True),
        ("train.py: error: fewer images (30)", 2, False),
        ("RuntimeError: out of memory", 1, False),
    ],
)
def test_a_failure_names_the_other_hosts_unless_it_is_a_users_error(
    tmp_path, capsys, last_line, hosts, is_named
):
    (tmp_path / "worker_0.log").write_text(f"epoch 1\n{last_line}\n")
    plan = SimpleNamespace(ranks={0: {}}, node_num=hosts, node_rank=0, logs=tmp_path)
    ended = SimpleNamespace(exit_code=1, stop_signal=0, failure="rank 0 ended by exit code 1")
    ended.is_stopped = False
    _report_failure(plan, ended)
    printed = capsys.readouterr().err
    assert (last_line or "no error in its log") in printed
    assert ("a rank of another host may have failed first" in printed) == is_named


def test_a_character_of_several_bytes_may_arrive_in_parts(tmp_path, capsys):
    follower = _LogFollower(tmp_path / "log")
    with open(tmp_path / "log", "wb", buffering=0) as log:
        for byte in "猫 ü\n".encode():
            log.write(bytes([byte]))
            follower.print_new()
    assert capsys.readouterr().out == "猫 ü\n"


def test_a_job_goes_on_when_its_terminal_or_tee_has_ended(tmp_path, monkeypatch):
    """Ctrl-C in `run_distribute_train.sh | tee log` ends tee, too: the ranks were killed."""
    log = tmp_path / "worker_0.log"
    log.write_text("epoch 1\n")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        follower = _LogFollower(log)
        follower.print_new()
        with open(log, "a") as more:
            more.write("epoch 2\n")
        follower.print_new()
    assert follower.offset == log.stat().st_size


# Saves for two seconds, as the ranks of a job do after a signal; a second one would end it. As in
# MindSpore's graphs, SIGINT becomes SIGTERM.
SAVING = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from types import SimpleNamespace
from src.training.stop_signal import StopSignal
if os.environ["MS_ROLE"] == "MS_WORKER":
    with StopSignal(SimpleNamespace(world=1)) as stop:
        stop.defer_signals()
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        print("training", flush=True)
        while not stop.should_stop():
            time.sleep(0.1)
        time.sleep(2)
        open(f"saved-{{os.environ['RANK_ID']}}", "w").close()
        while not all(map(os.path.exists, ("saved-0", "saved-1"))):
            time.sleep(0.1)
        print(f"rank 0 ends with exit code {{128 + stop.signal}}", flush=True)
        os._exit(128 + stop.signal)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, receivers, code",
    [
        (signal.SIGTERM, "all", 143), (signal.SIGHUP, "all", 129), (signal.SIGINT, "all", 130),
        (signal.SIGINT, "ranks", 143),
    ],
)  # fmt: skip
def test_ranks_save_after_a_signal_to_every_process_or_to_them_alone(
    tmp_path, capsys, free_port, monkeypatch, number, receivers, code
):
    """To all as by Slurm and systemd; to the ranks alone as by a stop on another host."""
    program = tmp_path / "program.py"
    program.write_text(SAVING)
    monkeypatch.chdir(tmp_path)
    environ = {**os.environ, "MASTER_PORT": str(free_port)}
    plan = build_plan("CPU", "2", [str(program)], tmp_path / "run/ranks/now", environ)
    logs = [plan.logs / f"worker_{rank}.log" for rank in (0, 1)]

    def stop():
        while not all(log.exists() and log.read_text() for log in logs):
            time.sleep(0.1)
        processes = psutil.Process().children(recursive=True)
        if receivers == "ranks":
            processes = [p for p in processes if p.environ().get("MS_ROLE") == "MS_WORKER"]
        for process in processes:
            process.send_signal(number)
        if receivers == "all":
            os.kill(os.getpid(), number)

    threading.Thread(target=stop, daemon=True).start()
    assert run(plan) == code
    assert "stopped by request; nothing was saved yet" in capsys.readouterr().err
    assert all((tmp_path / f"saved-{rank}").exists() for rank in (0, 1))


def test_the_launcher_forwards_the_signal_it_received_and_kills_at_the_second_request(monkeypatch):
    """Ranks that msrun started since the last poll receive it, too."""
    sent, clock = [], SimpleNamespace(now=100.0)
    launched = _Job.__new__(_Job)
    launched.stop_signal, launched.stop_time, launched.ranks = 0, 0.0, {}
    monkeypatch.setattr(launched, "_find_processes", lambda: launched.ranks.update({11: 0, 12: 1}))
    monkeypatch.setattr(job, "_send", lambda *signals: sent.append(signals))
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: clock.now))
    launched.forward_signal(signal.SIGINT, None)
    clock.now += 1
    launched.forward_signal(signal.SIGTERM, None)
    assert sent == [(11, signal.SIGINT), (12, signal.SIGINT)]
    clock.now += 2
    launched.forward_signal(signal.SIGINT, None)
    assert sent[2:] == [(11, signal.SIGKILL), (12, signal.SIGKILL)]


def test_the_scheduler_outlives_a_stop_signal_and_a_rank_that_waits_for_others_does_not(
    monkeypatch,
):
    """Ranks need the scheduler while they save; `init` runs for minutes without Python."""
    seen = []

    def init():
        seen.append([signal.getsignal(number) for number in SIGNALS])

    group = SimpleNamespace(init=init, get_rank=lambda: 0, get_group_size=lambda: 2)
    monkeypatch.setattr(distributed, "communication", group)
    monkeypatch.setattr(distributed, "_wait_for_scheduler", lambda *address: None)
    for name in ("MS_WORKER_NUM", "MS_SCHED_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MS_SCHED_HOST", "127.0.0.1")
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for role, action in (("MS_SCHED", signal.SIG_IGN), ("MS_WORKER", signal.SIG_DFL)):
        monkeypatch.setenv("MS_ROLE", role)
        distributed.join()
        assert seen.pop() == [action] * 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_rank_ends_at_once_after_an_unexpected_error(monkeypatch, capsys):
    """MindSpore's cleanup waited for a rank that had gone, and with it the whole host."""
    ends = []
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(os, "_exit", ends.append)
    distributed._exit_at_once_after_errors()
    try:
        raise RuntimeError("abnormal nodes num: 1")
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    assert ends == [1] and "RuntimeError: abnormal nodes num: 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_ranks_start_ends_the_job(tmp_path, capsys, free_port, number):
    """While msrun imports MindSpore; the signal reached nobody, and the job trained on."""
    program = tmp_path / "program.py"
    program.write_text("import time; time.sleep(60)")
    environ = {**os.environ, "MASTER_PORT": str(free_port)}
    plan = build_plan("CPU", "2", [str(program)], tmp_path / "run/ranks/now", environ)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    start = time.monotonic()
    timer.start()
    assert run(plan) == 128 + number
    assert time.monotonic() - start < 30
    assert "stopped by request; nothing was saved yet" in capsys.readouterr().err
    own = [p for p in psutil.process_iter(["cmdline"]) if str(program) in (p.info["cmdline"] or [])]
    assert not own
