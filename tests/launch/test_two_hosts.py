"""Two hosts, as network namespaces: the same script on each, one model."""

import os
import subprocess
import time

import numpy as np
import psutil
import pytest

from tests.conftest import ROOT, graph_cache
from tests.launch.runs import ENDLESS, TWO_RANKS, losses


def environment(graphs, keys):
    return {**os.environ, **graph_cache(graphs, *keys)}


def test_a_rank_that_fails_on_one_host_ends_the_other(tmp_path, graph_folder):
    """Within a minute, and the host whose own ranks were well says where to look."""
    with open(tmp_path / "out", "w") as out:
        hosts = subprocess.Popen(
            ["bash", str(ROOT / "tests/launch/two_hosts.sh"), str(tmp_path), *ENDLESS],
            env=environment(graph_folder, ENDLESS), stdout=out, stderr=out,
        )  # fmt: skip
    said = [tmp_path / f"host{i}.log" for i in (0, 1)]
    deadline = time.time() + 180
    while time.time() < deadline and not (said[0].exists() and "epoch 2/" in said[0].read_text()):
        if hosts.poll() == 77:
            pytest.skip("needs root and iproute2 for network namespaces")
        assert hosts.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.2)
    family = psutil.Process(hosts.pid).children(recursive=True)
    (rank,) = [p for p in family if p.environ().get("MS_ROLE") == "MS_WORKER"
               and p.environ()["RANK_ID"] == "1"]  # fmt: skip
    rank.kill()
    start = time.time()
    assert hosts.wait(timeout=90) != 0 and time.time() - start < 60
    assert f"rank 1 (process {rank.pid}) ended by SIGKILL" in said[1].read_text()
    assert "a rank of another host may have failed first" in said[0].read_text()
    assert not psutil.wait_procs(family, timeout=5)[1]


def test_two_hosts_train_to_the_losses_of_one(one_process, tmp_path, graph_folder):
    """Twenty steps of two batches of 32 against one batch of 64; host 1 writes no run."""
    script = ["bash", str(ROOT / "tests/launch/two_hosts.sh"), str(tmp_path)]
    hosts = subprocess.run(
        [*script, *TWO_RANKS],
        env=environment(graph_folder, TWO_RANKS),
        capture_output=True,
        text=True,
    )
    if hosts.returncode == 77:
        pytest.skip("needs root and iproute2 for network namespaces")
    said = [(tmp_path / f"host{i}.log").read_text() for i in (0, 1)]
    assert hosts.returncode == 0, hosts.stderr + "".join(said)
    assert len(losses(one_process)) == 20
    np.testing.assert_allclose(losses(tmp_path / "host0"), losses(one_process), rtol=1e-5)
    assert "rank 1 of 2" in said[1] and "host 2 of 2" in said[1]
    assert [path.name for path in (tmp_path / "host1").iterdir()] == ["ranks"]
