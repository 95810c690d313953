"""How a job ends when a rank crashes: stand-ins for the program, started by msrun."""

import os
import time

import pytest

from src.launch.job import run
from src.launch.plan import build_plan

# MindSpore's clean-up at exit crashes now and then; by then every rank has announced its end.
PROGRAM = """
import os, signal, sys, time
if os.environ["MS_ROLE"] == "MS_WORKER":
    if len(sys.argv) > 2:
        print(f"rank {os.environ['RANK_ID']} ends with exit code {sys.argv[1]}", flush=True)
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
