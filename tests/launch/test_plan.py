"""What the launch script accepts, shows and refuses; nothing is started here."""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import train
from src.errors import UserError
from src.launch.__main__ import read_plan
from src.launch.job import _environment, describe
from src.launch.plan import visible_devices
from tests.conftest import ROOT

RECIPE = "config/digits/cvt_nano.yaml"
ASCEND = {"ASCEND_RT_VISIBLE_DEVICES": "4,5", "MASTER_PORT": "18118"}


def plan(*argv, **environ):
    return read_plan([*argv, "--dry_run"], {**ASCEND, **environ})[0]


@pytest.mark.parametrize(
    ("value", "count"), [("0,1", 2), ("0,1,", 2), ("-1", 0), ("2,-1,3", 1), (" ", 0), ("GPU-1f", 1),
                         ("NoDevFiles", 0)]
)  # fmt: skip
def test_devices_are_counted_as_their_runtime_counts_them(value, count):
    assert len(visible_devices("GPU", {"CUDA_VISIBLE_DEVICES": value})) == count


def test_the_ranks_number_of_a_container_divides_no_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "LOCAL_WORLD_SIZE" not in _environment(plan(RECIPE, "-"))


def test_each_rank_gets_its_numbers_on_every_host():
    seen = []
    for node in ("0", "1"):
        environ = {"NODE_NUM": "2", "NODE_RANK": node, "MASTER_ADDR": "10.0.0.1"}
        found = plan(RECIPE, "-", "2", "--optimizer.lr", "1e-4", **environ)
        assert (found.world, found.environment["MS_SCHED_HOST"]) == (4, "10.0.0.1")
        seen += [(rank, own["RANK_ID"], own["DEVICE_ID"]) for rank, own in found.ranks.items()]
    assert seen == [(0, "0", "0"), (1, "1", "1"), (2, "2", "0"), (3, "3", "1")]
    words = describe(found)
    assert "--optimizer.lr 1e-4" in words and "--node_rank=1" in words and "RANK_ID=3" in words
    command = shlex.split(words.splitlines()[-1])
    assert command[-2] == "--output" and command[-1].endswith("runs/digits_cvt_nano")


def test_a_run_goes_on_as_with_train_py():
    for words in (["--resume"], ["--resume", "--accept_changes"]):
        line = describe(plan(RECIPE, "-", "2", *words)).splitlines()[-1]
        assert " ".join(words) in line


def test_a_run_named_with_resume_is_the_one_that_goes_on(tmp_path):
    """As with train.py, not the recipe's default folder."""
    for run in ("exp7", "exp8"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "config.yaml").touch()
    state = tmp_path / "exp7/checkpoints/step-00000009.ckpt"
    state.touch()
    for words in (["--resume", str(state)], [f"--resume={tmp_path / 'exp7'}"]):
        line = describe(plan(RECIPE, "-", "2", *words)).splitlines()[-1]
        assert shlex.split(line)[-2:] == ["--output", str(tmp_path / "exp7")]
    branch = ["--resume", str(state), "--output", str(tmp_path / "exp8")]
    assert describe(plan(RECIPE, "-", "2", *branch)).endswith("exp8")
    with pytest.raises(UserError, match="exp7: not the run in --output .*exp8; leave out --output"):
        plan(RECIPE, "-", "--resume", str(tmp_path / "exp7"), "--output", str(tmp_path / "exp8"))
    with pytest.raises(UserError, match="no run there to resume"):
        plan(RECIPE, "-", "--resume", str(tmp_path))


@pytest.mark.parametrize("given", ["", "checkpoints", "checkpoints/step-00000009.ckpt"])
def test_only_the_first_host_needs_the_run_to_resume(tmp_path, given):
    """With disks of their own, the others have no such folder; they receive the state."""
    hosts = {"NODE_NUM": "2", "MASTER_ADDR": "10.0.0.1"}
    run = tmp_path / "cvt.v2"
    words = ["--resume", str(run / given)]
    other = plan(RECIPE, "-", "2", *words, **hosts, NODE_RANK="1")
    with pytest.raises(UserError, match="no such file"):
        plan(RECIPE, "-", "2", *words, **hosts)
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    if given.endswith(".ckpt"):
        (run / given).touch()
    assert plan(RECIPE, "-", "2", *words, **hosts).command == other.command
    assert other.command[-2:] == ["--output", str(run)]


