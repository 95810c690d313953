"""Every image counts once, whatever the batch size."""

import threading

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from src.data import Preprocessing
from src.data.base import Source
from src.distributed import Ranks
from src.evaluation.evaluator import Evaluator
from src.models import create_model
from tests.conftest import TINY

# Each batch size would be a graph of its own.
pytestmark = pytest.mark.usefixtures("pynative_mode")

PREPROCESSING = Preprocessing((32, 32), None, (0.5,) * 3, (0.3,) * 3)


class Noise(Source):
    """Random images; counts how often each was read."""

    encoded = False

    def __init__(self, count):
        rng = np.random.default_rng(0)
        super().__init__(rng.integers(0, 10, count).astype(np.int32), list("0123456789"), "noise")
        self.images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.reads = np.zeros(count, int)

    def read(self, item):
        self.reads[item] += 1
        return self.images[item]


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
    source = Noise(12)
    figures = Evaluator(source, PREPROCESSING, 5).run(net).to_dict()
    logits = [net(ms.Tensor(PREPROCESSING(image)[None])).asnumpy()[0] for image in source.images]
    right = sum(int(np.argmax(row)) == label for row, label in zip(logits, source.labels))
    assert figures["top1"] == pytest.approx(100 * right / 12)


class Threads:
    """Ranks of one process, whose `gather` waits for all of them."""

    def __init__(self, world):
        self.world = world
        self.given = [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def rank(self, rank):
        outer = self

        class Rank(Ranks):
            def gather(self, values):
                outer.given[rank] = np.asarray(values, np.float64).reshape(-1)
                outer.barrier.wait()
                gathered = np.stack(outer.given)
                outer.barrier.wait()
                return gathered

        return Rank(rank, self.world)


@pytest.mark.parametrize("world, count", [(1, 5), (3, 10), (2, 1)])
def test_outcomes_come_in_the_order_of_the_split_from_any_number_of_ranks(world, count):
    """The network tells each image's number; the label lists say which are right."""

    class Numbered(Noise):
        def __init__(self):
            super().__init__(count)
            self.images[:] = np.arange(count)[:, None, None, None] * 20

    class Teller(nn.Cell):
        def construct(self, images):
            number = (images[:, :1, 0, 0] * 0.3 + 0.5) * 255 / 20
            return -ops.abs(number - Tensor(np.arange(10)[None], ms.float32))

    lists = [[k, (k + 1) % 10] if k % 3 else [(k + 7) % 10] for k in range(count)]
    ranks, results = Threads(world), [None] * world
    evaluators = [
        Evaluator(Numbered(), PREPROCESSING, 2, 1, ranks.rank(r), lists, keep_outcomes=True)
        for r in range(world)
    ]

    def run(r):
        ms.set_context(mode=ms.PYNATIVE_MODE)
        results[r] = evaluators[r].run(Teller())

    threads = [threading.Thread(target=run, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result.outcomes.prediction.tolist() == list(range(count))
        assert result.outcomes.correct1.tolist() == [float(k % 3 > 0) for k in range(count)]
        assert result.metrics.images == count
        assert result.metrics.correct1 == sum(k % 3 > 0 for k in range(count))


def test_outcomes_are_kept_only_when_asked_for(net):
    assert Evaluator(Noise(5), PREPROCESSING, 5).run(net).outcomes is None
