"""How a job ends when a rank crashes: stand-ins for the program, started by msrun."""

import os
import signal
import threading
import time

import psutil
import pytest

from src.launch.job import run
from src.launch.plan import build_plan

# MindSpore's clean-up at exit crashes now and then; by then every rank has announced its end.
PROGRAM = """
import os, signal, sys, time
if os.environ["MS_ROLE"] == "MS_WORKER":
    if sys.argv[2:] == ["announced"]:
        print(f"rank {os.environ['RANK_ID']} ends with exit code {sys.argv[1]}", flush=True)
    elif sys.argv[2:]:
        print(f"{sys.argv[0].split('/')[-1]}: error: 30 images are not one batch", flush=True)
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
        (["143", "announced"], 143, "rank 1 (process"),
        (["2", "refused"], 2, "30 images are not one batch"),
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