@pytest.mark.parametrize(("rank", "code"), [("0", 2), ("1", 0)])
def test_only_the_first_rank_needs_the_state(monkeypatch, tmp_path, rank, code):
    """The others pass it on unread, so that a missing one is never taken for the newest."""
    seen = []
    monkeypatch.setenv("RANK_ID", rank)
    monkeypatch.setattr("src.training.run.train", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(ROOT / RECIPE),
                        "--resume", "no/step-1.ckpt", "--output", str(tmp_path)])  # fmt: skip
    monkeypatch.setattr("train.prepare_environment", lambda: None)
    monkeypatch.setattr("train.log_to", lambda: None)
    with pytest.raises(SystemExit) if code else contextlib.nullcontext():
        train.main()
    assert [arguments[2] for arguments in seen] == [Path("no/step-1.ckpt")] * (not code)


def test_a_home_folder_is_expanded(tmp_path):
    found = plan(RECIPE, "-", "2", "--output=~/run", HOME=str(tmp_path))
    assert found.command[-1] == os.path.expanduser("~/run")


def test_hosts_that_share_a_folder_have_logs_of_their_own():
    hosts = {"NODE_NUM": "2", "MASTER_ADDR": "10.0.0.1"}
    names = [plan(RECIPE, "-", "2", **hosts, NODE_RANK=rank).logs.name for rank in "01"]
    assert [name[-6:] for name in names] == ["-host0", "-host1"]
    assert "host" not in plan(RECIPE, "-", "2").logs.name


def test_paths_with_spaces_stay_whole(tmp_path):
    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text((ROOT / RECIPE).read_text())
    (tmp_path / "my data").mkdir()
    output = str(tmp_path / "my run")
    found = plan(str(recipe), str(tmp_path / "my data"), "--output", output)
    assert found.world == 2, "all visible devices by default"
    line = describe(found).splitlines()[-1]
    assert shlex.split(line)[-2:] == ["--output", output]
    assert str(tmp_path / "my data") in shlex.split(line)


