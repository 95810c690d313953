"""Engines on tiny graphs: from any thread, after a fork, and with arithmetic of their own."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import onnx
import pytest
from mindspore import nn, ops

from src.deploy import engines
from src.deploy.engines import Session, mindspore_session, open_model
from src.errors import UserError
from src.forks import KERNEL_THREADS, thread_names
from tests.conftest import ROOT
from tests.deploy.tiny_files import Tiny, onnx_model

ENGINES = ("mindspore", "onnxruntime", "openvino")


def open_with(files, engine, **options) -> Session:
    if engine != "mindspore":
        pytest.importorskip(engine)
    return open_model(files[engine], engine, **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_an_engine_computes_the_product(files, images, weight, engine, threads):
    session = open_with(files, engine, threads=threads)
    assert session.engine == engine
    found = session(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.reshape(3, -1) @ weight, rtol=1e-4, atol=1e-4)


def test_mindspore_threads_are_limited_during_a_call(files, images):
    """Fails if a MindSpore version renames its threads, which are found by name."""
    cores = os.sched_getaffinity(0)
    session = open_with(files, "mindspore")
    session(images)

    def affinity():
        computing = [t for t, name in thread_names().items() if name.startswith(KERNEL_THREADS)]
        assert computing
        own = threading.get_native_id()
        return {frozenset(os.sched_getaffinity(task)) for task in (own, *computing)}

    assert engines._limit_cores(lambda _: affinity(), 1)(images) == {frozenset([min(cores)])}
    assert affinity() == {frozenset(cores)}


class Heavy(nn.Cell):
    """Enough products to keep every thread of MindSpore busy."""

    def construct(self, images):
        rows = ops.tile(ops.reshape(images, (1, -1)), (512, 1))
        for _ in range(20):
            rows = ops.tanh(ops.matmul(rows, ops.transpose(rows, (1, 0)))[:, :432] * 1e-3)
        return rows[:1]


@pytest.mark.parametrize("kind", ["network", "mindir"])
def test_one_thread_takes_one_core(tmp_path, kind):
    images = np.random.default_rng(0).standard_normal((1, 3, 12, 12)).astype(np.float32)
    if kind == "network":
        session = mindspore_session(Heavy().set_train(False), 1)
    else:
        ms.export(
            Heavy(), ms.Tensor(images), file_name=str(tmp_path / "heavy"), file_format="MINDIR"
        )
        session = open_model(tmp_path / "heavy.mindir", "mindspore", threads=1)
    session(images)
    processor, wall = time.process_time(), time.perf_counter()
    while time.perf_counter() - wall < 2:
        session(images)
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    assert processor < 1.15 * wall


@pytest.mark.parametrize("engine", ENGINES)
def test_four_threads_get_what_one_gets(files, images, engine):
    check_threads(open_with(files, engine), images)


def test_four_threads_on_a_network(images):
    check_threads(mindspore_session(Tiny().set_train(False)), images)


def check_threads(session, images):
    expected = {size: session(images[:size]) for size in (1, 3)}
    wrong = []

    def work(size):
        try:
            for _ in range(50):
                if not np.array_equal(session(images[:size]), expected[size]):
                    wrong.append(size)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(size,)) for size in (1, 3, 1, 3)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert not wrong


def in_a_fork(action) -> str:
    """What an action in a forked process returns; it has 20 seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = action()
        except UserError as error:
            said = f"UserError: {error}"
        except BaseException as error:
            said = repr(error)
        os.write(writer, str(said).encode())
        os._exit(0)
    limit = threading.Timer(20, os.kill, (child, 9))
    limit.start()
    os.waitpid(child, 0)
    limit.cancel()
    os.close(writer)
    with os.fdopen(reader) as said:
        return said.read()


@pytest.mark.parametrize("engine", ENGINES)
def test_after_a_fork_one_line_says_what_to_do(files, images, engine):
    session = open_with(files, engine)
    session(images)
    said = in_a_fork(lambda: session(images))
    assert said.startswith("UserError: the model was opened in process") and "spawn" in said
    session(images)  # the parent's still works


def test_mindspore_is_not_used_in_a_fork_of_a_process_that_used_it(files, images):
    """It would hang, also if the first process did not use it through this package."""
    ms.ops.assign(ms.Parameter(ms.Tensor(0.0)), ms.Tensor(1.0)).asnumpy()
    said = in_a_fork(lambda: open_model(files["mindspore"])(images))
    assert said.startswith("UserError: MindSpore ran in process") and "spawn" in said


