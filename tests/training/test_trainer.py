"""The loop around the step."""

import mindspore as ms
import numpy as np
import pytest

from src.config import (
    AugmentConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TrainingConfig,
)
from src.data import open_source
from src.splits import resolve_classes
from src.training import trainer as loop
from src.training.state import Progress
from src.training.trainer import Trainer
from tests.conftest import TINY


class Watched:
    """A training step that computes nothing and notes when it is called."""

    def __init__(self, step, events):
        self.step, self.events = step, events

    def __getattr__(self, name):
        return getattr(self.step, name)

    def run_batch(self, *inputs):
        self.events.append("step")
        return ms.Tensor(1.0, ms.float32), ms.Tensor(1.0, ms.float32)


@pytest.fixture
def trainer(tmp_path):
    config = Config(
        model=ModelConfig(name="cvt_nano", **{**TINY, "num_classes": None}, image_size=32),
        data=DataConfig(source="digits"),
        augment=AugmentConfig(crop="pad", hflip=0.0),
        training=TrainingConfig(epochs=2, batch_size=500),
        evaluation=EvaluationConfig(batch_size=500),
    )
    source = open_source("digits", None, "train")
    return Trainer(resolve_classes(config, source), source, tmp_path)


def test_nothing_waits_for_the_device_between_steps(trainer, monkeypatch):
    """A value fetched to the host stops an accelerator's queue: only the first step, whose
    compiling is not timed, and the end of an epoch may.
    """
    events = []
    trainer.step = Watched(trainer.step, events)
    fetch = ms.Tensor.asnumpy

    def watched_fetch(tensor):
        events.append("fetch")
        return fetch(tensor)

    for name in ("asnumpy", "item", "tolist"):
        monkeypatch.setattr(ms.Tensor, name, watched_fetch)
    for epoch in range(2):
        events.clear()
        trainer.progress = Progress(epoch=epoch)
        trainer._train_epoch()
        assert events.count("step") == trainer.steps_per_epoch == 8
        first, last = events.index("step"), len(events) - events[::-1].index("step")
        between = events[first:last]
        assert between == ["step", *["fetch"] * (epoch == 0), *["step"] * 7]
        assert "fetch" in events[last:], "the epoch's losses are read at its end"


def test_images_that_do_not_fill_a_step_are_counted(trainer, caplog):
    caplog.set_level("INFO", "cvt")
    trainer._log_start()
    assert "leaves out" not in caplog.text
    trainer.source = trainer.source.subset(np.arange(4001) % 4000)
    trainer._log_start()
    assert "each epoch leaves out images (1) that do not fill a step of 500" in caplog.text


def test_a_step_that_compiles_has_no_speed(trainer):
    """The only one of an epoch; 0 images per second would be wrong."""
    trainer.step = Watched(trainer.step, [])
    trainer.progress = Progress(position=7)
    assert trainer._train_epoch() is None
    trainer.progress = Progress(epoch=1, position=7)
    assert trainer._train_epoch() > 0


def test_an_epoch_counts_the_seconds_before_an_interruption(trainer, monkeypatch):
    """A state saved within the epoch keeps them; the speed is that of this process."""
    saved = []
    monkeypatch.setattr(
        loop, "save_state", lambda step, progress, *_: saved.append(progress.seconds)
    )
    monkeypatch.setattr(trainer, "_evaluate", lambda: {"loss": None, "top1": None, "top5": None})
    monkeypatch.setattr(trainer, "_write_metrics", lambda: None)
    trainer.step = Watched(trainer.step, [])
    trainer.config.training.save_every = trainer.steps_per_epoch
    trainer.progress = Progress(position=6, seconds=10_000.0)
    trainer.fit()
    first, second = trainer.progress.rows
    assert 10_000 < saved[0] < first["seconds"] < 11_000
    assert first["images_per_second"] > 1 and second["seconds"] < 1000
    assert saved[1] == saved[3] == trainer.progress.seconds == 0 < saved[2] < 1000
