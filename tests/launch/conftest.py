"""A port for the ranks to meet at, a run to compare with, and a folder not to import from."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, file_lock
from tests.launch.runs import TWENTY_STEPS


@pytest.fixture(autouse=True)
def python(interpreter, monkeypatch):
    """For the scripts."""
    monkeypatch.setenv("PYTHON", interpreter)


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago; the next few are likely free as well."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def hostile_folder(tmp_path) -> Path:
    """A folder whose modules have names that the project imports, and say so when they run."""
    (tmp_path / "src").mkdir()
    names = ("src/__init__", "yaml", "psutil", "numpy", "mindspore", "train", "sitecustomize")
    for name in names:
        module = tmp_path / f"{name}.py"
        module.write_text(f"open({str(tmp_path / 'ran-')!r} + __name__, 'w').close()\n1 / 0\n")
    return tmp_path


@pytest.fixture(scope="session")
def one_process(shared_folder, interpreter) -> Path:
    """The run of `TWENTY_STEPS` by one process with the double batch."""
    work = shared_folder / "one_process"
    script = ROOT / "scripts/run_standalone_train.sh"
    with file_lock(shared_folder / "one_process.lock"):
        if not work.exists():
            work.mkdir()
            done = subprocess.run(
                ["bash", str(script), "config/digits/cvt_nano.yaml", "-", "--output", "one",
                 *TWENTY_STEPS, "--training.batch_size=64"],
                cwd=work, env={**os.environ, "DEVICE_TARGET": "CPU", "PYTHON": interpreter},
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
    return work / "one"
