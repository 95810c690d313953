"""What an executable loads before its first result."""

import subprocess
import sys

from tests.conftest import ROOT

MODULES = ("src.training.run", "src.evaluation.report", "src.deploy.classify", "src.deploy")


def test_matplotlib_is_loaded_only_to_draw():
    """It takes half a second of every start."""
    program = f"""
import sys
from src.device import prepare_environment
prepare_environment()
import {", ".join(MODULES)}
sys.exit("matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT)
    assert done.returncode == 0
