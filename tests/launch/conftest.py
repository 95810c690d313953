"""A port for the ranks to meet at, and a folder that is not to be imported from."""

import socket
from pathlib import Path

import pytest


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
