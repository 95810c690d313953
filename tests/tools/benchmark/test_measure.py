"""The measuring modes of tools.benchmark, with a stand-in for a peer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from src.deploy.writers import write_model
from src.errors import UserError
from src.models import create_model
from tests.conftest import ROOT
from tools.benchmark import measure
from tools.benchmark.__main__ import main
from tools.benchmark.measure import alternate, start_all
from tools.benchmark.process import BenchmarkProcess, select_cores
from tools.benchmark.table import summarise, warn_of_idle_work
from tools.benchmark.workload import Plan, cvt_sizes, plan_files

STAND_IN = str(Path(__file__).with_name("stand_in.py"))
TINY = [
    "--model.name=cvt_nano",
    "--model.embed_dims=[8,16,32]",
    "--model.depths=[1,1,1]",
    "--model.image_size=16",
    "--model.num_classes=10",
    "--batch_size=4",
    "--rounds=2",
]
CORES = select_cores(None)
PEER = [f"--peer={STAND_IN}", f"--peer_python={sys.executable}"]


@pytest.fixture(autouse=True)
def synchronous_processes(monkeypatch):
    """As `synchronous` in conftest.py, for the processes that are started here."""
    monkeypatch.setenv("MS_DEV_LAUNCH_BLOCKING", "1")


@pytest.fixture
def log(tmp_path, monkeypatch) -> Path:
    """The file that stand-ins write into."""
    file = tmp_path / "log"
    monkeypatch.setenv("STAND_IN_LOG", str(file))
    return file


def plan(name: str, **job) -> Plan:
    return Plan(name, [sys.executable, STAND_IN], {"peer": name, **job}, "look at it")


def call(monkeypatch, mode, *words):
    """Run the executable in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["tools.benchmark", f"--mode={mode}", *TINY, *words])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_sides_take_turns_and_change_their_order(log):
    with BenchmarkProcess(plan("a"), CORES) as a, BenchmarkProcess(plan("b"), CORES) as b:
        started = start_all([a, b])
        rounds = alternate([a, b], 3, 0.1)
    assert log.read_text().split("\n")[:-1] == ["a 1", "b 1", "b 2", "a 2", "a 3", "b 3"]
    assert [answer["images"] for answer in rounds["a"]] == [4, 8, 16]
    assert started["b"]["what"] == "a stand-in"


