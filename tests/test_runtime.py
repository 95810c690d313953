"""Device, seeds, environment and logging."""

import logging
import os

import mindspore as ms
import numpy as np
import pytest

from src.config import RuntimeConfig
from src.errors import UserError
from src.runtime import log_to, prepare_environment, setup


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


def test_the_seed_decides_the_initial_weights():
    def draw(seed):
        setup(RuntimeConfig(seed=seed))
        return ms.nn.Dense(4, 4, weight_init="normal").weight.asnumpy(), np.random.random()

    first, again, other = draw(1), draw(1), draw(2)
    assert np.array_equal(first[0], again[0]) and first[1] == again[1]
    assert not np.array_equal(first[0], other[0]) and first[1] != other[1]


def test_the_environment_of_the_user_stays(monkeypatch):
    monkeypatch.setenv("GLOG_v", "1")
    monkeypatch.delenv("MS_OM_PATH")
    prepare_environment()
    assert os.environ["GLOG_v"] == "1"
    assert os.path.isabs(os.environ["MS_OM_PATH"])


def test_the_log_goes_to_the_console_and_a_file(tmp_path, capsys):
    logger = logging.getLogger("cvt")
    log_to(tmp_path / "log.txt")
    logger.info("first")
    log_to()
    logger.info("second")
    assert capsys.readouterr().out == "first\nsecond\n"
    line = (tmp_path / "log.txt").read_text()
    assert line.endswith(" INFO first\n") and "second" not in line
