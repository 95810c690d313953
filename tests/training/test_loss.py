"""The loss against its definition."""

import mindspore as ms
import numpy as np
import pytest

from src.training.loss import LabelSmoothingCrossEntropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_loss_is_the_cross_entropy_with_smoothed_targets(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((6, 5)) * 4, rng.integers(0, 5, 6)
    targets = np.eye(5)[labels] * (1 - smoothing) + smoothing / 5
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(targets * log_probs).sum(1).mean()
    loss = LabelSmoothingCrossEntropy(smoothing)
    found = loss(ms.Tensor(logits, ms.float32), ms.Tensor(labels, ms.int32))
    assert float(found.asnumpy()) == pytest.approx(expected, rel=1e-6)
    assert found.dtype == ms.float32


def test_float16_logits_do_not_overflow():
    logits = ms.Tensor(np.array([[60000.0, 0.0]]), ms.float16)
    found = LabelSmoothingCrossEntropy(0.1)(logits, ms.Tensor([1], ms.int32))
    assert float(found.asnumpy()) == pytest.approx(60000 * 0.95, rel=1e-3)
