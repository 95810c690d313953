"""What the launch script accepts, shows and refuses; nothing is started here."""

import json
import shlex
import socket
import subprocess

import pytest

from src.errors import UserError
from src.launch.job import describe, run
from src.launch.plan import Plan, read_plan
from src.launch.rank_table import read_rank_table, write_rank_table
from tests.conftest import ROOT, run_command

RECIPE = "config/digits/cvt_nano.yaml"
ASCEND = {"ASCEND_RT_VISIBLE_DEVICES": "4,5", "MASTER_PORT": "18118"}


def plan(*argv, **environ):
    return read_plan([*argv, "--dry_run"], {**ASCEND, **environ}, "")[0]


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
    for words in (["--resume"], ["--resume", "--accept_changes"], ["--resume", "runs/a/x.ckpt"]):
        line = describe(plan(RECIPE, "-", "2", *words)).splitlines()[-1]
        assert " ".join(words) in line


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
        ([RECIPE, "-", "3"], {}, "DEVICE_NUM 3: 2 Ascend devices are visible"),
        ([RECIPE, "-", "0"], {}, "DEVICE_NUM 0"),
        ([RECIPE, "-", "two"], {}, "DEVICE_NUM two: must be a number"),
        (["config/none.yaml", "-"], {}, "CONFIG config/none.yaml: no such file"),
        ([RECIPE, "/no/data"], {}, "DATA /no/data: no such folder"),
        ([RECIPE], {}, "data"),
        ([RECIPE, "-", "2", "--optimizer.l", "1"], {}, "unknown key optimizer.l: did you mean"),
        ([RECIPE, "-"], {"DEVICE_TARGET": "TPU"}, "DEVICE_TARGET=TPU: choose one of"),
        ([RECIPE, "-"], {"NODE_NUM": "2", "NODE_RANK": "2"}, "NODE_RANK=2: hosts count from 0"),
        ([RECIPE, "-"], {"NODE_NUM": "2"}, "MASTER_ADDR"),
        ([RECIPE, "-"], {"MASTER_PORT": "80"}, "MASTER_PORT=80"),
        ([RECIPE, "-"], {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ([RECIPE, "-"], {"NODE_NUM": "x"}, "NODE_NUM=x: must be a whole number"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(argv, environ, message):
    with pytest.raises(UserError, match=message):
        plan(*argv, **environ)


def test_a_busy_port_is_refused():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        environ = {**ASCEND, "MASTER_PORT": str(other.getsockname()[1])}
        with pytest.raises(UserError, match="another job runs here"):
            read_plan([RECIPE, "-", "2"], environ, "")


def test_the_script_exits_with_2_and_one_line(tmp_path):
    script = ["bash", str(ROOT / "scripts/run_distribute_train.sh"), "no.yaml", "-"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "CONFIG no.yaml" in done.stderr
    assert not list(tmp_path.iterdir())


TABLE = {"10.0.0.1": ["192.1.0.1", "192.1.0.2"], "10.0.0.2": ["192.2.0.1", "192.2.0.2"]}


def test_a_written_table_is_read_and_planned(tmp_path):
    table = str(tmp_path / "table.json")
    write_rank_table(table, TABLE)
    environ = {"RANK_TABLE_FILE": table, "NODE_RANK": "1", "ASCEND_RT_VISIBLE_DEVICES": "0,1"}
    found = plan(RECIPE, "-", **environ)
    assert (found.world, list(found.ranks)) == (4, [2, 3])
    assert found.ranks[3] == {"RANK_ID": "3", "DEVICE_ID": "1"}
    assert found.environment == {"RANK_TABLE_FILE": table, "RANK_SIZE": "4"}
    assert "msrun" not in describe(found)
    for argv, more, message in (
        (["3"], {}, "gives this host 2 devices"),
        ([], {"DEVICE_TARGET": "CPU"}, "RANK_TABLE_FILE is for Ascend"),
        ([], {"NODE_RANK": "2"}, "has 2 servers"),
        ([], {"ASCEND_RT_VISIBLE_DEVICES": "0"}, "device 1 is not on this host"),
    ):
        with pytest.raises(UserError, match=message):
            plan(RECIPE, "-", *argv, **{**environ, **more})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.update(server_count="3"), "server_count 3"),
        (lambda t: t["server_list"][0]["device"][1].update(rank_id="0"), "rank_id must be 0 to 3"),
        (lambda t: t["server_list"][0]["device"][1].update(device_id="0"), "device_id twice"),
        (lambda t: t["server_list"][1]["device"][1].update(device_ip="192.1.0.1"), "stands twice"),
        (lambda t: t["server_list"][1].update(device=[]), "without devices"),
        (lambda t: t["server_list"][1].update(server_id="host"), "no IP address"),
        (lambda t: t.pop("server_list"), "no rank table"),
    ],
)
def test_a_table_that_makes_no_job_is_refused(tmp_path, damage, message):
    path = tmp_path / "table.json"
    write_rank_table(str(path), TABLE)
    table = json.loads(path.read_text())
    damage(table)
    path.write_text(json.dumps(table))
    with pytest.raises(UserError, match=message):
        read_rank_table(str(path))


def test_the_table_program_writes_and_checks(tmp_path):
    module = "src/launch/rank_table.py"
    words = [f"{host}={','.join(ips)}" for host, ips in TABLE.items()]
    done = run_command(module, "write", "t.json", *words, cwd=tmp_path, module=True)
    assert done.returncode == 0 and "10.0.0.2: ranks 2, 3" in done.stdout
    again = run_command(module, "write", "t.json", *words, cwd=tmp_path, module=True)
    assert again.returncode == 2 and "exists" in again.stderr
    check = run_command(module, "check", "t.json", cwd=tmp_path, module=True)
    assert check.stdout == done.stdout


def test_a_table_start_gives_each_rank_its_environment_and_ends_all_at_a_failure(tmp_path, capfd):
    """With a stand-in for train.py, as there is no Ascend: rank 1 fails, rank 0 would sleep."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\n"
        "print(os.environ['RANK_ID'], os.environ['RANK_SIZE'], os.environ['RANK_TABLE_FILE'])\n"
        "time.sleep(99) if os.environ['RANK_ID'] == '0' else sys.exit('train.py: error: no')\n"
    )
    job = Plan(
        "Ascend", 2, {0: {"RANK_ID": "0"}, 1: {"RANK_ID": "1"}}, 1, 0, "", 0, [str(script)],
        tmp_path / "logs", {"RANK_SIZE": "2", "RANK_TABLE_FILE": "t"}, rank_table="t",
    )  # fmt: skip
    assert run(job) == 1
    said = capfd.readouterr()
    assert "0 2 t" in said.out and "rank 1 (process" in said.err
    assert "rank 1: train.py: error: no" in said.err
