"""The peers hf_onnxruntime and hf_openvino: transformers' CvT, exported by PyTorch as ONNX.

Runs in the interpreter that has transformers, PyTorch, onnx and the engine; see
docs/performance.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from hf import build  # beside this script

from tools.benchmark.protocol import Work, serve

OPSET = 17  # has LayerNormalization as one node, the fastest in both engines


def make(job: dict) -> Work:
    """Export the network and open it in the engine in the peer's name."""
    torch.manual_seed(0)
    net = build(job["sizes"], job["num_classes"])
    parameters = sum(p.numel() for p in net.parameters())
    shape = (job["batch_size"], job["sizes"]["in_channels"], *job["image_size"])
    images = torch.randn(*shape)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hf.onnx"
        torch.onnx.export(
            _Logits(net).eval(), (images,), str(file), opset_version=OPSET, dynamo=False
        )
        engine = job["peer"].removeprefix("hf_")
        run, version = ENGINES[engine](str(file), job["threads"])
    array = images.numpy()
    with torch.inference_mode():
        expected = net(images).logits.numpy()
    difference = np.abs(run(array) - expected).max() / np.abs(expected).max()
    if difference > 1e-4:
        raise RuntimeError(f"the export's logits differ by {difference:.1e} from PyTorch's")
    return Work(lambda: len(run(array)), f"{engine} {version}", {"parameters": parameters})


class _Logits(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images).logits


def onnxruntime(file: str, threads: int):
    """Return a function from images to logits, and the engine's version."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0], onnxruntime.__version__


def openvino(file: str, threads: int):
    """Return a function from images to logits, and the engine's version."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    version = openvino.__version__.split("-")[0]
    return lambda images: request.infer({0: images})[0].copy(), version


ENGINES = {"onnxruntime": onnxruntime, "openvino": openvino}


if __name__ == "__main__":
    serve(make)