@pytest.mark.parametrize(
    "argv, environ, message",
    [
        ([RECIPE, "-", "3"], {}, "DEVICE_NUM 3: this host has 2 visible Ascend devices"),
        ([RECIPE, "-", "0"], {}, "DEVICE_NUM 0"),
        ([RECIPE, "-", "two"], {}, "DEVICE_NUM two: must be a whole number"),
        (["config/none.yaml", "-"], {}, "CONFIG config/none.yaml: no such file"),
        ([RECIPE, "/no/data"], {}, "DATA /no/data: no such folder"),
        ([RECIPE], {}, "data"),
        ([RECIPE, "-", "2", "--optimizer.l", "1"], {}, "unknown key optimizer.l: did you mean"),
        ([RECIPE, "-"], {"DEVICE_TARGET": "TPU"}, "DEVICE_TARGET=TPU: choose one of"),
        (
            [RECIPE, "-"],
            {"NODE_NUM": "2", "NODE_RANK": "2"},
            "NODE_RANK=2: must be from 0 to NODE_NUM-1=1",
        ),
        ([RECIPE, "-"], {"NODE_NUM": "2"}, "NODE_NUM=2: set MASTER_ADDR"),
        ([RECIPE, "-"], {"NODE_NUM": "2", "MASTER_ADDR": ""}, "NODE_NUM=2: set MASTER_ADDR"),
        (
            [RECIPE, "-"],
            {"NODE_NUM": "2", "MASTER_ADDR": "fd00::2"},
            "MASTER_ADDR=fd00::2: .*; give the first host's IPv4 address",
        ),
        (
            [RECIPE, "-"],
            {"NODE_NUM": "2", "MASTER_ADDR": "127.0.1.1"},
            "MASTER_ADDR=127.0.1.1: other hosts cannot reach it",
        ),
        ([RECIPE, "-"], {"MASTER_PORT": "80"}, "MASTER_PORT=80"),
        ([RECIPE, "-"], {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ([RECIPE, "-"], {"NODE_NUM": "x"}, "NODE_NUM=x: must be a whole number"),
        ([RECIPE, "-"], {"RANK_TABLE_FILE": "t.json"}, "RANK_TABLE_FILE: msrun starts the ranks"),
        ([RECIPE, "-", "--bind_core=0-3"], {}, "--bind_core=0-3: omit the value, or give"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(argv, environ, message):
    with pytest.raises(UserError, match=message):
        plan(*argv, **environ)


def test_on_one_host_the_address_that_kubernetes_or_torchrun_left_is_not_used():
    """msrun would take it for another host's, and start no scheduler."""
    found = plan(RECIPE, "-", "2", MASTER_ADDR="job-master-0")
    assert found.master_addr == found.environment["MS_SCHED_HOST"] == "127.0.0.1"


def test_the_scheduler_starts_on_the_first_host_alone(monkeypatch, free_port):
    """Where msrun starts none, ranks wait for ten minutes. Other hosts' plans can be shown."""
    names = {"node-0": "10.0.0.1", "debian": "127.0.1.1", "10.0.0.1": "10.0.0.1"}
    monkeypatch.setattr(socket, "gethostbyname", names.__getitem__)
    own = {"eth0": [SimpleNamespace(address="10.0.0.1")]}
    hosts = {**ASCEND, "NODE_NUM": "2", "MASTER_PORT": str(free_port)}
    for node, addresses in (("0", own), ("1", {})):
        monkeypatch.setattr(psutil, "net_if_addrs", lambda addresses=addresses: addresses)
        for name in ("node-0", "10.0.0.1"):
            here = {**hosts, "NODE_RANK": node, "MASTER_ADDR": name}
            assert read_plan([RECIPE, "-", "2"], here)[0].master_addr == name
        wrong = {**hosts, "NODE_RANK": "10"[int(node)], "MASTER_ADDR": "node-0"}
        assert read_plan([RECIPE, "-", "2", "--dry_run"], wrong)
        with pytest.raises(UserError, match=r"MASTER_ADDR=node-0 \(10.0.0.1\): is .* NODE_RANK="):
            read_plan([RECIPE, "-", "2"], wrong)
        with pytest.raises(UserError, match=r"=debian \(127.0.1.1\): other hosts cannot reach it"):
            read_plan([RECIPE, "-", "2"], {**hosts, "NODE_RANK": node, "MASTER_ADDR": "debian"})


def test_msrun_takes_the_same_addresses_for_this_hosts():
    from mindspore.parallel.cluster.process_entity._utils import _is_local_ip

    addresses = [each for every in psutil.net_if_addrs().values() for each in every]
    own = [each.address for each in addresses if each.family == socket.AF_INET]
    found = [each for each in (*own, "127.0.1.1", "203.0.113.9") if _is_local_ip(each)]
    assert found == own


def test_a_busy_port_is_refused():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environ = {**ASCEND, "MASTER_PORT": str(port)}
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: Address already in use; give"):
            read_plan([RECIPE, "-", "2"], environ)


def test_the_script_exits_with_2_and_one_line(tmp_path):
    script = ["bash", str(ROOT / "scripts/run_distribute_train.sh"), "no.yaml", "-"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "CONFIG no.yaml" in done.stderr
    assert not list(tmp_path.iterdir())


def test_cores_are_bound_where_asked():
    assert "--bind_core" not in describe(plan(RECIPE, "-", "2"))
    for words in (["--bind_core"], ["--optimizer.lr=1e-4", "--bind_core"]):
        found = plan(RECIPE, "-", "2", *words, DEVICE_TARGET="CPU")
        assert "--bind_core=True" in describe(found).splitlines()[0]
        assert "LOCAL_WORLD_SIZE" not in found.environment, "or a rank would halve its cores again"
    cores = '{"device0": ["0-3"], "device1": ["4-7"]}'
    found = plan(RECIPE, "-", f"--bind_core={cores}", "2")
    assert f"--bind_core={cores}" in shlex.split(describe(found).splitlines()[0])


def test_hccl_waits_for_what_ranks_wait_for_unless_the_user_said_otherwise():
    found = plan(RECIPE, "-", "2", HCCL_EXEC_TIMEOUT="600").environment
    assert (found["HCCL_CONNECT_TIMEOUT"], found["HCCL_EXEC_TIMEOUT"]) == ("1800", "600")
    assert not [k for k in plan(RECIPE, "-", DEVICE_TARGET="CPU").environment if "HCCL" in k]


def test_the_users_folder_is_not_imported_from(hostile_folder, free_port):
    """Nor is it where CANN's set_env.sh has left an empty entry in PYTHONPATH."""
    script = ["bash", str(ROOT / "scripts/run_distribute_train.sh"), RECIPE, "-", "1", "--dry_run"]
    environment = {**os.environ, "DEVICE_TARGET": "CPU", "PYTHON": sys.executable}
    environment.update(MASTER_PORT=str(free_port), PYTHONPATH="/usr/local/Ascend/python:")
    done = subprocess.run(
        script, cwd=hostile_folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(hostile_folder.glob("ran-*"))


def test_ranks_run_in_the_interpreter_of_the_launcher(tmp_path, monkeypatch):
    """msrun knows it only as python or python3, which may be another version beside it."""
    (tmp_path / "python3.11").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3.11"))
    other = tmp_path / "python3"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    with pytest.raises(UserError, match="python3.11: msrun needs it as python or python3"):
        describe(plan(RECIPE, "-", "2"))
    (tmp_path / "python").symlink_to(tmp_path / "python3.11")
    assert f"{tmp_path}/python " in describe(plan(RECIPE, "-", "2"))
