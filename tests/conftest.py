"""What every test needs: the environment that the executables set, and small shared models."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from src.runtime import prepare_environment

prepare_environment()  # before any test imports MindSpore

ROOT = Path(__file__).resolve().parents[1]
TINY = {"embed_dims": (8, 16, 32), "num_heads": (1, 2, 4), "depths": (1, 1, 2), "num_classes": 10}
TINY_KEYS = [
    "--model.embed_dims=[8,16,32]",
    "--model.depths=[1,1,1]",
    "--training.batch_size=250",
    "--evaluation.batch_size=300",
]


@pytest.fixture(autouse=True)
def graph_mode():
    """Each test starts in graph mode, as the executables do."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)


@pytest.fixture(scope="session")
def compiler():
    """Without one the tests of compiled operators have nothing to test."""
    from src.ops.library import COMPILERS

    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def built(compiler) -> Path:
    """The library of compiled operators; where one can't be built, its tests fail."""
    from src.ops.library import library
    from src.runtime import cache_folder

    return library(cache_folder())


def run_command(*words: str, cwd: Path, module: bool = False) -> subprocess.CompletedProcess:
    """Run an executable or a module of the repository as a user would, from another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    if module:
        environment["PYTHONPATH"] = str(ROOT)
        name = words[0].removesuffix(".py").replace("/", ".")
        command = [sys.executable, "-m", name, *words[1:]]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a finished run: a tiny network, two epochs on the digits, EMA on."""
    work = tmp_path_factory.mktemp("trained")
    done = run_command(
        "train.py",
        f"--config={ROOT / 'config/digits/cvt_nano.yaml'}",
        "--output=run",
        "--training.epochs=2",
        "--training.ema_decay=0.9",
        "--model.drop_path_rate=0.1",
        *TINY_KEYS,
        cwd=work,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in work.iterdir()] == ["run"], "training left files behind"
    return work / "run"
