"""Every image counts once, whatever the batch size."""

import numpy as np
import pytest

from src.data import Preprocessing
from src.data.base import Source
from src.evaluation.evaluator import Evaluator
from src.models import create_model
from tests.conftest import TINY

PREPROCESSING = Preprocessing((32, 32), None, (0.5,) * 3, (0.3,) * 3)


class Noise(Source):
    """Random images; counts how often each was read."""

    encoded = False

    def __init__(self, count):
        rng = np.random.default_rng(0)
        super().__init__(rng.integers(0, 10, count).astype(np.int32), list("0123456789"), "noise")
        self.images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.reads = np.zeros(count, int)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.images[index], self.labels[index]


@pytest.fixture(scope="module")
def net():
    return create_model("cvt_nano", **TINY)


def test_figures_do_not_depend_on_the_batch_size(net):
    results = []
    for batch_size in (7, 64, 500):
        source = Noise(101)
        results.append(Evaluator(source, PREPROCESSING, batch_size).run(net).to_dict())
        assert (source.reads == 1).all()
    for result in results:
        assert result["images"] == 101
        assert result["top1"] == results[0]["top1"] and result["top5"] == results[0]["top5"]
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


def test_figures_equal_single_images(net):
    """Against one image at a time, prepared by calling the preprocessing directly."""
    import mindspore as ms

    source = Noise(12)
    figures = Evaluator(source, PREPROCESSING, 5).run(net).to_dict()
    logits = [net(ms.Tensor(PREPROCESSING(image)[None])).asnumpy()[0] for image in source.images]
    right = sum(int(np.argmax(row)) == label for row, label in zip(logits, source.labels))
    assert figures["top1"] == pytest.approx(100 * right / 12)
