"""The shell scripts: clean, and honest about an interpreter that can't do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_an_interpreter_that_cannot_do_is_refused(tmp_path):
    """A copy of the scripts with a Python that has no MindSpore and is too old."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    old = tmp_path / "python3.7"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(old)}
    command = ["bash", str(tmp_path / "scripts/quickstart.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not Python 3.9 to 3.12" in done.stderr
    assert not Path(tmp_path / ".venv").exists()


def test_the_quickstart_writes_its_samples(tmp_path):
    """Its one line of Python, as it stands in the script."""
    (code,) = re.findall(r'-c "(.*)"$', (ROOT / "scripts/quickstart.sh").read_text(), re.M)
    code = code.replace("$digits", str(tmp_path / "digits"))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert len(list((tmp_path / "digits").glob("*.png"))) == 10
