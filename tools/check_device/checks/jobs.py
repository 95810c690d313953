"""Checks distributed jobs started by the script: killed, restarted at once, stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from src.training.trainer import RESUMED
from tools.check_device.checks.ranks import free_port, number_of_ranks
from tools.check_device.checks.training import last_line
from tools.check_device.registry import Finding, Setting
from tools.check_device.runner import ROOT

START_SECONDS, END_SECONDS = 300, 90
KEYS = (
    "--model.embed_dims=[8,16,32]", "--model.depths=[1,1,1]", "--data.train_images=256",
    "--training.batch_size=16", "--evaluation.every=100000", "--training.epochs=100000",
)  # fmt: skip


class _Job:
    """A job of scripts/run_distribute_train.sh with its output in a file."""

    def __init__(self, setting: Setting, world: int, port: int, *words: str) -> None:
        self.output = Path(setting.folder) / f"job-{time.monotonic_ns()}.log"
        script = ROOT / "scripts/run_distribute_train.sh"
        command = ["bash", str(script), "config/digits/cvt_nano.yaml", "-", str(world)]
        environment = {**os.environ, "DEVICE_TARGET": setting.device, "PYTHON": sys.executable}
        environment["MASTER_PORT"] = str(port)
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                [*command, "--output", "job", *KEYS, *words],
                cwd=setting.folder, env=environment, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def text(self) -> str:
        """Return its output so far."""
        return self.output.read_text("utf-8", "replace")

    def wait_for(self, pattern: str) -> None:
        """Wait for a line of its output that matches.

        Raises:
            RuntimeError: the job ended or took too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while not re.search(pattern, self.text(), re.M):
            if self.process.poll() is not None or time.monotonic() > deadline:
                print(self.text())
                raise RuntimeError(f"the job did not start training: {last_line(self.text())}")
            time.sleep(0.2)

    def rank(self, number: int) -> psutil.Process:
        """Return the process of a rank."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            environ = process.environ()
            if environ.get("MS_ROLE") == "MS_WORKER" and environ.get("RANK_ID") == str(number):
                return process
        raise RuntimeError(f"no process has rank {number}")

    def wait(self) -> tuple[int | None, float]:
        """Wait for its end; return the exit code, None if it does not end, and the seconds."""
        start = time.monotonic()
        try:
            code = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        return code, time.monotonic() - start


def killed_rank(setting: Setting) -> Finding:
    """Kill a job's last rank, resume the job at once and stop it by SIGTERM."""
    world, port = number_of_ranks(setting), free_port()
    begun = r"^epoch \d+/"
    job = _Job(setting, world, port)
    job.wait_for(begun)
    children = psutil.Process(job.process.pid).children(recursive=True)
    job.rank(world - 1).kill()
    code, seconds = job.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    faults = []
    if code != 128 + signal.SIGKILL:
        faults.append(f"after a rank was killed the job ended with {code}, not 137")
    if alive:
        faults.append(f"{len(alive)} processes of the killed job still run")
    again = _Job(setting, world, port, "--resume")
    again.wait_for(f"^{RESUMED}")
    again.wait_for(begun)
    again.process.send_signal(signal.SIGTERM)
    stopped, seconds_to_stop = again.wait()
    if stopped != 128 + signal.SIGTERM:
        faults.append(f"after SIGTERM the job ended with {stopped}, not 143")
    if "saved at epoch" not in again.text():
        faults.append("after SIGTERM no state was saved")
    if faults:
        print(job.text()[-3000:], again.text()[-3000:], sep="\n")
    return Finding(
        f"exit {code} in {seconds:.0f} s; resumed; exit {stopped} in {seconds_to_stop:.0f} s",
        "137; 143", not faults, hint="; ".join(faults), details={"ranks": world},
    )  # fmt: skip
