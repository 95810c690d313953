"""The graphs of training and evaluation as MindSpore's front end leaves them for a device.

A process of its own compiles each, because what MindSpore dumps is settled when it is imported:
`python -m tests.ascend.graphs training-adamw`. To audit a further set-up, add a line to GRAPHS.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# cvt_13's structure (patch embeddings, class token, head) with few channels, two blocks in stage 3.
SIZES = {"embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "depths": (1, 1, 2), "num_classes": 9}
BATCH, IMAGE = 2, 64


def _inputs():
    import mindspore as ms
    import numpy as np

    images = ms.Tensor(np.zeros((BATCH, 3, IMAGE, IMAGE), np.float32))
    return images, ms.Tensor(np.zeros(BATCH, np.int32))


def _training(optimizer: str, flash_attention: bool = False, **options) -> None:
    import numpy as np

    from src.models import create_model
    from src.models.attention import use_flash_attention
    from src.recipe import set_precision
    from src.training import optimizer as optimizers
    from src.training.loss import LabelSmoothingCrossEntropy
    from src.training.train_step import TrainStep

    net = create_model("cvt_13", **SIZES, drop_path_rate=0.1, drop_rate=0.1)
    if flash_attention:
        use_flash_attention(set_precision(net, "float16"))
    ema_net = create_model("cvt_13", **SIZES)
    ema_net.update_parameters_name("ema.")
    update = getattr(optimizers, optimizer)(net.trainable_params(), weight_decay=0.05)
    rates = np.full(10, 1e-3, np.float32)
    options = {"clip_norm": 1.0, "ema_net": ema_net, "ema_decay": 0.99, **options}
    step = TrainStep(net, LabelSmoothingCrossEntropy(0.1), update, rates, **options)
    step.set_train(True)
    ema_net.set_train(False)
    missing = contextlib.suppress(RuntimeError) if flash_attention else contextlib.nullcontext()
    with missing:  # the CPU has no such kernel, which shows only behind the graph that is read
        step.compile(*_inputs())


def _evaluation() -> None:
    from src.models import create_model

    create_model("cvt_13", **SIZES).set_train(False).compile(_inputs()[0])


def _faulty() -> None:
    """What the audit must find: an operator without Ascend support, and a dynamic shape."""
    import mindspore as ms
    from mindspore import nn, ops

    class Faulty(nn.Cell):
        def construct(self, x):
            return ops.Fmax()(x, x)

    net = Faulty()
    x = ms.Tensor(shape=(None, 3), dtype=ms.float32)
    net.set_inputs(x)
    net.compile(x)


GRAPHS: dict[str, Callable[[], None]] = {
    "training-adamw": lambda: _training("AdamW"),
    "training-sgd-float16-flash": lambda: _training("SGD", flash_attention=True, loss_scale=1024.0),
    "evaluation": _evaluation,
}


@dataclass
class Graph:
    """What a graph is made of.

    Args:
        primitives: how often each occurs.
        dynamic: lines of the dump with a dimension or rank that is not known.
    """

    primitives: Counter
    dynamic: list[str]


def read_graph(text: str) -> Graph:
    """Read MindSpore's dump of a graph."""
    calls = re.findall(r"^  (?:%\d+\([^)]*\) = )?(?:PrimFunc_)?(\w+)\(", text, re.M)
    shapes = re.findall(r"^      : .*$", text, re.M)
    dynamic = [line for line in shapes if re.search(r"\((?:[\d\-]+, )*-[12](?:, [\d\-]+)*\)", line)]
    return Graph(Counter(calls), dynamic)


def compile_graph(name: str) -> Graph:
    """Compile one of `GRAPHS` for the CPU and read the graph that the front end made.

    The CPU's back end and its kernels come after that, so what is read holds for any device, as
    far as the front end does not look at the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "MS_DEV_SAVE_GRAPHS": "1",
            "MS_DEV_SAVE_GRAPHS_PATH": folder,
            "MS_DEV_DUMP_IR_PASSES": "validate",
        }
        command = [sys.executable, "-m", "tests.ascend.graphs", name]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        dumps = list(Path(folder).rglob("*_validate_*.ir"))
        if len(dumps) != 1:
            raise RuntimeError(f"{name}: {len(dumps)} dumps of its graph\n{done.stderr}")
        return read_graph(dumps[0].read_text())


def main() -> None:
    """Compile the graph that the command line names."""
    from src.runtime import prepare_environment

    prepare_environment()
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    {**GRAPHS, "faulty": _faulty}[sys.argv[1]]()


if __name__ == "__main__":
    main()
