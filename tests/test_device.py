"""Device, seeds, environment and logging."""

import builtins
import dataclasses
import logging
import os
import signal
import stat
import tempfile
from pathlib import Path
from unittest.mock import Mock

import mindspore as ms
import numpy as np
import pytest

from src import device
from src.config import RuntimeConfig
from src.cores import usable_cores
from src.device import import_mindspore, log_to, prepare_environment, setup
from src.errors import UserError


def test_auto_takes_a_device_that_is_here_and_sets_the_mode():
    device, ranks = setup(RuntimeConfig(mode="pynative"))
    assert device == ms.get_context("device_target")
    assert (ranks.rank, ranks.world) == (0, 1)
    assert ms.get_context("mode") == ms.PYNATIVE_MODE
    setup(RuntimeConfig())
    assert ms.get_context("mode") == ms.GRAPH_MODE


@pytest.mark.skipif(ms.get_context("device_target") != "CPU", reason="for hosts without a card")
@pytest.mark.parametrize("keys", [{"device": "Ascend"}, {"device": "GPU"}])
def test_a_device_that_is_not_here_is_refused(keys):
    with pytest.raises(UserError, match="finds only CPU here"):
        setup(RuntimeConfig(**keys))


def test_bfloat16_is_refused_on_the_cpu():
    with pytest.raises(UserError, match="bfloat16"):
        setup(RuntimeConfig(device="CPU", precision="bfloat16"))


@pytest.mark.parametrize(
    ("keys", "given", "changed"),
    [
        ({"jit_level": "O2"}, (), {"jit_level": None}),
        ({"jit_level": "O2"}, ("jit_level",), {}),
        ({"jit_level": "O1", "mode": "pynative"}, (), {"jit_level": None}),
        ({"jit_level": "O1"}, (), {}),
        ({"compiled_ops": "always"}, (), {"compiled_ops": "auto"}),
        ({"compiled_ops": "always"}, ("compiled_ops",), {}),
        ({"precision": "bfloat16"}, (), {"precision": "float32"}),
    ],
)
def test_what_another_device_lacks_of_a_runs_settings_is_left_out(keys, given, changed):
    """But not what the user asks for now: that is refused where it can't be."""
    runtime = RuntimeConfig(**keys)
    found = device.inference_runtime(runtime, "CPU", given)
    assert found == dataclasses.replace(runtime, **changed)


@pytest.mark.parametrize(
    ("kind", "precision", "computed"),
    [
        ("CPU", "float16", "float32"),
        ("GPU", "float16", "float16"),
        ("GPU", "bfloat16", "float32"),
        ("Ascend", "bfloat16", "bfloat16"),
    ],
)
def test_weights_compute_in_a_precision_that_the_device_has(kind, precision, computed):
    found = device.inference_runtime(RuntimeConfig(precision=precision), kind)
    assert found.precision == computed


def test_the_seed_decides_the_initial_weights():
    def draw(seed):
        setup(RuntimeConfig(seed=seed))
        return ms.nn.Dense(4, 4, weight_init="normal").weight.asnumpy(), np.random.random()

    first, again, other = draw(1), draw(1), draw(2)
    assert np.array_equal(first[0], again[0]) and first[1] == again[1]
    assert not np.array_equal(first[0], other[0]) and first[1] != other[1]


@pytest.mark.parametrize("left", ["8", "", "abc"])
def test_a_variable_that_a_job_left_binds_no_process(monkeypatch, left):
    cores = usable_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", left)
    monkeypatch.delenv("MS_WORKER_NUM", raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("was bound"))
    prepare_environment()
    assert usable_cores() == cores


@pytest.mark.parametrize("path", [None, "/own"])
def test_graphs_of_other_runs_are_not_taken(monkeypatch, caplog, path):
    """MindSpore's key leaves out constants, such as learning rates."""
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    monkeypatch.delenv("MS_COMPILER_CACHE_PATH", raising=False)
    if path:
        monkeypatch.setenv("MS_COMPILER_CACHE_PATH", path)
    prepare_environment()
    assert os.environ["MS_COMPILER_CACHE_ENABLE"] == ("1" if path else "0")
    assert ("MS_COMPILER_CACHE_ENABLE is turned off" in caplog.text) is not bool(path)


@pytest.mark.parametrize(
    ("variable", "key", "card"),
    [("3", None, 3), ("3", 0, 0), ("3", 2, 2), (None, 2, 2), (None, None, 0), ("", None, 0)],
)
def test_a_process_takes_the_card_of_its_key_or_of_mindspores_variable(
    monkeypatch, variable, key, card
):
    chosen = []
    monkeypatch.setattr(device, "_set_device", lambda kind, number: chosen.append(number))
    monkeypatch.delenv("DEVICE_ID", raising=False)
    if variable is not None:
        monkeypatch.setenv("DEVICE_ID", variable)
    setup(RuntimeConfig(device="CPU", device_id=key))
    assert chosen == [card]


def test_the_environment_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("GLOG_v", "1")
    monkeypatch.delenv("MS_OM_PATH", raising=False)
    prepare_environment()
    assert os.environ["GLOG_v"] == "1"
    assert os.path.isabs(os.environ["MS_OM_PATH"])


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_an_interrupt_during_the_import_ends_the_process_unless_it_is_ignored(monkeypatch, handler):
    """An exception within MindSpore's import aborts with a dump of its threads."""
    seen, before = [], signal.signal(signal.SIGINT, handler)
    real = builtins.__import__

    def spy(name, *arguments):
        if name == "mindspore":
            seen.append(signal.getsignal(signal.SIGINT))
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", spy)
    try:
        import_mindspore()
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    ends = signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL
    assert seen == [ends] and after is handler


