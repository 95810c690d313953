"""Whole runs of a tiny network: what they leave, and that an interrupted one ends the same."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from src import splits
from src.build import build_model
from src.config import DataConfig
from src.config_io import load_config, save_config
from src.data.loader import resolve_num_workers
from src.device import log_to, setup
from src.distributed import SINGLE_PROCESS
from src.errors import UserError
from src.splits import open_split
from src.training.run import _require_equal_settings, train, validate
from src.training.trainer import Trainer
from src.weights import save_weights
from tests.conftest import tiny_config
from tests.training.runs import assert_equal_runs, small, small_cvt


def test_a_run_leaves_what_the_contract_says(trained):
    assert sorted(p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()) == [
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/step-00000016.ckpt",
        "checkpoints/step-00000032.ckpt",
        "config.yaml",
        "curves.png",
        "log.txt",
        "metrics.jsonl",
    ]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    keys = ["epoch", "step", "lr", "train_loss", "top1", "top5", "images_per_second", "seconds"]
    assert all(set(keys) <= set(row) for row in rows)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 16), (2, 32)]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    log = (trained / "log.txt").read_text()
    assert "4000 training images, 1000 held out" in log and "epoch 2/2" in log
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_best_holds_the_average_and_last_the_whole_state(trained):
    best = ms.load_checkpoint(str(trained / "checkpoints/best.ckpt"))
    last = ms.load_checkpoint(str(trained / "checkpoints/last.ckpt"))
    assert not any(name.startswith(("ema.", "moment")) for name in best)
    assert set(best) | {f"ema.{name}" for name in best} < set(last)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["top1"] > rows[0]["top1"], "so best is of the last epoch"
    for name, value in best.items():
        assert np.array_equal(value.asnumpy(), last[f"ema.{name}"].asnumpy())
    assert int(last["step"].asnumpy()) == 32


def test_a_resumed_run_equals_one_that_went_through(trained, few_digits, tmp_path, monkeypatch):
    """Drop path, augmentation and EMA on; stopped behind the first epoch; equal to the last bit."""
    config = small(trained, model__depths=[1, 1], model__drop_path_rate=0.3, training__epochs=2)
    train(config, tmp_path / "whole")
    real = Trainer._train_epoch

    def dies(self):
        if self.progress.epoch == 1:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train_epoch", dies)
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_an_epoch_of_steps_stops_and_goes_on_as_any_other(trained, few_digits, tmp_path):
    """Three steps of 50 an epoch from 100 images; stopped within the second one by an error."""
    config = small(trained, training__epoch_steps=3, training__epochs=2)
    train(config, tmp_path / "whole")
    trainer = Trainer(config, open_split(config, "train"), tmp_path)
    orders = [trainer.loader.batches(epoch).source.items for epoch in (0, 1)]
    assert [len(order) for order in orders] == [150, 150]
    assert np.unique(np.concatenate(orders), return_counts=True)[1].tolist() == [3] * 100
    half = small(trained, training__epoch_steps=3, training__epochs=2, training__save_every=4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_evaluate", _dies_behind(1))
        train(half, tmp_path / "parts")
    saved = sorted(path.name for path in (tmp_path / "parts/checkpoints").glob("step-*"))
    assert saved[-1] == "step-00000004.ckpt"
    train(half, tmp_path / "parts", resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def _dies_behind(epochs):
    real = Trainer._evaluate

    def held_out(self):
        if self.progress.epoch == epochs:
            raise KeyboardInterrupt
        return real(self)

    return held_out


def test_repeated_augmentation_reaches_the_batches(trained, few_digits, tmp_path):
    config = small(trained, augment__repeats=2)
    trainer = Trainer(config, open_split(config, "train"), tmp_path)
    indices = trainer.loader.batches(0).source.items
    assert len(indices) == 100 and len(set(indices)) == 50
    assert np.array_equal(indices[::2], indices[1::2])


def test_fine_tuning_starts_from_the_weights_with_a_new_head(trained, few_digits, tmp_path):
    """Three of the classes, all but the head frozen, evaluated behind the last epoch only."""
    config = small_cvt(
        trained,
        data__classes=["7", "2", "5"],
        data__class_names=None,
        training__batch_size=10,
        model__num_classes=None,
        training__freeze=["backbone"],
        training__ema_decay=0.0,
        evaluation__every=2,
    )
    weights = trained / "checkpoints" / "best.ckpt"
    train(config, tmp_path / "tuned", finetune=str(weights))
    source = ms.load_checkpoint(str(weights))
    tuned = ms.load_checkpoint(str(tmp_path / "tuned" / "checkpoints" / "best.ckpt"))
    assert tuned["head.weight"].shape == (3, 32)
    for name in set(source) - {"head.weight", "head.bias"}:
        assert np.array_equal(source[name].asnumpy(), tuned[name].asnumpy()), name
    lines = (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["top1"] is None and rows[1]["top1"] > 0
    assert "head" in (tmp_path / "tuned" / "log.txt").read_text()
    resolved = load_config(tmp_path / "tuned" / "config.yaml")
    assert (resolved.model.num_classes, resolved.data.class_names) == (3, ["7", "2", "5"])
    with pytest.raises(UserError, match="give only one"):
        train(config, tmp_path / "tuned", resume=True, finetune=str(weights))


def test_fine_tuning_to_as_many_other_classes_starts_the_head_anew(trained, few_digits, tmp_path):
    """Ten classes in another order fit the head's shape, but mean something else."""
    config = small_cvt(trained, data__class_names=None, training__epochs=1, training__ema_decay=0.0)
    config.data.classes = list("9876543210")
    config.training.freeze = ["head"]
    weights = str(trained / "checkpoints" / "best.ckpt")
    train(config, tmp_path / "other", finetune=weights)
    config.data.classes, config.data.class_names = None, list("0123456789")
    train(config, tmp_path / "same", finetune=weights)
    source = ms.load_checkpoint(weights)["head.weight"].asnumpy()
    for run, kept in (("other", False), ("same", True)):
        tuned = ms.load_checkpoint(str(tmp_path / run / "checkpoints/best.ckpt"))
        assert np.array_equal(tuned["head.weight"].asnumpy(), source) == kept
        assert ("new head: the weights" in (tmp_path / run / "log.txt").read_text()) != kept


