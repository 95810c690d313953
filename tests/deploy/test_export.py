"""The check after an export, and what is refused."""

import mindspore as ms
import numpy as np
import pytest

from src.command_line import load_config
from src.deploy import export as room
from src.errors import UserError


@pytest.fixture
def run(trained):
    return load_config(trained / "config.yaml"), trained / "checkpoints/best.ckpt"


def test_a_file_whose_logits_differ_is_not_kept(run, tmp_path, monkeypatch):
    """Another network is written in place of the checkpoint's."""
    config, checkpoint = run
    real = ms.export

    def fault(net, example, **options):
        net.head.bias.set_data(net.head.bias + 1e-3)
        real(net, example, **options)
        net.head.bias.set_data(net.head.bias - 1e-3)

    monkeypatch.setattr(ms, "export", fault)
    with pytest.raises(UserError, match="differ by 1.0e-03"):
        room.export(config, checkpoint, tmp_path / "m.mindir", "mindir", 1, "CPU")
    assert not list(tmp_path.iterdir())


def test_without_the_data_noise_is_compared(run, tmp_path, caplog):
    config, checkpoint = run
    config.data.source, config.data.path = "imagefolder", str(tmp_path / "gone")
    with caplog.at_level("INFO", logger="cvt"):
        room.export(config, checkpoint, tmp_path / "m.mindir", "mindir", 1, "CPU")
    assert "compared on noise" in caplog.text and "checked on 16 images" in caplog.text


def test_air_is_refused_off_ascend(run, tmp_path):
    with pytest.raises(UserError, match="run this command on a host with an Ascend card"):
        room.export(*run, tmp_path / "m.air", "air", 1, "CPU")


def test_air_on_ascend_calls_the_backend(run, tmp_path, monkeypatch):
    """With a stand-in for the export function, which only works there."""
    calls = {}

    def stand_in(net, example, file_name, file_format):
        calls.update(shape=example.shape, format=file_format)
        with open(file_name, "wb") as file:
            file.write(b"air")

    monkeypatch.setattr(ms, "export", stand_in)
    room.export(*run, tmp_path / "m.air", "air", 2, "Ascend")
    assert calls == {"shape": (2, 3, 32, 32), "format": "AIR"}
    assert (tmp_path / "m.air").read_bytes() == b"air"


def test_the_comparison_sees_every_image(run):
    """A graph that is wrong for the last image only, in a batch that is filled up."""
    config, checkpoint = run
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32)).astype(np.float32)
    images[4] += 10

    def net(batch):
        return ms.Tensor(batch.asnumpy().mean((1, 2, 3))[:, None].repeat(3, 1))

    def wrong(batch):
        values = net(batch).asnumpy()
        return ms.Tensor(np.where(values > 5, values + 1, values))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ms, "load", lambda path: None)
        patch.setattr(ms.nn, "GraphCell", lambda graph: wrong)
        with pytest.raises(UserError, match="differ by 1.0e"):
            room._check(net, "x", images, 2)
        room._check(net, "x", images[:4], 2)


def test_a_network_that_is_written_in_parts_is_refused(run, tmp_path, monkeypatch):
    """As MindSpore does above 1 GiB of parameters."""

    def in_parts(net, example, file_name, file_format):
        with open(file_name.replace(".mindir", "_graph.mindir"), "wb") as file:
            file.write(b"part")

    monkeypatch.setattr(ms, "export", in_parts)
    with pytest.raises(UserError, match="1 GiB"):
        room.export(*run, tmp_path / "m.mindir", "mindir", 1, "CPU")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another --output"):
        room.export(*run, tmp_path / "file" / "m.mindir", "mindir", 1, "CPU")
