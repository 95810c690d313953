"""Saved states: exact resume within an epoch, falling back, and what is refused."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from src.config_io import load_config
from src.data import ArraySource
from src.errors import UserError
from src.evaluation.evaluator import Evaluator
from src.files import replacing_together
from src.training.resume import check_compatible, restore
from src.training.run import train
from src.training.schedule import learning_rates
from src.training.state import Progress, save_state
from src.training.train_step import TrainStep
from src.training.trainer import Trainer
from tests.training.runs import Step, assert_equal_runs, small, small_cvt

RESIZED, PLAIN = ({"settings": {"augment.crop": crop}} for crop in ("random_resized", "pad"))


def dying(monkeypatch, calls):
    """Let the training step fail at its call of this number, as a lost machine would."""
    real, seen = TrainStep.run_batch, []

    def take(self, *arguments):
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(TrainStep, "run_batch", take)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()  # last.ckpt is the same file under another name
    path.write_bytes(bytes(content))


def test_a_run_resumed_within_an_epoch_ends_equal(trained, few_digits, tmp_path, capsys):
    """Drop path, mixup, crops and average on; then again with the newest state damaged."""
    changes = {
        "model__depths": [1, 1, 2], "model__drop_path_rate": 0.3, "augment__mixup": 0.8,
        "augment__cutmix": 1.0, "training__save_every": 1, "training__batch_size": 25,
    }  # fmt: skip
    config = small_cvt(trained, **changes)
    train(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dying(patch, calls=7)  # four steps an epoch
        train(config, tmp_path / "parts")
    states = sorted(path.name for path in (tmp_path / "parts/checkpoints").glob("step-*"))
    assert states == ["step-00000005.ckpt", "step-00000006.ckpt"], "the two newest"
    shutil.copytree(tmp_path / "parts", tmp_path / "damaged")
    train(config, tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")

    flip(tmp_path / "damaged/checkpoints/step-00000006.ckpt")
    flip(tmp_path / "damaged/checkpoints/last.ckpt")
    capsys.readouterr()
    train(config, tmp_path / "damaged", resume=True)
    said = capsys.readouterr().out
    assert "step-00000006.ckpt" in said and "resuming from step-00000005.ckpt" in said
    assert_equal_runs(tmp_path / "whole", tmp_path / "damaged")


def test_where_every_state_is_damaged_the_resume_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").iterdir():
        flip(path)
    with pytest.raises(UserError, match="step-00000032.ckpt, step-00000016.ckpt.* can't be used"):
        train(load_config(trained / "config.yaml"), tmp_path / "run", resume=True)


def test_a_state_by_name_is_the_one_that_is_taken(trained, few_digits, tmp_path, capsys):
    config = small(trained, training__keep=5)
    train(config, tmp_path / "run")
    capsys.readouterr()
    train(config, tmp_path / "run", resume=tmp_path / "run/checkpoints/step-00000002.ckpt")
    assert "resumed at epoch 2, step 0" in capsys.readouterr().out
    with pytest.raises(UserError, match="best.ckpt: "):
        train(config, tmp_path / "run", resume=tmp_path / "run/checkpoints/best.ckpt")


def test_changes_are_accepted_where_told_so(trained, few_digits, tmp_path, capsys):
    train(small(trained, training__epochs=1), tmp_path / "run")
    longer = small(trained, training__epochs=2)
    with pytest.raises(UserError, match="training.epochs 1, not 2.*--accept_changes"):
        train(longer, tmp_path / "run", resume=True)
    train(longer, tmp_path / "run", resume=True, accept_changes=True)
    assert "was trained with training.epochs 1, not 2" in capsys.readouterr().out
    assert load_config(tmp_path / "run/config.yaml").training.epochs == 2


def test_best_weights_of_other_settings_are_set_aside(trained, few_digits, tmp_path, capsys):
    """Else config.yaml, with the new settings, would stand beside weights that had others."""
    train(small(trained, training__epochs=1), tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    old = (checkpoints / "best.ckpt").read_bytes()
    other = small(trained, training__epochs=1, data__mean=[0.9, 0.1, 0.5])
    with pytest.raises(UserError, match="has 1 of 1 epochs.*data.mean.*raise training.epochs"):
        train(other, tmp_path / "run", resume=True, accept_changes=True)
    assert (checkpoints / "best.ckpt").read_bytes() == old
    other.training.epochs = 2
    train(other, tmp_path / "run", resume=True, accept_changes=True)
    assert (checkpoints / "abandoned-1-best.ckpt").read_bytes() == old
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    said = capsys.readouterr().out
    assert "selected anew" in said and f"best top1 {rows[1]['top1']:.2f}" in said
    assert (checkpoints / "best.ckpt").read_bytes() != old
    other.data.train_images, other.training.epochs = 100, 3  # of training alone
    train(other, tmp_path / "run", resume=True, accept_changes=True)
    assert "selected anew" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer__name": "sgd"}, "optimizer.name adamw, not sgd"),
        ({"training__ema_decay": 0.5}, "training.ema_decay 0.0, not 0.5"),
        ({"model__depths": [2]}, r"model.depths \[1\], not \[2\]"),
    ],
)
def test_a_change_that_a_state_cannot_follow_is_named(trained, few_digits, tmp_path, change, words):
    """The tensors of a state depend on these keys; tables of their names would help nobody."""
    before = small(trained, training__epochs=1, training__ema_decay=0.0)
    train(before, tmp_path / "run")
    kept = [path for path in (tmp_path / "run").rglob("*.[!t]*") if path.is_file()]  # not log.txt
    files = {path: path.read_bytes() for path in kept}
    after = small(trained, **{"training__epochs": 1, "training__ema_decay": 0.0, **change})
    with pytest.raises(UserError, match=f"was trained with {words}.*--accept_changes"):
        train(after, tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=f"does not fit.*{words}.*--finetune"):
        train(after, tmp_path / "run", resume=True, accept_changes=True)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_resume_that_saves_nothing_keeps_the_settings(trained, few_digits, tmp_path, monkeypatch):
    """Stopped before its first save, or refused because its epochs are shorter than the state's."""
    run = tmp_path / "run"
    config = small(trained, training__epochs=2, training__batch_size=25, training__save_every=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dying(patch, calls=4)  # four steps an epoch
        train(config, run)
    before = (run / "config.yaml").read_bytes()
    longer = small(trained, training__epochs=2, training__batch_size=50)
    with pytest.raises(UserError, match="is from step 3 of an epoch, which now has 2; finish"):
        train(longer, run, resume=True, accept_changes=True)
    faster = small(trained, training__epochs=2, training__batch_size=25, optimizer__lr=0.1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dying(patch, calls=1)
        train(faster, run, resume=True, accept_changes=True)
    assert (run / "config.yaml").read_bytes() == before
    train(faster, run, resume=True, accept_changes=True)
    assert load_config(run / "config.yaml").optimizer.lr == 0.1


def test_a_run_goes_on_with_its_images_moved(trained, tmp_path, monkeypatch):
    """Started with a relative path, while config.yaml has the absolute one."""
    rng = np.random.default_rng(0)
    for number in range(120):
        folder = tmp_path / "data" / ("val" if number % 6 == 0 else "train") / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    keys = {"data__source": "imagefolder", "model__num_classes": None, "data__class_names": None}
    config = small(trained, data__path="data", training__epochs=2, **keys)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        dying(patch, calls=4)  # two steps an epoch
        train(config, tmp_path / "run")
    config = load_config(tmp_path / "run/config.yaml")
    assert config.data.path == str(tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    config.data.path = str(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    for name in ("train/1/1.png", "val/0/0.png"):
        Image.new("L", (32, 32)).save(tmp_path / "other" / name)
    other = load_config(tmp_path / "run/config.yaml")
    other.data.path = str(tmp_path / "other")
    with pytest.raises(UserError, match="content of the training.*evaluation images: their cont"):
        train(other, tmp_path / "run", resume=True)
    train(config, tmp_path / "run", resume=True)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


def test_another_batch_size_goes_on_at_the_same_place_of_the_schedule(
    trained, few_digits, tmp_path, monkeypatch
):
    """Two steps an epoch, then one, then four; the rates are those of the new schedule."""
    rates, real = [], TrainStep.run_batch

    def watched(self, *arguments):
        rates.append(float(self.learning_rates[int(self.step.asnumpy())]))
        return real(self, *arguments)

    monkeypatch.setattr(TrainStep, "run_batch", watched)
    train(small(trained, training__epochs=1), tmp_path / "run")
    for size, epochs in ((100, 2), (25, 3)):
        rates.clear()
        config = small(trained, training__epochs=epochs, training__batch_size=size)
        train(config, tmp_path / "run", resume=True, accept_changes=True)
        steps, keys = 100 // size, config.optimizer
        schedule = learning_rates(
            peak=keys.lr, warmup_start=keys.warmup_lr, minimum=keys.min_lr, epochs=epochs,
            warmup_epochs=keys.warmup_epochs, steps_per_epoch=steps, per=keys.schedule_per,
        )  # fmt: skip
        np.testing.assert_allclose(rates, schedule[-steps:], rtol=1e-6)
        row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
        assert row["lr"] == pytest.approx(rates[-1])


def test_another_loss_scale_takes_effect(trained, few_digits, tmp_path):
    """The state holds the scale that it was trained with."""
    train(small(trained, training__epochs=1, training__loss_scale=64.0), tmp_path / "run")
    for number, (scale, expected) in enumerate(((64.0, 64.0), (8.0, 8.0), ("dynamic", 65536.0))):
        config = small(trained, training__epochs=2 + number, training__loss_scale=scale)
        train(config, tmp_path / "run", resume=True, accept_changes=True)
        state = ms.load_checkpoint(str(tmp_path / "run/checkpoints/last.ckpt"))
        assert float(state["loss_scale"].asnumpy()) == expected


def test_last_stays_where_the_file_system_has_no_links(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for number in range(1, 5):
        save_state(Step().at(number), Progress(), tmp_path, 2)
        last = (tmp_path / "last.ckpt").read_bytes()
        assert last == (tmp_path / f"step-{number:08}.ckpt").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.ckpt", "step-00000003.ckpt", "step-00000004.ckpt"
    ]  # fmt: skip


def test_saving_leaves_the_file_alone_that_another_process_writes(tmp_path):
    """An export writes beside best.ckpt unless --output names another place."""
    (tmp_path / ".step-00000001.ckpt.partial-killed").mkdir()
    with replacing_together(tmp_path / "best.mindir.json", tmp_path / "best.mindir") as written:
        for each in written:
            each.touch()
        save_state(Step().at(2), Progress(), tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.mindir", "best.mindir.json", "last.ckpt", "step-00000002.ckpt",
    ]  # fmt: skip


def test_the_position_and_seconds_of_an_epoch_are_restored(tmp_path):
    saved = Progress(epoch=1, position=3, losses=[1.0, 2.0, 3.0], seconds=12.5)
    save_state(Step().at(12), saved, tmp_path / "checkpoints", 1)
    options = {"steps_per_epoch": 9, "keep": 1, "accept_changes": False}
    assert restore(Step(), Progress(), tmp_path, None, **options) == saved


def test_an_old_state_that_cannot_be_deleted_stops_nothing(tmp_path, monkeypatch, caplog):
    """As on a file server, where another host holds it open."""

    def refuse(*_, **__):
        raise OSError(errno.EBUSY, "Device or resource busy")

    save_state(Step().at(1), Progress(), tmp_path, 1)
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    save_state(Step().at(2), Progress(), tmp_path, 1)
    assert "step-00000001.ckpt: cannot be deleted: Device or resource busy" in caplog.text
    assert (tmp_path / "step-00000002.ckpt").exists()


def test_other_data_under_the_same_path_is_noticed(trained, few_digits, tmp_path, monkeypatch):
    train(small(trained, training__epochs=1), tmp_path / "run")
    digests = iter((0, 5, 6, 6, 7, 7))
    monkeypatch.setattr(ArraySource, "digest", lambda self, **_: next(digests))
    with pytest.raises(UserError, match="other training images or labels.*evaluation images"):
        train(small(trained, training__epochs=1), tmp_path / "run", resume=True)


def test_pixels_that_changed_are_noticed_unless_a_state_is_too_old_to_know_them(tmp_path):
    images, labels = np.zeros((4, 2, 2), np.uint8), np.zeros(4)
    source = ArraySource(images, labels, ("a", "b"), "grey")
    part = source.subset(np.array([0, 2]))
    before = Progress(content=source.digest_content(), held_out_content=part.digest_content())
    images[3] = 1  # not in the part
    assert part.digest_content() == before.held_out_content
    now = dataclasses.replace(before, content=source.digest_content())
    with pytest.raises(UserError, match=r"with other content of the training images, .* same\."):
        check_compatible(before, now, tmp_path, accept=False)
    assert check_compatible(Progress(), now, tmp_path, accept=False) == {}


def test_a_state_that_is_not_finite_is_not_saved(trained, tmp_path):
    net = ms.nn.Dense(2, 2)
    net.weight.set_data(ms.Tensor(np.array([[1, np.nan], [0, 0]], np.float32)))
    net.step = ms.Parameter(ms.Tensor(3, ms.int32), name="step")
    with pytest.raises(UserError, match="step-00000003.ckpt: not saved, weight is not finite"):
        save_state(net, Progress(), tmp_path, keep=2)
    assert not list(tmp_path.iterdir())


def test_bad_batches_are_skipped_where_told_so(trained, few_digits, tmp_path, monkeypatch, capsys):
    """The first step's learning rate is harmless; its images are not numbers."""
    real, seen = TrainStep.run_batch, []

    def take(self, images, *rest):
        seen.append(1)
        return real(self, images * float("nan") if len(seen) == 2 else images, *rest)

    monkeypatch.setattr(TrainStep, "run_batch", take)
    config = small_cvt(trained, training__batch_size=25, training__epochs=1)
    with pytest.raises(UserError, match=r"step 2: the loss is nan.*image \d+ of.* and 22 more"):
        train(config, tmp_path / "stops")
    assert not list((tmp_path / "stops/checkpoints").iterdir())
    seen.clear()
    config.training.non_finite = "skip"
    train(config, tmp_path / "skips")
    assert "step 2: the loss is nan" in capsys.readouterr().out
    state = ms.load_checkpoint(str(tmp_path / "skips/checkpoints/last.ckpt"))
    assert (int(state["step"].asnumpy()), int(state["skipped"].asnumpy())) == (4, 1)


def test_two_runs_do_not_share_a_folder(trained, few_digits, tmp_path, monkeypatch):
    def second(self):
        with pytest.raises(UserError, match="another run is using"):
            train(small(trained), tmp_path / "run")
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", second)
    with pytest.raises(KeyboardInterrupt):
        train(small(trained), tmp_path / "run")
    assert not (tmp_path / "run/.lock").exists()


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(trained, few_digits, tmp_path):
    """A limit on the size of files stands in for the disk; the state is larger, the rest is not."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.argv = sys.argv[1:]\n"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run/checkpoints/step-00000032.ckpt").read_bytes()
    command = [
        sys.executable, "-c", code, "train.py", "--output", str(tmp_path / "run"), "--resume",
        "--training.epochs=3", "--training.epoch_steps=1", "--runtime.mode=pynative",
        "--accept_changes",
    ]  # fmt: skip
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot be written" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "run/checkpoints/step-00000032.ckpt").read_bytes() == before
    assert not list((tmp_path / "run/checkpoints").glob(".*")), "nothing half-written stays"


def test_a_signal_is_noted_behind_the_first_step_and_handlers_come_back():
    from src.distributed import SINGLE_PROCESS
    from src.training.stop_signal import StopSignal

    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(SINGLE_PROCESS) as stop_signal:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        stop_signal.defer_signals()
        assert not stop_signal.should_stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal.should_stop() and stop_signal.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_ends_a_resumed_run_at_once_while_its_first_step_compiles(
    trained, few_digits, tmp_path, monkeypatch
):
    """Also behind the evaluation that a run resumed at the end of an epoch starts with."""
    config = small(trained, training__batch_size=25)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "compile", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    handlers, real = [], TrainStep.run_batch

    def run_batch(self, *arguments):
        handlers.append(signal.getsignal(signal.SIGTERM))
        return real(self, *arguments)

    monkeypatch.setattr(TrainStep, "run_batch", run_batch)
    train(config, tmp_path / "run", resume=True)
    epochs = (tmp_path / "run/metrics.jsonl").read_text().count("\n")
    assert epochs == 2 and len(handlers) == 4, "the first epoch's steps are done"
    assert handlers[0] is signal.SIG_DFL
    assert all(callable(handler) for handler in handlers[1:])


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (
            Progress(**RESIZED, workers=1),
            Progress(**RESIZED, workers=2),
            "workers change from 1 to 2",
        ),
        (Progress(**PLAIN, workers=1), Progress(**PLAIN, workers=2), ""),
        (Progress(settings={"data.workers": 0}), Progress(settings={"data.workers": 1}), ""),
        (Progress(compiled=True), Progress(), "was with compiled operators and continues without"),
        (Progress(), Progress(compiled=True), "was without compiled operators and continues with"),
        (Progress(compiled=True), Progress(compiled=True), ""),
        (
            Progress(settings={"runtime.jit_level": None}),
            Progress(settings={"runtime.jit_level": "O1"}),
            "runtime.jit_level None, now O1: from here on results equal",
        ),
        (Progress(device="Ascend"), Progress(device="CPU"), "device Ascend, now CPU"),
        (Progress(), Progress(device="CPU"), ""),
        (Progress(version=1), Progress(version=2), "another version of this code"),
        (
            Progress(software="MindSpore 2.7"),
            Progress(software="MindSpore 2.8"),
            "used MindSpore 2.7",
        ),
        (Progress(), Progress(software="MindSpore 2.8"), ""),
        (
            Progress(settings={"data.check_images": True}),
            Progress(settings={"data.check_images": False}),
            "",
        ),
    ],
)
def test_what_makes_a_resumed_run_differ_is_said(before, now, words, tmp_path, caplog):
    check_compatible(before, now, tmp_path, accept=False)
    assert words in caplog.text and bool(words) == bool(caplog.text)