def test_a_side_runs_on_the_cores_it_is_given_and_in_the_users_environment(log, monkeypatch):
    """Variables that a user does not set hid that import mindspore sets OMP_NUM_THREADS to 1."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = sorted(os.sched_getaffinity(0))
    with BenchmarkProcess(plan("a"), cores[-1:]) as side:
        side.start()  # before that the kernel may still show no environment
        assert os.sched_getaffinity(side._process.pid) == {cores[-1]}
        environment = Path(f"/proc/{side._process.pid}/environ").read_text()
        assert not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & {
            entry.partition("=")[0] for entry in environment.split("\0")
        }
        process = side._process
    assert sorted(os.sched_getaffinity(0)) == cores
    assert process.poll() is not None


def test_ratios_and_operations_are_worked_out_round_by_round():
    def answers(*seconds):
        return [
            {"images": 10, "seconds": s, "cpu_seconds": 2 * s, "peak_memory": 7} for s in seconds
        ]

    start = {"what": "w", "first_call_seconds": 1.0, "prepare_seconds": 2.0}
    rounds = {
        "ours": answers(1.0, 5.0, 2.0),  # 10, 2, 5 img/s
        "peer": answers(2.0, 2.0, 10.0),  # 5, 5, 1 img/s: ratios 2, 0.4, 5
        "matmul": answers(1.0, 1.0, 1.0),  # 10 products a second
    }
    macs = 2048**3
    ours, peer, best = summarise(dict.fromkeys(rounds, start), rounds, "train", macs, "ours")
    assert ours["images_per_second"] == peer["images_per_second"] == 5
    assert [ours["ratio"], peer["ratio"]] == [1, 2]
    assert peer["rounds"] == [5, 5, 1]
    assert ours["images_per_core_second"] == 2.5
    assert ours["gflops"] == pytest.approx(3 * 2 * 5 * macs / 1e9)
    assert ours["fraction_of_peak"] == pytest.approx(3 * 5 / 10)
    assert best["fraction_of_peak"] == 1
    assert "ratio" not in best
    ours, peer, _ = summarise(dict.fromkeys(rounds, start), rounds, "train", macs, "peer")
    assert [ours["ratio"], peer["ratio"]] == [0.5, 1]
    (alone,) = summarise({"ours": start}, {"ours": rounds["ours"]}, "data", None, "ours")
    assert "gflops" not in alone and "peak_memory" not in alone


def test_a_round_too_short_for_the_clock_is_no_fault():
    """The system tells processor time in ticks, so a short round may have taken none."""
    start = {"what": "x", "first_call_seconds": 1.0, "prepare_seconds": 1.0}
    answer = {"images": 4, "seconds": 0.1, "cpu_seconds": 0.0}
    (side,) = summarise({"ours": start}, {"ours": [answer]}, "data", None, "ours")
    assert side["images_per_core_second"] == pytest.approx(4 / 0.01)


def test_a_side_that_works_out_of_turn_is_told(caplog):
    quiet = [{"seconds": 1.0, "idle_cpu_seconds": 0.0}] * 3
    busy = [{"seconds": 1.0, "idle_cpu_seconds": 0.2}] * 3
    with caplog.at_level("WARNING", "cvt"):
        warn_of_idle_work({"a": quiet, "b": quiet})
        assert not caplog.messages
        warn_of_idle_work({"a": quiet, "b": busy})
    (message,) = caplog.messages
    assert message.startswith("b kept 0.20 cores busy")


def test_peers_run_on_the_cpu(log):
    ours = plan("ours", device="Ascend")._replace(remedy=None)
    refused = pytest.raises(UserError, match="ours on Ascend")
    with BenchmarkProcess(ours, CORES) as side, BenchmarkProcess(plan("a"), CORES) as peer, refused:
        start_all([side, peer])


@pytest.mark.parametrize(
    "fault, complaint",
    [
        ("dies", "no module named torch here"),
        ("raises", "ValueError: broken in two lines"),
        ("babbles", "answered 'babble'"),
    ],
)
def test_a_peer_that_fails_is_one_line(monkeypatch, log, fault, complaint):
    monkeypatch.setenv("STAND_IN", fault)
    with BenchmarkProcess(plan("a"), CORES) as side, pytest.raises(UserError) as caught:
        side.start()
    assert str(caught.value).startswith(f"--peer a: {complaint}")
    assert str(caught.value).endswith("; look at it") and "\n" not in str(caught.value)


def test_a_failure_of_ours_keeps_its_traceback(log, monkeypatch):
    monkeypatch.setenv("STAND_IN", "raises")
    ours = plan("ours")._replace(remedy=None)
    with BenchmarkProcess(ours, CORES) as side, pytest.raises(RuntimeError, match="Traceback"):
        side.start()


def test_inference_beside_an_exported_file_and_a_peer(monkeypatch, log, tmp_path, capsys):
    sizes = {"embed_dims": (8, 16, 32), "depths": (1, 1, 1), "num_classes": 10}
    net = create_model("cvt_nano", **sizes).set_train(False)
    write_model(net, (4, 3, 16, 16), tmp_path / "tiny.mindir", "mindir")
    file = tmp_path / "result.json"
    words = ["--seconds=0.1", *PEER, f"--json={file}", f"--model_file={tmp_path}/tiny.mindir"]
    words += ["--predictor"]
    assert call(monkeypatch, "infer", *words) == 0
    result = json.loads(file.read_text())
    ours, exported, predictor, peer, matmul = result["sides"]
    names = [side["name"] for side in result["sides"]]
    assert names == ["ours", "tiny.mindir", "predictor", "stand_in", "matmul"]
    assert exported["what"].startswith("tiny.mindir in mindspore, written by MindSpore")
    assert predictor["what"].startswith("Predictor, MindSpore")
    assert min(*exported["rounds"], *predictor["rounds"]) > 0
    assert peer["rounds"] == [2, 4] and peer["images_per_second"] == 3
    assert peer["peak_memory"] == 5_000_002
    ratios = np.divide(ours["rounds"], peer["rounds"])
    assert peer["ratio"] == pytest.approx(np.median(ratios))
    monkeypatch.setattr(sys, "argv", ["tools.benchmark", "--mode=complexity", *TINY[:5]])
    counted = tmp_path / "counted.json"
    sys.argv.append(f"--json={counted}")
    main()
    macs = json.loads(counted.read_text())["total"]["total_macs"]
    assert ours["gflops"] == pytest.approx(2e-9 * macs * ours["images_per_second"])
    assert ours["fraction_of_peak"] == pytest.approx(ours["gflops"] / matmul["gflops"])
    assert 1e8 < ours["peak_memory"] < 4e9
    assert "MindSpore" in ours["what"]
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("infer: cvt_nano, float32, image 16 x 16, batch 4, cores for each")
    assert [row.split()[0] for row in rows[:5]] == names
    assert f"{peer['ratio']:.2f} x" in rows[3]


def test_an_interpreter_without_a_peer_is_refused(monkeypatch, capsys):
    assert call(monkeypatch, "infer", PEER[1]) == 2
    assert "--peer_python has no effect without --peer" in capsys.readouterr().err


def test_two_sides_of_one_name_are_refused(monkeypatch, capsys):
    assert call(monkeypatch, "infer", "--peer", *2 * [str(STAND_IN)], PEER[1]) == 2
    assert "another side is called stand_in" in capsys.readouterr().err


def test_another_network_is_no_peer(monkeypatch, log, capsys):
    monkeypatch.setenv("STAND_IN", "another network")
    assert call(monkeypatch, "infer", "--runtime.mode=pynative", *PEER) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "stand_in has 7 parameters, ours " in line


def test_the_whole_step_is_trained(monkeypatch, tmp_path, built):
    file = tmp_path / "result.json"
    words = ["--seconds=0.1", "--optimizer.clip_norm=1", "--training.ema_decay=0.9"]
    words += ["--augment.mixup=0.8", "--training.accumulate=2", "--runtime.mode=pynative"]
    words += ["--training.epoch_steps=1000"]  # which a schedule of all steps would take GB for
    assert call(monkeypatch, "train", *words, "--plain", f"--json={file}") == 0
    ours, plain, matmul = json.loads(file.read_text())["sides"]
    for side in (ours, plain):
        assert len(side["rounds"]) == 2 and side["images_per_second"] > 0
        assert ("compiled operators" in side["what"]) == (side is ours)
        assert side["peak_memory"] < 2e9


def test_the_pipeline_is_measured_on_as_many_images_as_asked_for(monkeypatch, tmp_path):
    file = tmp_path / "result.json"
    words = ["--data.source=digits", "--images=50", "--seconds=0.01", f"--json={file}"]
    assert call(monkeypatch, "data", *words) == 0
    (ours,) = json.loads(file.read_text())["sides"]
    assert ours["images_per_second"] > 0 and "gflops" not in ours


def test_first_calls_come_from_fresh_processes(monkeypatch, log, tmp_path, capsys):
    file = tmp_path / "result.json"
    words = ["--rounds=1", "--runtime.mode=pynative", *PEER, f"--json={file}"]
    assert call(monkeypatch, "compile", *words) == 0
    sides = json.loads(file.read_text())["sides"]
    assert [(side["name"], side["task"]) for side in sides] == [
        ("ours", "infer"), ("stand_in", "infer"), ("ours", "train"), ("stand_in", "train"),
    ]  # fmt: skip
    assert sides[1]["first_calls"] == [0.25]
    assert not log.exists(), "a stand-in was told to run a round"


@pytest.mark.parametrize(
    "mode, words, complaint",
    [
        ("infer", ["--peer=hf"], "needs --peer_python; give"),
        ("infer", ["--peer=hf", "--peer_python=nowhere"], "--peer_python nowhere not found"),
        (
            "infer",
            ["--peer=timm", f"--peer_python={sys.executable}"],
            "supports --mode data",
        ),
        ("infer", ["--peer=tim", f"--peer_python={sys.executable}"], "choose from hf, hf_comp"),
        (
            "infer",
            ["--peer=hf", f"--peer_python={sys.executable}"],
            "at least 1, 2 and 3",
        ),
        ("train", ["--training.ema_decay=0.9", *PEER], "recipe's training.ema_decay"),
        ("data", ["--data.source=digits", *PEER], "recipe's data.source"),
        ("train", ["--images=3"], "--images: has no effect in mode train"),
        ("train", ["--training.batch_size=8"], "--training.batch_size: is --batch_size here"),
        ("infer", ["--engine=openvino"], "--engine: runs exported files; give --model_file"),
        ("infer", ["--threads=4096"], "--threads 4096"),
        ("infer", ["--model_file=nowhere.mindir"], "--model_file nowhere.mindir"),
        ("infer", ["--reference=theirs"], "--reference theirs: no such side; choose from ours"),
        ("data", [], "needs a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_users_error_is_one_line(monkeypatch, log, capsys, mode, words, complaint):
    assert call(monkeypatch, mode, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


@pytest.mark.parametrize(
    ("mode", "words", "expected"),
    [
        ("infer", [], "float32"),
        ("infer", ["--runtime.precision=float16"], "float16"),
        ("train", [], "float16"),
    ],
)
def test_inference_has_the_precision_of_eval(monkeypatch, tmp_path, mode, words, expected):
    """Float16 of an accelerator's recipe is slow on a CPU."""
    found = []
    monkeypatch.setattr(measure, "measure", lambda config, options: found.append(config))
    (tmp_path / "recipe.yaml").write_text("runtime: {precision: float16, device: CPU}\n")
    words = [f"--config={tmp_path / 'recipe.yaml'}", f"--mode={mode}", *words]
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    main()
    assert found[0].runtime.precision == expected