def test_a_network_is_compiled_and_the_mode_of_the_process_stays(images, monkeypatch):
    """In PyNative mode, MindSpore's default, `construct` would run at each call."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    compiled = mindspore_session(Tiny().set_train(False))
    plain = mindspore_session(Tiny().set_train(False), compiled=False)
    np.testing.assert_allclose(plain(images), compiled(images), atol=1e-4)
    assert ms.get_context("mode") == ms.PYNATIVE_MODE

    def construct(self, x):
        raise NotImplementedError

    monkeypatch.setattr(nn.Dense, "construct", construct)
    compiled(images)
    with pytest.raises(NotImplementedError):
        plain(images)


def test_float16_arithmetic(tmp_path, images, weight):
    """The file takes float16; the caller need not know."""
    onnx.save(onnx_model(weight.astype(np.float16)), str(tmp_path / "h.onnx"))
    for engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
        found = open_model(tmp_path / "h.onnx", engine)(images)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, images.reshape(3, -1) @ weight, rtol=2e-2, atol=0.1)


def test_the_engine_is_chosen(files, monkeypatch):
    monkeypatch.setattr(engines, "import_optional", lambda name: None)
    with pytest.raises(UserError, match="pip install openvino, or pip install onnxruntime"):
        open_model(files["onnxruntime"])
    monkeypatch.undo()
    for name in ("openvino", "onnxruntime"):
        pytest.importorskip(name)
    assert open_model(files["openvino"]).engine == "openvino"
    real = engines.import_optional
    monkeypatch.setattr(engines, "import_optional", lambda n: None if n == "openvino" else real(n))
    assert open_model(files["openvino"]).engine == "onnxruntime"
    with pytest.raises(UserError, match="OpenVINO is not installed"):
        open_model(files["openvino"], "openvino")
    with pytest.raises(UserError, match="engine mindspore: .onnx is run by openvino or onnxr"):
        open_model(files["openvino"], "mindspore")
    with pytest.raises(UserError, match="engine openvino: .mindir is run by mindspore"):
        open_model(files["mindspore"], "openvino")
    with pytest.raises(UserError, match="engine tvm: must be one of auto"):
        open_model(files["mindspore"], "tvm")


@pytest.mark.parametrize(
    ("cores", "limit", "asked", "expected"),
    [(64, 4, None, 4), (64, 4, 8, 8), (4, 4, None, None)],
)
def test_a_containers_limit_holds_for_engines(files, monkeypatch, cores, limit, asked, expected):
    monkeypatch.setattr(engines, "usable_cores", lambda: list(range(cores)))
    monkeypatch.setattr(engines, "cpu_count", lambda: limit)
    monkeypatch.setitem(engines._OPENERS, "onnxruntime", lambda path, threads: threads)
    assert open_model(files["onnxruntime"], "onnxruntime", asked) == expected


def test_openvino_does_not_report_its_use(tmp_path):
    """In a process that has not imported it; its telemetry remains for whoever imports it."""
    pytest.importorskip("openvino_telemetry")
    script = (
        "import sys; from src.deploy import engines\n"
        "engines.import_optional('openvino').Core()\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "print(telemetry_utils.tm.__name__, engines.TELEMETRY in sys.modules)\n"
        "import openvino_telemetry"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["openvino.tools.ovc.telemetry_stub", "False"], done.stderr
    assert done.returncode == 0, done.stderr


def test_onnxruntime_does_not_report_its_use(tmp_path):
    """In a process that has not imported it. The file is its telemetry's session."""
    pytest.importorskip("onnxruntime")
    script = "from src.deploy import engines; assert engines.import_optional('onnxruntime')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    assert not (tmp_path / ".ses").exists()


@pytest.mark.parametrize("engine", ["mindspore", "onnxruntime"])
def test_names_that_an_engine_does_not_open(files, tmp_path, engine):
    if engine == "onnxruntime":
        pytest.importorskip(engine)
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/l\xe9"))
    folder.mkdir()
    file = Path(shutil.copy(files[engine], folder))
    with pytest.raises(UserError, match="opens only in UTF-8; rename"):
        open_model(file, engine)


def test_onnxruntime_computes_on_the_cpu_whatever_else_it_offers(files, monkeypatch):
    """A GPU's provider rounds products to TF32."""
    runtime = pytest.importorskip("onnxruntime")
    real, asked = runtime.InferenceSession, []

    def session(*arguments, **options):
        asked.append(options["providers"])
        return real(*arguments, **options)

    monkeypatch.setattr(runtime, "InferenceSession", session)
    monkeypatch.setattr(
        runtime, "get_available_providers", lambda: ["CUDAExecutionProvider"] + asked
    )
    open_model(files["onnxruntime"], "onnxruntime")
    assert asked == [["CPUExecutionProvider"]]


@pytest.mark.parametrize("engine", ENGINES)
def test_images_that_a_file_does_not_take(files, engine):
    """As from a .json of another file: the engine's own words in one line."""
    session = open_with(files, engine)
    with pytest.raises(UserError, match=f"t.(onnx|mindir): {engine} can't run it on images"):
        session(np.zeros((1, 3, 9, 9), np.float32))


def test_the_output_of_an_earlier_call_is_refused():
    session = Session(lambda images: np.zeros((1, 7), np.float32), "openvino", "t.onnx")
    assert session(np.zeros((1, 3, 4, 4), np.float32)).shape == (1, 7)
    with pytest.raises(UserError, match=r"t.onnx: openvino returned \[1, 7\] for images \[5, 3,"):
        session(np.zeros((5, 3, 4, 4), np.float32))


def test_the_reason_of_an_engine_is_told(tmp_path, weight):
    model = onnx_model(weight)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, str(tmp_path / "t.onnx"))
    for engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
        with pytest.raises(UserError, match="t.onnx: .* rejects it: .*NoSuchOperator"):
            open_model(tmp_path / "t.onnx", engine)


def test_openvino_is_refused_where_it_would_crash(tmp_path):
    """It frees memory by glibc, whichever allocator is preloaded."""
    pytest.importorskip("openvino")
    jemalloc = Path(ms.__file__).parent / "lib/libjemalloc.so.2"
    if not jemalloc.exists():
        pytest.skip("this MindSpore has no jemalloc")
    onnx.save(onnx_model(np.eye(3, dtype=np.float32)), tmp_path / "m.onnx")
    script = "import sys; from src.deploy.engines import open_model; open_model(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "m.onnx")],
        cwd=ROOT, env={**os.environ, "LD_PRELOAD": str(jemalloc)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "m.onnx: OpenVINO crashes with another allocator than the C library's" in done.stderr
