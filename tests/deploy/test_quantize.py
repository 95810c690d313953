"""int8 files: what is in them, their accuracy, and what is refused."""

import logging
import re
import shutil
import sys

import numpy as np
import pytest

import export as command
from src.build import build_preprocessing
from src.config import DataConfig
from src.config_io import load_config
from src.data import create_eval_loader
from src.data.samples import write_samples
from src.deploy import quantize as quantization
from src.deploy.description import read_description
from src.deploy.engines import open_model
from src.deploy.predictor import Predictor
from src.errors import UserError
from src.splits import open_split


def export(monkeypatch, trained, *words):
    """Run the executable in this process."""
    checkpoint = trained / "checkpoints/best.ckpt"
    words = [f"--ckpt={checkpoint}", "--runtime.mode=pynative", "--quantize=int8", *words]
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    command.main()


def test_a_failure_of_onnxruntime_is_one_line(tmp_path, monkeypatch):
    """On a full disk it reads the model that it has written in part."""
    ort = pytest.importorskip("onnxruntime.quantization")

    class DecodeError(Exception):
        pass

    def fail(*arguments, **options):
        raise DecodeError("Truncated\nmessage.")

    monkeypatch.setattr(ort, "quantize_static", fail)
    monkeypatch.setattr(quantization, "_weighted_nodes", lambda path: [])
    for disabled in (logging.NOTSET, logging.CRITICAL):  # by the caller
        logging.disable(disabled)
        with pytest.raises(UserError, match=r"failed \(Truncated message.\); is there space"):
            quantization._quantize_file(tmp_path / "a.onnx", tmp_path / "b.onnx", iter(()))
        now, _ = logging.root.manager.disable, logging.disable(logging.NOTSET)
        assert now == disabled


def test_int8_keeps_the_accuracy(trained, tmp_path, monkeypatch):
    import onnx  # behind MindSpore, which breaks when it finds protobuf loaded

    output = tmp_path / "float32.onnx"
    handlers = list(logging.root.handlers)
    export(monkeypatch, trained, "--format=onnx", "--batch_size=dynamic", f"--output={output}")
    assert logging.root.handlers == handlers, "lines would be printed twice"
    said = read_description(output)["quantization"]
    assert (said["type"], said["calibration_images"], said["images"]) == ("int8", 256, 1000)

    graph = onnx.load(output).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    from_integers = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    linears = [n for n in graph.node if n.name.endswith(("fc1/MatMul", "proj_q/MatMul", "/Conv"))]
    assert len(linears) >= 12
    for node in linears:
        assert kinds[from_integers[node.input[1]]] == onnx.TensorProto.INT8, node.name
    assert open_model(output).engine == "onnxruntime", "OpenVINO would refuse it"

    config = load_config(trained / "config.yaml")
    source = open_split(config, "val")
    batches = create_eval_loader(
        source, build_preprocessing(config).operations(source.encoded), 250
    )
    right = {"checkpoint": 0, "int8": 0}
    runs = {"checkpoint": Predictor(trained / "checkpoints/best.ckpt").logits,
            "int8": Predictor(output).logits}  # fmt: skip
    for images, labels in batches.iterate(output_numpy=True):
        for name, run in runs.items():
            right[name] += int((np.asarray(run(images)).argmax(1) == labels).sum())
    assert said["top1_float32"] == pytest.approx(right["checkpoint"] / 10, abs=0.2)
    assert said["top1_int8"] == pytest.approx(right["int8"] / 10, abs=0.2)
    assert abs(right["int8"] - right["checkpoint"]) <= 15, "of 1,000"


def write_digits(folder) -> None:
    """Two images of each digit in folders for both splits; the last one is broken."""
    for split in ("train", "val"):
        for path in write_samples(folder / split):
            place = folder / split / path.stem[-1]
            place.mkdir()
            shutil.copy(path, place / "again.png")
            path.rename(place / path.name)
    (place / "again.png").write_bytes(b"broken")


def test_images_that_training_left_out_are_left_out(trained, tmp_path, monkeypatch, caplog):
    write_digits(tmp_path)
    output = tmp_path / "m.onnx"
    words = [f"--data.path={tmp_path}", "--data.source=imagefolder"]
    export(monkeypatch, trained, "--format=onnx", *words, f"--output={output}")
    said = read_description(output)["quantization"]
    assert (said["calibration_images"], said["images"]) == (20, 19)
    assert "left out: 1 of 20 images" in caplog.text and "val/9/again.png" in caplog.text


def test_a_sample_may_lose_a_class(trained, tmp_path, monkeypatch, caplog):
    """Half of the images are sampled, the first of each class; that of "4" is broken."""
    write_digits(tmp_path)
    (tmp_path / "train/4/again.png").write_bytes(b"broken")
    monkeypatch.setattr(quantization, "CALIBRATION_IMAGES", 10)
    output = tmp_path / "m.onnx"
    words = [f"--data.path={tmp_path}", "--data.source=imagefolder"]
    export(monkeypatch, trained, "--format=onnx", *words, f"--output={output}")
    assert read_description(output)["quantization"]["calibration_images"] == 9
    assert "left out: 1 of 10 images" in caplog.text and "train/4/again.png" in caplog.text


def test_labels_that_are_not_the_networks_outputs_are_refused(trained, tmp_path):
    """eval.py refuses them, too: the folders number ten classes, the network has a thousand."""
    write_digits(tmp_path)
    config = load_config(trained / "config.yaml")
    config.model.num_classes = 1000
    config.data = DataConfig(path=str(tmp_path), workers=1)
    arguments = tmp_path / "m.onnx", tmp_path / "q.onnx", config, build_preprocessing(config), 1
    with pytest.raises(UserError, match="--quantize int8: .*num_classes 1000: .* has 10 classes"):
        quantization.quantize(*arguments)
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--format=mindir"], "add --format onnx"),
        (["--format=onnx", "--precision=float16"], "leave out float16"),
        (["--format=onnx", "--data.source=imagefolder", "--data.path=nowhere",
          "--model.num_classes=10"], "for comparison: .*nowhere"),
    ],
)  # fmt: skip
def test_what_can_not_be_quantized_is_refused(
    trained, tmp_path, monkeypatch, capsys, words, complaint
):
    output = tmp_path / f"m.{words[0].partition('=')[2]}"
    with pytest.raises(SystemExit, match="2"):
        export(monkeypatch, trained, *words, f"--output={output}")
    (*_, line) = capsys.readouterr().err.splitlines()

    assert re.search(complaint, line)
    assert not any(tmp_path.iterdir())
