"""Real jobs of two ranks on this host's CPU, through the users' script."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image

import eval as evaluation
from src.launch.job import RANK_ENDS
from tests.conftest import ROOT, graph_cache
from tests.launch.runs import ENDLESS, TWO_RANKS, losses

TRAIN = ["bash", str(ROOT / "scripts/run_distribute_train.sh"), "config/digits/cvt_nano.yaml", "-"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else True,
        reason="two CPU ranks need two cores",
    ),
]


def environment(free_port, **more):
    return {**os.environ, "DEVICE_TARGET": "CPU", "MASTER_PORT": str(free_port), **more}


def test_two_ranks_equal_one_with_the_double_batch(one_process, tmp_path, free_port, graph_folder):
    """Twenty steps with drop path and clipping.

    BatchNorm's statistics, local to a rank by default, are shared (training.sync_batchnorm).
    """
    two = subprocess.run(
        [*TRAIN, "2", "--output", "two", *TWO_RANKS],
        cwd=tmp_path, env=environment(free_port, **graph_cache(graph_folder, *TWO_RANKS)),
        capture_output=True, text=True,
    )  # fmt: skip
    assert two.returncode == 0, two.stdout + two.stderr
    assert len(losses(one_process)) == 20
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one_process), rtol=1e-5)
    figures = [
        json.loads((run / "metrics.jsonl").read_text()) for run in (one_process, tmp_path / "two")
    ]
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-4)
    (logs,) = (tmp_path / "two" / "ranks").iterdir()
    assert sorted(p.name for p in logs.iterdir()) == [
        "msrun.log", "scheduler.log", "worker_0.log", "worker_1.log"
    ]  # fmt: skip
    log = (logs / "worker_1.log").read_text()
    assert "rank 1 of 2" in log and RANK_ENDS.search(log)[1] == "0"
    assert "epoch 1/1" in two.stdout, "the first rank's words reach the console"


@contextlib.contextmanager
def endless(tmp_path, free_port, graphs, *words):
    """A job of two ranks within its steps, and the file of what it prints."""
    environ = environment(free_port, **graph_cache(graphs, *ENDLESS))
    said = tmp_path / "out"
    with open(said, "w") as out:
        job = subprocess.Popen(
            [*TRAIN, "2", "--output", "run", *ENDLESS, *words],
            cwd=tmp_path, env=environ, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        deadline = time.time() + 120
        state = tmp_path / "run/checkpoints/last.ckpt"
        while time.time() < deadline and not (
            re.search(r"epoch \d+/", said.read_text()) and state.exists()
        ):
            assert job.poll() is None, said.read_text()
            time.sleep(0.2)
        yield job, said
    finally:
        job.kill()


def test_a_killed_launcher_takes_its_ranks_along_and_a_killed_rank_ends_the_resumed_job(
    tmp_path, free_port, graph_folder
):
    """SIGKILL, after which nothing can clean up; the port and the run's folder must be free.

    The resumed job ends in time, with the reason, and with nothing left running; the killed rank's
    sibling is waiting for it.
    """
    with endless(tmp_path, free_port, graph_folder) as (job, said):
        processes = psutil.Process(job.pid).children(recursive=True)
        job.kill()
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive
    with endless(tmp_path, free_port, graph_folder, "--resume") as (job, said):
        assert "resumed at epoch" in said.read_text()
        processes = psutil.Process(job.pid).children(recursive=True)
        workers = [p for p in processes if "train.py" in str(p.cmdline())]
        ranks = {p.environ().get("MS_NODE_ID"): p for p in workers}
        ranks["1"].kill()
        start = time.time()
        code = job.wait(timeout=60)
        assert code == 128 + 9 and time.time() - start < 60
        assert f"rank 1 (process {ranks['1'].pid}) ended by SIGKILL" in said.read_text()
        assert "worker_1.log" in said.read_text()
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not alive


def test_a_stopped_job_saves_at_one_step_and_ends_with_143(tmp_path, free_port, graph_folder):
    """SIGTERM to every process: every rank stops at one step, saved before the first ends."""
    with endless(tmp_path, free_port, graph_folder) as (job, said):
        for process in (*psutil.Process(job.pid).children(recursive=True), job):
            process.terminate()
        assert job.wait(timeout=60) == 128 + 15
        assert "stopped by request; continue with --resume" in said.read_text()
    (logs,) = (tmp_path / "run" / "ranks").iterdir()
    stops = []
    for rank in (0, 1):
        lines = (logs / f"worker_{rank}.log").read_text().splitlines()
        stops.append([line for line in lines if "saved at" in line])
    assert len(stops[0]) == 1 and stops[0] == stops[1]
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))
    epoch, step = map(int, re.findall(r"epoch (\d+), step (\d+)", stops[0][0])[0])
    assert int(newest.stem.partition("-")[2]) == 2 * (epoch - 1) + step, "two steps an epoch"


def test_a_users_error_in_the_ranks_is_told_once_and_quickly(hostile_folder, free_port):
    """Here a batch larger than the data; the scheduler alone would wait ten minutes.

    Neither msrun nor a rank imports from the folder that the job is started in, and msrun gives no
    path to a shell.
    """
    tmp_path = hostile_folder
    start = time.time()
    done = subprocess.run(
        [*TRAIN, "2", "--output", "run$(touch ran-shell)", "--data.train_images=30"],
        cwd=tmp_path, env=environment(free_port), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and time.time() - start < 60
    assert "train.py: error: digits (train): fewer images (30) than a step takes" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("run*/config.yaml"))
    assert not list(hostile_folder.glob("ran-*"))


def test_evaluation_counts_every_image_once_on_two_ranks(trained, tmp_path, free_port, monkeypatch):
    """897 images in batches of 64: the second rank has one batch fewer."""
    rng = np.random.default_rng(0)
    for number in range(897):
        folder = tmp_path / "data" / "val" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
    found = []
    for world in (1, 2):
        words = [
            str(ROOT / "eval.py"), f"--ckpt={trained / 'checkpoints/best.ckpt'}",
            "--data.source=imagefolder", f"--data.path={tmp_path / 'data'}",
            "--data.workers=1", "--evaluation.batch_size=64", f"--json={tmp_path}/{world}.json",
            f"--report={tmp_path}/report{world}",
        ]  # fmt: skip
        if world == 1:
            monkeypatch.setattr(sys, "argv", words)
            evaluation.main()
        else:
            start = [sys.executable, "-m", "mindspore.parallel.cluster.run", "--join=True",
                     f"--worker_num={world}", f"--local_worker_num={world}",
                     f"--master_port={free_port}", f"--log_dir={tmp_path}/logs"]  # fmt: skip
            path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
            variables = {**os.environ, "PATH": path}
            done = subprocess.run(
                start + words, cwd=tmp_path, env=variables, capture_output=True, text=True
            )
            # Not the exit code: MindSpore's clean-up at exit crashes now and then.
            for log in [tmp_path / f"logs/worker_{rank}.log" for rank in range(world)]:
                assert RANK_ENDS.search(log.read_text())[1] == "0", done.stdout + done.stderr
        found.append(json.loads((tmp_path / f"{world}.json").read_text()))
    for figures in found:
        assert figures["images"] == 897
        assert (figures["top1"], figures["top5"]) == (found[0]["top1"], found[0]["top5"])
        assert figures["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)
        assert figures["ece"] == pytest.approx(found[0]["ece"], rel=1e-4)
    for name in ("per_class.csv", "confusion_matrix.csv"):
        texts = {(tmp_path / f"report{world}" / name).read_text() for world in (1, 2)}
        assert len(texts) == 1
