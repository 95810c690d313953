"""A port for the ranks to meet at."""

import socket

import pytest


@pytest.fixture
def free_port() -> int:
    """A port that was free a moment ago; the next few are likely free as well."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
