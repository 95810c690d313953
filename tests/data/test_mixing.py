"""The numbers of mixup and cutmix against their definitions."""

import numpy as np
import pytest

from src.data import Mixing


def draws(mixing, count=4000, size=(32, 48)):
    return np.stack([mixing.draw(size, 7, 0, i) for i in range(count)])


def test_mixup_shares_are_beta_distributed_and_leave_no_box():
    rows = draws(Mixing(mixup=0.8))
    assert np.array_equal(rows[:, 0], rows[:, 1]) and not rows[:, 2:].any()
    assert rows[:, 0].mean() == pytest.approx(0.5, abs=0.02)
    assert rows[:, 0].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.05)  # Beta(.8, .8)


def test_a_cutmix_label_weighs_what_its_pixels_cover():
    size = (32, 48)
    rows = draws(Mixing(cutmix=1.0), size=size)
    top, bottom, left, right = rows[:, 2:].T
    assert (rows[:, 1] == 1).all()
    assert (top >= 0).all() and (bottom <= 32).all() and (left >= 0).all() and (right <= 48).all()
    covered = (bottom - top) * (right - left) / (32 * 48)
    np.testing.assert_allclose(rows[:, 0], 1 - covered, atol=1e-6)
    whole = (top > 0) & (bottom < 32) & (left > 0) & (right < 48)  # not cut at a border
    ratio = (bottom - top)[whole] / np.maximum((right - left)[whole], 1)
    big = (bottom - top)[whole] > 10
    assert np.abs(ratio[big] - 32 / 48).max() < 0.1, "the box has the image's shape"
    assert 0.5 < covered.mean() * 4 < 1.5


def test_one_of_both_is_taken_for_each_batch():
    rows = draws(Mixing(mixup=0.8, cutmix=1.0, prob=0.7, switch_prob=0.25))
    plain = (rows[:, :2] == 1).all(1) & ~rows[:, 2:].any(1)
    cut = (rows[:, 1] == 1) & ~plain
    assert plain.mean() == pytest.approx(0.3, abs=0.03)
    # A box of no pixel counts as plain here; they are rare.
    assert cut.mean() == pytest.approx(0.7 * 0.25, abs=0.02)


def test_a_draw_follows_from_its_key_alone():
    mixing = Mixing(mixup=0.8, cutmix=1.0)
    assert np.array_equal(mixing.draw((9, 9), 1, 2, 3, 0), mixing.draw((9, 9), 1, 2, 3, 0))
    others = [(2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1)]
    assert all(
        not np.array_equal(mixing.draw((9, 9), 1, 2, 3, 0), mixing.draw((9, 9), *key))
        for key in others
    )
    assert not Mixing() and not Mixing(mixup=1, prob=0) and mixing