def test_a_strangers_config_beside_the_weights_stops_no_fine_tuning(trained, few_digits, tmp_path):
    (tmp_path / "weights").mkdir()
    weights = shutil.copy(trained / "checkpoints/best.ckpt", tmp_path / "weights")
    (tmp_path / "config.yaml").write_text("learning_rate: 1\n")
    train(small_cvt(trained, training__epochs=1), tmp_path / "run", finetune=str(weights))
    said = (tmp_path / "run/log.txt").read_text()
    assert f"class names not read: {tmp_path / 'config.yaml'}: unknown key learning_rate" in said


def test_sgd_trains(trained, few_digits, tmp_path):
    config = small(trained, optimizer__name="sgd", optimizer__lr=0.1, training__epochs=1)
    train(config, tmp_path / "run")
    state = ms.load_checkpoint(str(tmp_path / "run/checkpoints/last.ckpt"))
    assert np.abs(state["moments.head.weight"].asnumpy()).max() > 0


def test_damaged_figures_are_written_anew_from_the_state(trained, tmp_path, capsys):
    log_to()  # as train.py does
    whole = (trained / "metrics.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    for text in (lines[0], lines[0] + lines[1][:20], whole.replace("1", "2"), None):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "run")
        figures = tmp_path / "run" / "metrics.jsonl"
        figures.unlink() if text is None else figures.write_text(text)
        train(load_config(trained / "config.yaml"), tmp_path / "run", resume=True)
        assert figures.read_text() == whole
        assert "metrics.jsonl: differs from the state" in capsys.readouterr().out


def test_a_run_without_a_checkpoint_starts_anew(trained, few_digits, tmp_path):
    """Killed in its first epoch it left its settings, and nothing that could be lost."""
    (tmp_path / "run").mkdir()
    save_config(small(trained, optimizer__lr=5.0), tmp_path / "run" / "config.yaml")
    train(small(trained, training__epochs=1), tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml").optimizer.lr == 0.002


def test_warnings_about_the_data_are_in_the_log_file(trained, few_digits, tmp_path):
    """They come before the run's folder, and so its log, is known to be good."""
    resolve_num_workers.cache_clear()
    log_to()
    train(small(trained, data__workers=999, training__epochs=1), tmp_path / "run")
    assert "data.workers 999: MindSpore allows" in (tmp_path / "run" / "log.txt").read_text()


def test_a_folder_with_a_run_is_not_written_over(trained):
    before = (trained / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="holds a run; add --resume"):
        train(small(trained), trained)
    assert (trained / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("left", ["checkpoints/best.ckpt", "metrics.jsonl"])
def test_what_is_left_of_a_run_without_states_is_not_written_over(trained, tmp_path, left):
    """Somebody removed the states, which are large, and keeps the weights or the figures."""
    for name in ("config.yaml", left):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(trained / name, tmp_path / name)
    with pytest.raises(UserError, match=f"{Path(left).name} would be overwritten; give another"):
        train(small(trained), tmp_path)
    assert (tmp_path / left).read_bytes() == (trained / left).read_bytes()


def test_resuming_with_other_settings_names_them(trained):
    config = load_config(trained / "config.yaml")
    config.optimizer.lr, config.training.batch_size = 0.5, 7
    with pytest.raises(UserError, match="lr 0.002, not 0.5; .*batch_size 250, not 7"):
        train(config, trained, resume=True)


def test_resuming_nothing_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="no checkpoints/last.ckpt"):
        train(small(trained), tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(trained, few_digits, tmp_path):
    config = small(trained, optimizer__lr=1e30, optimizer__warmup_epochs=0)
    with pytest.raises(UserError, match="step 2: the loss is nan.*lower optimizer.lr"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_too_few_images_for_a_batch(trained, tmp_path):
    with pytest.raises(UserError, match=r"fewer images \(4000\) than a step takes \(5000\)"):
        train(small(trained, training__batch_size=5000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"training__epochs": 2**31 - 1}, "training.epochs 2147483647: .* steps, more than"),
        (
            {"training__epoch_steps": 2**31 - 1},
            "training.epoch_steps 2147483647: an epoch of .* images",
        ),
    ],
)
def test_more_steps_than_memory_holds_are_refused(trained, tmp_path, keys, words):
    with pytest.raises(UserError, match=words):
        train(small(trained, **keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.yaml", "log.txt", "metrics.jsonl", "curves.png"])
def test_files_that_no_run_wrote_are_not_replaced(trained, few_digits, tmp_path, name):
    (tmp_path / name).write_text("optimizer: {lr: 5}")
    with pytest.raises(UserError, match=f"{name} would be overwritten"):
        train(small(trained), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "optimizer: {lr: 5}"


@pytest.mark.parametrize("is_link", [True, False])
def test_a_folder_that_takes_no_states_is_refused_before_an_epoch(
    trained, few_digits, tmp_path, monkeypatch, is_link
):
    """A link to a scratch folder that was purged, or a file."""
    (tmp_path / "run").mkdir()
    place = tmp_path / "run/checkpoints"
    place.symlink_to(tmp_path / "gone") if is_link else place.touch()
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("trains"))
    with pytest.raises(UserError, match="run/checkpoints: File exists; give another --output"):
        train(small(trained), tmp_path / "run")


def test_resuming_nothing_leaves_no_folder(trained, tmp_path):
    with pytest.raises(UserError, match="no run to resume here"):
        train(small(trained), tmp_path / "a/b/run", resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__name": "cvt_99"}, "'cvt_99' is unknown"),
        ({"model__embed_dims": [7, 9, 11]}, "embed_dims|heads"),
        ({"augment__rand_augment": "rand-x9"}, "rand_augment"),
        ({"training__freeze": ["stage9"]}, "training.freeze"),
        ({"training__batch_size": 5000}, r"than a step takes \(5000\)"),
        ({"model__image_size": 4}, "image_size|pixels"),
        ({"data__crop_ratio": 2.0}, "data.crop_ratio"),
        ({"augment__cutmix": 1.0, "training__batch_size": 1}, "mix the images of a batch"),
        ({"finetune": "nowhere.ckpt"}, "nowhere.ckpt: there is no such file"),
        ({"finetune": __file__}, "test_run.py: "),
        ({"data__val_folder": "vall"}, "vall"),
    ],
)
def test_cheap_checks_come_before_the_images_are_read(
    trained, tmp_path, monkeypatch, changes, words
):
    """Reading ImageNet's images takes minutes."""
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(30):
                (tmp_path / "data" / split / name / f"{k}.png").touch()

    def read(*arguments, **options):
        raise AssertionError("the images are read before the recipe is checked")

    monkeypatch.setattr(splits, "check_files", read)
    finetune = changes.pop("finetune", None)
    config = small_cvt(
        trained, data__source="imagefolder", data__path=str(tmp_path / "data"),
        data__class_names=None, model__num_classes=None, **changes,
    )  # fmt: skip
    with pytest.raises(UserError, match=words):
        train(config, tmp_path / "run", finetune=finetune)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "keys, links, words",
    [
        ({}, {}, None),
        ({"val_folder": "val/../train"}, {}, "are the same folder"),
        ({}, {"val/b": "../train/b"}, "share class folders (b)"),
        ({}, {"val/b": "../train/c/deep"}, "share class folders (b)"),
        ({}, {"train/b": "../val/b/deep"}, "share class folders (b)"),
        ({"classes": ["a", "b"]}, {"val/c": "../train/c"}, None),
    ],
)
def test_accuracy_on_the_training_images_is_warned_of(tmp_path, caplog, keys, links, words):
    for split in ("train", "val"):
        for name in "abc":
            (tmp_path / split / name / "deep").mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / split / name / "deep" / "1.png")
    for link, target in links.items():
        shutil.rmtree(tmp_path / link)
        (tmp_path / link).symlink_to(target)
    settings = tiny_config()
    settings.data = DataConfig(path=str(tmp_path), workers=1, **keys)
    settings.model.num_classes, settings.training.batch_size = None, 2
    validate(settings, SINGLE_PROCESS)
    if words is None:
        assert "training images" not in caplog.text
    else:
        assert f"{words}, so accuracy is measured on the training" in caplog.text


@pytest.mark.parametrize("classes", [["7", "2"], None])
def test_images_that_the_weights_were_trained_on_are_told(tmp_path, caplog, classes):
    """20 held-out images of two classes are ten of each, while the run held out two of each."""
    settings = tiny_config(data=DataConfig(source="digits", val_from_train=20))
    settings.model.num_classes = 10
    weights = tmp_path / "run/best.ckpt"
    save_config(settings, tmp_path / "run/config.yaml")
    save_weights(build_model(settings), weights)
    settings.data.classes, settings.model.num_classes = classes, None
    validate(settings, SINGLE_PROCESS, str(weights))
    assert ("of the 20 images that data.val_from_train 20 now" in caplog.text) is bool(classes)


def test_the_check_leaves_the_generators_as_they_were(trained, few_digits, tmp_path, monkeypatch):
    """A run's initial weights are those that its seed gave before there was the check."""

    def first(trainer):
        weights = {p.name: p.asnumpy().copy() for p in trainer.step.net.get_parameters()}
        raise StopIteration(weights)

    monkeypatch.setattr(Trainer, "fit", first)
    with pytest.raises(StopIteration) as caught:
        train(small_cvt(trained), tmp_path / "run")
    setup(small_cvt(trained).runtime)
    net = build_model(small_cvt(trained))
    for parameter in net.get_parameters():
        assert np.array_equal(caught.value.value[parameter.name], parameter.asnumpy())


def two_ranks(changes):
    """Ranks of which the second has other values of some keys."""
    return SimpleNamespace(
        gather_texts=lambda text: [text, json.dumps({**json.loads(text), **changes})]
    )


def test_hosts_may_keep_images_elsewhere_and_other_settings_are_named(trained):
    config = small(trained, data__path="/data/here")
    _require_equal_settings(config, two_ranks({"data.path": "/data/there", "data.index": "x"}))
    with pytest.raises(UserError, match=r"rank 1 has other settings .*\(optimizer.lr\); give"):
        _require_equal_settings(config, two_ranks({"optimizer.lr": 0.5}))