def test_the_log_goes_to_the_console_and_a_file(tmp_path, capsys):
    logger = logging.getLogger("cvt")
    log_to(tmp_path / "log.txt")
    logger.info("first")
    log_to()
    logger.info("second")
    assert capsys.readouterr().out == "first\nsecond\n"
    line = (tmp_path / "log.txt").read_text()
    assert line.endswith(" INFO first\n") and "second" not in line


def test_a_log_goes_on_in_its_file_when_the_terminal_or_tee_has_ended(tmp_path, monkeypatch):
    """The state is saved after Ctrl-C or SIGHUP, and the log says so."""
    reader, writer = os.pipe()
    os.close(reader)
    log_to(tmp_path / "log.txt")
    with open(writer, "w", buffering=1) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        logging.getLogger("cvt").info("saved")
        logging.getLogger("cvt").info("stopped")
    log_to()
    lines = (tmp_path / "log.txt").read_text().splitlines()[-2:]
    assert [line.rpartition(" ")[2] for line in lines] == ["saved", "stopped"]


def test_a_second_device_is_refused_and_the_same_one_accepted(monkeypatch):
    """MindSpore says of any second choice that it can not be modified, and by then names the new
    one as its target.
    """
    now = {"device_target": "CPU", "device_id": 0, "mode": ms.GRAPH_MODE}

    def set_device(target, number):
        now["device_target"] = target
        raise RuntimeError("The 'mindspore.set_device' can not be modified.")

    monkeypatch.setattr(device, "_is_available", lambda kind: True)
    monkeypatch.setattr(ms, "set_device", set_device)
    monkeypatch.setattr(ms, "get_context", lambda name: now[name])
    assert setup(RuntimeConfig(device="CPU", device_id=3))[0] == "CPU"
    with pytest.raises(UserError, match="device Ascend.*this process uses CPU 0 already"):
        setup(RuntimeConfig(device="Ascend"))
    now |= {"device_target": "Ascend", "device_id": 1}
    with pytest.raises(UserError, match="device_id 2: this process uses Ascend 1 already"):
        setup(RuntimeConfig(device="Ascend", device_id=2))
    device._set_device("Ascend", 1)


def test_a_device_that_fails_is_no_earlier_choice(monkeypatch):
    def set_device(target, number):
        raise RuntimeError("aclrtSetDevice failed,\n error code 507033")

    monkeypatch.setattr(ms, "set_device", set_device)
    with pytest.raises(UserError, match="runtime.device_id 0: aclrtSetDevice failed, error code"):
        device._set_device("CPU", 0)


@pytest.mark.skipif(ms.get_context("device_target") != "CPU", reason="for hosts without a card")
def test_auto_does_not_pass_over_cards_that_it_cannot_use(monkeypatch):
    with pytest.raises(UserError, match=r"finds only CPU here \(.*lib\w+\.so.*\); choose"):
        setup(RuntimeConfig(device="Ascend"))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path("/dev/davinci0")])
    with pytest.raises(UserError, match=r"auto: /dev/davinci0 exists.*\.so.*set_env.sh"):
        setup(RuntimeConfig())
    assert setup(RuntimeConfig(device="CPU"))[0] == "CPU"


@pytest.mark.parametrize(("mindspore", "numpy", "fits"), [
    ("2.7.1", "2.0.0", False), ("2.8.0", "2.3.5", False), ("2.8.0", "1.26.4", True),
    ("2.10.0", "2.3.5", True),
])  # fmt: skip
def test_numpy_2_is_refused_at_the_start(monkeypatch, mindspore, numpy, fits):
    monkeypatch.setattr(device.importlib.metadata, "version", lambda name: mindspore)
    monkeypatch.setattr(np, "__version__", numpy)
    if fits:
        prepare_environment()
        return
    with pytest.raises(UserError, match=f"NumPy {numpy} .*MindSpore {mindspore} needs NumPy 1"):
        prepare_environment()


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The name of the scratch folder in a temporary folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in device.SCRATCH:
        monkeypatch.delenv(name)
    return tmp_path / f"cvt-mindspore-{os.getuid()}"


def chosen():
    prepare_environment()
    folder = Path(os.environ["MS_OM_PATH"])
    assert stat.S_IMODE(folder.lstat().st_mode) == 0o700 and not folder.is_symlink()
    return folder


def test_the_scratch_folder_is_the_users_alone(scratch):
    assert chosen() == scratch
    for name in device.SCRATCH:
        del os.environ[name]
    scratch.chmod(0o755)  # of an earlier version
    assert chosen() == scratch


def test_no_folder_for_temporary_files_is_told(scratch, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", Mock(side_effect=FileNotFoundError(2, "none")))
    with pytest.raises(UserError, match="no folder for temporary files can be written; .*TMPDIR"):
        prepare_environment()


@pytest.mark.parametrize("planted", ["link", "file", "open folder"])
def test_a_planted_scratch_folder_is_not_used(scratch, tmp_path, planted):
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    if planted == "link":
        scratch.symlink_to(victim)
    elif planted == "file":
        scratch.touch()
    else:
        scratch.mkdir()
        scratch.chmod(0o777)
    assert chosen() != scratch and chosen().parent == tmp_path
    assert stat.S_IMODE(victim.stat().st_mode) == 0o755 and not list(victim.iterdir())
