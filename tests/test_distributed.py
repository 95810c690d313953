"""Which processes count as ranks, by their environment; and how a rank meets the others."""

import socket
import threading
import time

import pytest

from src import distributed
from src.distributed import is_distributed
from src.errors import UserError

MSRUN = {
    "MS_WORKER_NUM": "2", "MS_ROLE": "MS_WORKER", "MS_SCHED_HOST": "127.0.0.1",
    "MS_SCHED_PORT": "8118",
}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets variables where no launcher has left any."""
    for name in [*distributed._OF_MSRUN, *distributed._OF_OTHERS]:
        monkeypatch.delenv(name, raising=False)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def test_msrun_starts_ranks(environment):
    assert not is_distributed()
    environment({**MSRUN, "OMPI_COMM_WORLD_SIZE": "2", "RANK_SIZE": "2"})
    assert is_distributed()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK_SIZE": "8"},
        {"RANK_SIZE": "eight"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"MS_WORKER_NUM": "2"},
        {"MS_ROLE": "MS_WORKER"},
        {"PMI_SIZE": "4"},
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"WORLD_SIZE": "2", "RANK": "0"},
    ],
)
def test_what_another_launcher_left_is_answered_in_one_line(environment, variables):
    environment(variables)
    name = next(iter(variables))
    with pytest.raises(UserError, match=f"{name}={variables[name]} .*run_distribute_train.sh") as e:
        is_distributed()
    assert "\n" not in str(e.value) and f"unset {name}" in str(e.value)


@pytest.mark.parametrize("name, value", [("RANK_SIZE", "1"), ("WORLD_SIZE", ""), ("PMI_SIZE", "0")])
def test_one_process_is_one(environment, name, value):
    environment({name: value})
    assert not is_distributed()


def test_a_rank_waits_until_the_scheduler_accepts_connections(monkeypatch):
    """And not for ever: `communication.init` reports a scheduler that never comes."""
    with socket.socket() as scheduler:
        scheduler.bind(("127.0.0.1", 0))
        port = scheduler.getsockname()[1]
        timer = threading.Timer(0.5, scheduler.listen)
        start = time.monotonic()
        timer.start()
        distributed._wait_for_scheduler("127.0.0.1", port)
        assert 0.4 < time.monotonic() - start < 5
        timer.join()
    monkeypatch.setattr(distributed, "SCHEDULER_SECONDS", 0.3)
    start = time.monotonic()
    distributed._wait_for_scheduler("127.0.0.1", port)
    assert 0.2 < time.monotonic() - start < 5
