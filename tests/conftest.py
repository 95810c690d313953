"""What every test needs: the environment that the executables set, and small shared models."""

import contextlib
import fcntl
import gc
import hashlib
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from src.config import Config, DataConfig, ModelConfig
from src.device import prepare_environment

prepare_environment()  # before any test imports MindSpore
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup`, runs would ignore it

# The longest first, so that no worker ends with one while the others are idle.
LONG_FILES = (
    "tests/launch/test_job.py",
    "tests/ascend",
    "tests/faults",  # early: xdist binds a further file to the worker of a file with one test
    "tests/tools/check_device/test_checks.py",
    "tests/deploy/test_export.py",
    "tests/training/test_train_step.py",
    "tests/models/test_cvt.py",
    "tests/launch/test_two_hosts.py",
    "tests/tools/benchmark",
    "tests/training/test_state.py",
    "tests/training/test_run.py",
    "tests/end_to_end/test_study.py",
    "tests/end_to_end/test_commands.py",
    "tests/models/test_compiled.py",
    "tests/deploy/test_predictor.py",
    "tests/deploy/test_onnx_writer.py",
    "tests/weights/test_load.py",
    "tests/launch/test_job_end.py",
    "tests/test_arithmetic.py",
    "tests/tools/records/test_writer.py",
)
# Left out by run_tests.sh --quick: jobs, campaigns, programs, and compiled graphs; beginnings of
# test ids. What needs the whole run `trained` is left out, too.
SLOW_TESTS = (
    "tests/ascend",
    "tests/data/test_image_limits.py::test_a_small_file",
    "tests/data/test_images.py::test_damaged_jpegs",
    "tests/deploy/test_class_names.py::test_a_thousand",
    "tests/deploy/test_class_names.py::test_folders",
    "tests/deploy/test_convert.py",
    "tests/deploy/test_engines.py::test_one_thread",
    "tests/deploy/test_export.py",
    "tests/deploy/test_mindspore_lite.py",
    "tests/deploy/test_onnx_writer.py::test_float16",
    "tests/deploy/test_predictor.py",
    "tests/deploy/test_quantize.py",
    "tests/end_to_end/test_commands.py",
    "tests/end_to_end/test_from_records.py",
    "tests/end_to_end/test_study.py",
    "tests/evaluation/test_evaluator.py",
    "tests/evaluation/test_report.py::test_eval",
    "tests/examples/test_demo.py",
    "tests/examples/test_segmentation.py",
    "tests/examples/test_serve.py",
    "tests/faults",
    "tests/kernels/test_functions.py::test_sums",
    "tests/kernels/test_threads.py::test_the_default",
    "tests/launch/test_job.py",
    "tests/launch/test_plan.py::test_the_",
    "tests/launch/test_two_hosts.py",
    "tests/models/test_compiled.py::test_training_equals",
    "tests/models/test_cvt.py::test_options",
    "tests/models/test_cvt.py::test_pyramid",
    "tests/models/test_cvt.py::test_stage_outputs",
    "tests/models/test_depthwise.py::test_a_compiled_stage",
    "tests/models/test_stochastic.py::test_the_key",
    "tests/test_arithmetic.py::test_both_levels",
    "tests/test_cli.py::test_a_key_of_a_saved",
    "tests/test_docs.py::test_the_",
    "tests/test_scripts.py::test_the_quickstart",
    "tests/tools/benchmark/test_counts.py",
    "tests/tools/benchmark/test_estimate.py::test_activations",
    "tests/tools/benchmark/test_measure.py",
    "tests/tools/check_device/test_checks.py",
    "tests/tools/records/test_writer.py::test_killed",
    "tests/tools/records/test_writer.py::test_the_command",
    "tests/tools/study/test_study.py",
    "tests/training/test_branches.py",
    "tests/training/test_optimizer.py::test_updates",
    "tests/training/test_preprocess.py",
    "tests/training/test_run.py",
    "tests/training/test_state.py",
    "tests/training/test_train_step.py",
    "tests/weights/test_load.py::test_files_of_real",
    "tests/weights/test_pretrained.py",
)
ROOT = Path(__file__).resolve().parents[1]
TINY = {"embed_dims": (8, 16, 32), "num_heads": (1, 2, 4), "depths": (1, 1, 2), "num_classes": 10}


def tiny_config(**groups):
    """A tiny CvT on the digits; `groups` are a configuration's, `model` only the keys to change."""
    sizes = {"name": "cvt_nano", "image_size": 32, **TINY, **groups.pop("model", {})}
    groups.setdefault("data", DataConfig(source="digits"))
    return Config(model=ModelConfig(**sizes), **groups)


TINY_KEYS = [
    "--model.embed_dims=[8,16,32]",
    "--model.depths=[1,1,1]",
    "--training.batch_size=250",
    "--evaluation.batch_size=300",
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Mark the slow tests, and start the long files first.

    First of all hooks, because `-m "not slow"` selects by the marks that are set here.
    """

    def place(item) -> int:
        found = (i for i, file in enumerate(LONG_FILES) if item.nodeid.startswith(file))
        return next(found, len(LONG_FILES))

    for item in items:
        if item.nodeid.startswith(SLOW_TESTS) or "trained" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Exempt what importing and collecting made from garbage collection.

    A compilation makes many objects, so the collector ran through all the others often.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def file_lock(path: Path):
    """Hold a lock among the workers of a run."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def synchronous():
    """Launch PyNative's operators one by one: the threads of its pipeline spin while they wait."""
    import mindspore as ms

    ms.runtime.launch_blocking()


@pytest.fixture(autouse=True)
def graph_mode():
    """Each test starts in graph mode, as the executables do, and with an unseeded data pipeline.

    After a run in this process has seeded it, each call of a random operation draws the same.
    """
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.dataset.config.set_seed(5489)  # the default, which stands for no seed


@pytest.fixture
def pynative_mode(graph_mode):
    """Operators run one by one, for what does not depend on the mode: nothing to compile."""
    import mindspore as ms

    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(autouse=True)
def compiled_graphs(monkeypatch):
    """Keep the graphs of dead networks until the test ends.

    When MindSpore drops a graph it forgets the signatures of all of them, so that every living
    network compiles anew at its next call.
    """
    from mindspore.common.api import _CellGraphExecutor as Executor

    drop, dead = Executor.del_net_res, []
    with monkeypatch.context() as patch:
        patch.setattr(Executor, "del_net_res", lambda *arguments: dead.append(arguments))
        yield
    for arguments in dead:
        drop(*arguments)


@pytest.fixture(scope="session")
def compiler():
    """Without one the tests of compiled operators have nothing to test."""
    from src.kernels.library import COMPILERS

    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def built(compiler) -> Path:
    """The library of compiled operators; where one can't be built, its tests fail."""
    from src.device import cache_folder
    from src.kernels.library import library

    return library(cache_folder())


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory) -> str:
    """This interpreter as PYTHON for scripts, whose probe for packages would take seconds."""
    script = tmp_path_factory.mktemp("bin") / "python"
    script.write_text(
        "#!/bin/sh\ncase $2 in 'import mindspore,'*) exit ;; esac\n"
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def run_command(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run an executable (train.py) or a module (tools.study) of the repository in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    if not words[0].endswith(".py"):
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """As `run_command`, but in this process and in `tmp_path`: starting MindSpore takes seconds."""

    def run(*words: str) -> subprocess.CompletedProcess:
        if words[0].endswith(".py"):
            spec = importlib.util.spec_from_file_location(words[0][:-3], ROOT / words[0])
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(f"{words[0]}.__main__")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", list(words))
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run


def graph_cache(folder: Path, *words: str) -> dict[str, str]:
    """Environment variables under which started commands keep their compiled graphs.

    MindSpore's key leaves out the constants in a graph (learning rates, drop path), so each
    configuration has a folder of its own.

    Args:
        folder: two jobs must not write there at once.
        words: everything that decides on the graphs: the keys and the number of ranks.
    """
    place = folder / hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]
    return {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(place)}


@pytest.fixture
def graph_folder(shared_folder):
    """The folder for `graph_cache` of jobs, which all workers share, one test at a time."""
    with file_lock(shared_folder / "graphs.lock"):
        yield shared_folder / "graphs"


@pytest.fixture(scope="session")
def compiled_graph(shared_folder):
    """A graph of `tests.ascend.graphs` by its name, its group compiled once for all workers."""
    from tests.ascend.graphs import GROUPS, dump_graphs, read_graph

    def read(name):
        path = shared_folder / f"{name}.ir"
        group = next(names for names in GROUPS if name in names)
        with file_lock(shared_folder / f"{group[0]}.lock"):
            if not path.exists():
                for each, text in dump_graphs(group).items():
                    (shared_folder / f"{each}.ir").write_text(text)
        return read_graph(path.read_text())

    return read


@pytest.fixture(scope="session")
def trained(shared_folder) -> Path:
    """The folder of a finished run: a tiny network, two epochs on the digits, EMA on."""
    work = shared_folder / "trained"
    with file_lock(shared_folder / "trained.lock"):
        if not work.exists():
            _train(work)
    return work / "run"


def _train(work: Path) -> None:
    work.mkdir()
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
