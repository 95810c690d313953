"""Sums against a plain count."""

import numpy as np
import pytest

from src.errors import UserError
from src.evaluation.metrics import Metrics, score_batch


def test_batches_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((103, 12)).astype(np.float32), rng.integers(0, 12, 103)
    metrics = Metrics()
    for start in range(0, 103, 10):
        metrics.update(logits[start : start + 10], labels[start : start + 10])
    order = [sorted(range(12), key=lambda k: -row[k]) for row in logits]
    assert metrics.images == 103
    assert metrics.top1 == 100 * sum(o[0] == y for o, y in zip(order, labels)) / 103
    assert metrics.top5 == 100 * sum(y in o[:5] for o, y in zip(order, labels)) / 103
    wide = logits.astype(np.float64)
    probabilities = np.exp(wide) / np.exp(wide).sum(1, keepdims=True)
    expected = -np.log(probabilities[np.arange(103), labels]).mean()
    assert metrics.loss == pytest.approx(expected, rel=1e-9)


def test_fewer_than_five_classes():
    metrics = Metrics()
    metrics.update(np.array([[1.0, 2.0, 0.0]]), np.array([2]))
    assert (metrics.top1, metrics.top5) == (0.0, 100.0)


def test_equal_logits_are_not_taken_for_right():
    metrics = Metrics()
    metrics.update(np.zeros((10, 10)), np.arange(10))
    assert metrics.correct1 == 1 and metrics.correct5 == 5


def test_logits_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="not finite"):
        Metrics().update(np.array([[np.nan, 1.0]]), np.array([0]))


def test_several_right_classes():
    """Against a plain count, as timm's RealLabelsImagenet; a list of one is a label."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((60, 12))
    lists = [rng.choice(12, rng.integers(1, 4), replace=False).tolist() for _ in range(60)]
    outcomes = score_batch(logits, lists)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for k, (row, right) in enumerate(zip(probabilities, lists)):
        best = sorted(range(12), key=lambda label: -row[label])[:5]
        assert outcomes.prediction[k] == best[0] and outcomes.correct1[k] == (best[0] in right)
        assert outcomes.correct5[k] == any(label in right for label in best)
        assert outcomes.confidence[k] == pytest.approx(row.max())
        assert outcomes.loss[k] == pytest.approx(-np.log(row[right].sum()))
    labels = rng.integers(0, 12, 60)
    for several, one in zip(
        score_batch(logits, labels[:, None].tolist()), score_batch(logits, labels)
    ):
        np.testing.assert_allclose(several, one, rtol=1e-12)
    doubled = score_batch(logits, [[*right, right[0]] for right in lists])
    np.testing.assert_array_equal(doubled.loss, outcomes.loss)