def test_each_file_runs_in_each_engine_that_takes_it(tmp_path):
    for name in ("a.onnx", "b.mindir"):
        (tmp_path / name).touch()
    files = [str(tmp_path / name) for name in ("a.onnx", "b.mindir")]
    plans = plan_files(files, ["openvino", "onnxruntime", "mindspore"], {})
    assert [each.name for each in plans] == [
        "a.onnx:openvino", "a.onnx:onnxruntime", "b.mindir:mindspore",
    ]  # fmt: skip
    assert [each.name for each in plan_files(files, [], {})] == ["a.onnx", "b.mindir"]
    with pytest.raises(UserError, match=r"b.mindir: cannot run in openvino"):
        plan_files(files, ["openvino"], {})
    with pytest.raises(UserError, match="another file has this name"):
        plan_files([files[0], files[0]], [], {})


def test_the_sizes_of_a_variant_are_read_off_the_network():
    sizes = cvt_sizes(create_model("cvt_nano", depths=(1, 2, 3), drop_path_rate=(0, 0, 0.1)))
    assert sizes["embed_dims"] == [32, 64, 128] and sizes["depths"] == [1, 2, 3]
    assert sizes["num_heads"] == [1, 2, 4] and sizes["mlp_ratios"] == [2, 2, 2]
    assert sizes["patch_sizes"] == (5, 3, 3) and sizes["kv_strides"] == [2, 2, 2]
    assert sizes["cls_tokens"] == [False, False, True]
    assert sizes["drop_path_rates"] == [0, 0, 0.1]
    with pytest.raises(UserError, match="for the cvt models only"):
        cvt_sizes(create_model("resnet_nano"))


def test_the_protocol_needs_no_package_and_keeps_what_libraries_print_apart():
    script = (
        "import sys\n"
        "from tools.benchmark.protocol import Work, serve\n"
        "def make(job):\n"
        "    print('a library prints')\n"
        "    import os; os.system('echo so does another')\n"
        "    return Work(lambda: 3, 'w', {'loaded': [m for m in sys.modules if m in job['no']]})\n"
        "serve(make)\n"
    )
    orders = [{"mode": "infer", "no": ["mindspore", "numpy", "yaml"]}, {"seconds": 0}]
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="".join(json.dumps(order) + "\n" for order in orders),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    started, answer = (json.loads(line) for line in done.stdout.splitlines())
    assert done.returncode == 0 and started["loaded"] == []
    assert answer["images"] == 3 and answer["peak_memory"] < 2e8
    assert "a library prints" in done.stderr and "so does another" in done.stderr
