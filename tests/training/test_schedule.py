"""Learning rates against the official recipe's values."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from src.config import Config
from src.training.schedule import learning_rates
from src.training.setup import _learning_rates

RECIPE = {"peak": 2e-3, "warmup_start": 1e-6, "minimum": 1e-5, "epochs": 300, "warmup_epochs": 5}


def test_per_epoch_as_the_official_recipe():
    rates = learning_rates(**RECIPE, steps_per_epoch=7, per="epoch").reshape(300, 7)
    assert rates.dtype == np.float32
    assert (rates == rates[:, :1]).all(), "one rate an epoch"
    for epoch in (0, 1, 4):
        expected = 1e-6 + (2e-3 - 1e-6) * epoch / 5
        assert rates[epoch, 0] == pytest.approx(expected, rel=1e-6)
    for epoch in (5, 150, 299):
        expected = 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300)) / 2
        assert rates[epoch, 0] == pytest.approx(expected, rel=1e-6)


def test_per_step_is_smooth_and_never_above_the_peak():
    rates = learning_rates(**RECIPE, steps_per_epoch=7, per="step")
    assert rates.argmax() in (34, 35) and rates.max() <= 2e-3
    assert (np.diff(rates[:34]) > 0).all() and (np.diff(rates[35:]) < 0).all()
    assert rates[-1] == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"training": {"epochs": 5}, "optimizer": {"warmup_epochs": 5}}, "never reaches 1.000e-03"),
        ({"optimizer": {"lr": 1e-6, "min_lr": 1e-5}}, "min_lr 1.000e-05 is above"),
        ({}, ""),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_noted(keys, words):
    config = Config()
    config.optimizer.lr, config.optimizer.lr_batch_size = 1e-3, None
    for group, values in keys.items():
        for key, value in values.items():
            setattr(getattr(config, group), key, value)
    notes = []
    _learning_rates(config, SimpleNamespace(images_per_step=8, steps_per_epoch=2), notes)
    assert words in "".join(notes) and bool(words) == bool(notes)


def test_without_warm_up_it_starts_at_the_peak():
    rates = learning_rates(**{**RECIPE, "warmup_epochs": 0}, steps_per_epoch=2)
    assert rates[0] == np.float32(2e-3)


def test_decay_epochs_keep_the_peak_until_the_last_epochs():
    rates = learning_rates(**RECIPE, steps_per_epoch=7, per="epoch", decay_epochs=40)
    rates = rates.reshape(300, 7)[:, 0]
    assert (rates[5:261] == np.float32(2e-3)).all() and (np.diff(rates[260:]) < 0).all()
    expected = 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * 30 / 40)) / 2
    assert rates[290] == pytest.approx(expected, rel=1e-6)


def test_no_decay_epochs_keep_the_peak_to_the_end():
    rates = learning_rates(**RECIPE, steps_per_epoch=7, per="step", decay_epochs=0)
    assert (rates[5 * 7 :] == np.float32(2e-3)).all()


def test_more_epochs_change_no_rate_before_the_decay():
    short = learning_rates(**RECIPE, steps_per_epoch=7, per="step", decay_epochs=40)
    longer = {**RECIPE, "epochs": 400}
    longer = learning_rates(**longer, steps_per_epoch=7, per="step", decay_epochs=40)
    np.testing.assert_array_equal(short[: 260 * 7], longer[: 260 * 7])


def test_a_decay_longer_than_the_run_is_the_usual_cosine():
    rates = learning_rates(**RECIPE, steps_per_epoch=2, decay_epochs=1000)
    np.testing.assert_array_equal(rates, learning_rates(**RECIPE, steps_per_epoch=2))
