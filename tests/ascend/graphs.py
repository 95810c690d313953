"""The graphs of training and evaluation as MindSpore's front end leaves them for a device.

Processes of their own compile them, because what MindSpore dumps is settled when it is imported.
To audit a further set-up, add a line to GRAPHS and its name to GROUPS.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# cvt_13's structure (patch embeddings, class token, head) with few channels, two blocks in stage 3.
SIZES = {"embed_dims": (16, 32, 64), "num_heads": (1, 2, 4), "depths": (1, 1, 2), "num_classes": 9}
BATCH, IMAGE = 2, 64
DROP_RATE = 0.1


def _inputs():
    import mindspore as ms
    import numpy as np

    images = ms.Tensor(np.zeros((BATCH, 3, IMAGE, IMAGE), np.float32))
    return images, ms.Tensor(np.zeros(BATCH, np.int32))


def _training(
    optimizer: str, flash_attention: bool = False, part: str = "", drop_rate: float = 0.0, **options
) -> None:
    import mindspore as ms
    import numpy as np

    from src.build import set_precision
    from src.models import create_model
    from src.models.attention import use_flash_attention
    from src.training import optimizer as optimizers
    from src.training.loss import LabelSmoothingCrossEntropy
    from src.training.preprocess import Preprocess
    from src.training.train_step import TrainStep

    net = create_model("cvt_13", **SIZES, drop_path_rate=0.1, drop_rate=drop_rate)
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
    images, labels = _inputs()
    mix = boxes = None
    if step.mixing:  # the whole ImageNet recipe: bytes, erased boxes, mixing
        mix, boxes = ms.Tensor(np.ones(6, np.float32)), ms.Tensor(np.ones((BATCH, 4), np.int32))
        images = images.transpose((0, 2, 3, 1)).astype(ms.uint8)
        step.preprocess = Preprocess((IMAGE, IMAGE), (0.5,) * 3, (0.5,) * 3, erasing=True)
    if part == "add":
        step.parts.add.compile(images, labels, mix, ms.Tensor(0, ms.int32), boxes)
    elif part == "update":
        step.parts.update.compile()
    else:
        step.compile(images, labels, mix, boxes)


def _evaluation() -> None:
    from src.models import create_model

    create_model("cvt_13", **SIZES).set_train(False).compile(_inputs()[0])


def _faulty() -> None:
    """What the audit must find: an operator without support, a dynamic shape, a negative stride."""
    import mindspore as ms
    from mindspore import nn, ops

    class Faulty(nn.Cell):
        def construct(self, x):
            return ops.Fmax()(x, x[::-1])

    net = Faulty()
    x = ms.Tensor(shape=(None, 3), dtype=ms.float32)
    net.set_inputs(x)
    net.compile(x)


GRAPHS: dict[str, Callable[[], None]] = {
    "training-adamw": lambda: _training("AdamW"),
    "training-mixed-two-ranks": lambda: _training(
        "AdamW", loss_scale=None, mixing=True, rank=1, world=2
    ),
    "training-parts": lambda: _training("SGD", accumulate=2, part="add"),
    "training-parts-update": lambda: _training("SGD", accumulate=2, part="update"),
    # Dropout takes as long to compile as all the rest of the network, so one graph has it.
    "training-sgd-float16-flash": lambda: _training(
        "SGD", flash_attention=True, drop_rate=DROP_RATE, loss_scale=1024.0
    ),
    "evaluation": _evaluation,
}
# One process compiles each group: starting MindSpore takes as long as a small graph. The first
# group has what tests/tools/benchmark/test_estimate.py reads; the groups take about the same time.
GROUPS = (
    ("training-adamw", "training-sgd-float16-flash"),
    ("training-mixed-two-ranks", "training-parts", "training-parts-update", "evaluation", "faulty"),
)


@dataclass
class Node:
    """A call in a graph: primitive, arguments, its output's type, whether of the backward pass.

    `values` has the integers in each of its constant tuples.
    """

    primitive: str
    arguments: list[str]
    values: list[list[int]] = field(default_factory=list)
    output: str = ""
    backward: bool = False


@dataclass
class Graph:
    """What a graph is made of: its calls by their number in the dump."""

    nodes: dict[str, Node]

    @property
    def primitives(self) -> Counter:
        """How often each primitive occurs."""
        return Counter(node.primitive for node in self.nodes.values())

    @property
    def dynamic(self) -> list[Node]:
        """Calls whose output has a dimension or a rank that is not known."""
        unknown = re.compile(r"\((?:[\d\-]+, )*-[12](?:, [\d\-]+)*\)")
        return [node for node in self.nodes.values() if unknown.search(node.output)]

    @property
    def negative_strides(self) -> list[Node]:
        """Strided slices that run backwards, which Ascend's kernels refuse or copy on the host."""
        return [
            node
            for node in self.nodes.values()
            if node.primitive.startswith("StridedSlice") and min(node.values[-1], default=1) < 0
        ]

    def saved_bytes(self) -> int:
        """Bytes of what the forward pass makes and the backward pass reads, parameters aside.

        A reshape shares the memory of its input.
        """
        saved = {}
        for node in self.nodes.values():
            if not self._is_backward(node):
                continue
            for argument in node.arguments:
                key = self._storage(argument)
                source = self.nodes.get(key.split("[")[0])
                if source and not self._is_backward(source) and source.primitive not in READS:
                    saved[key] = _bytes(self.nodes[self._through(argument)].output)
        return sum(saved.values())

    def _is_backward(self, node: Node) -> bool:
        if node.primitive in ("TupleGetItem", "Reshape") and node.arguments[0] in self.nodes:
            return self._is_backward(self.nodes[node.arguments[0]])
        return node.backward

    def _through(self, name: str) -> str:
        """The call behind reshapes."""
        while name in self.nodes and self.nodes[name].primitive == "Reshape":
            name = self.nodes[name].arguments[0]
        return name

    def _storage(self, name: str) -> str:
        """What the memory of a value is named: a call, and which output of it."""
        name = self._through(name)
        node = self.nodes.get(name)
        if node and node.primitive == "TupleGetItem":
            return f"{node.arguments[0]}[{node.arguments[1]}]"
        return name


READS = ("Load", "TensorMove", "MakeTuple", "UpdateState")  # parameters, and no values at all
_CALL = re.compile(r"  (?:%(\d+)\([^)]*\) = )?(?:PrimFunc_)?(\w+)\((.*?)(?:\) |\)$|$)")
_ARGUMENT = re.compile(r"%(\w+)|I64\((\d+)\)")
_TUPLE, _INTEGER = re.compile(r"\(((?:I64\(-?\d+\)(?:, )?)+)\)"), re.compile(r"I64\((-?\d+)\)")
_WIDTHS = {"Float32": 4, "Int32": 4, "Float16": 2, "BFloat16": 2, "Bool": 1}


def _bytes(output: str) -> int:
    kind, shape = re.match(r"<(?:Ref\[)?Tensor\[(\w+)\]\]?, \(([\d, ]*)\)", output).groups()
    return _WIDTHS[kind] * math.prod(int(n) for n in shape.split(",") if n.strip())


def read_graph(text: str) -> Graph:
    """Read MindSpore's dump of a graph."""
    nodes: dict[str, Node] = {}
    node = None
    for line in text.splitlines():
        call = _CALL.match(line)
        if call:
            arguments = [first or second for first, second in _ARGUMENT.findall(call[3])]
            values = [[int(n) for n in _INTEGER.findall(t)] for t in _TUPLE.findall(call[3])]
            node = nodes[call[1] or call[2]] = Node(call[2], arguments, values)
        elif node and not node.output and line.startswith("      : "):
            node.output = line.partition(") -> (")[2] or line
        elif node and line.startswith("      # Fullname with scope: (Gradients/"):
            node.backward = True
    return Graph(nodes)


def dump_graphs(names: Iterable[str]) -> dict[str, str]:
    """Compile some of `GRAPHS` in one process; returns what the front end made of each.

    The CPU's back end and its kernels would come after that and are left out, so what is read
    holds for any device, as far as the front end does not look at the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "MS_DEV_SAVE_GRAPHS": "1",
            "MS_DEV_SAVE_GRAPHS_PATH": folder,
            "MS_DEV_DUMP_IR_PASSES": "validate",
            "MS_DEV_PRECOMPILE_ONLY": "1",
        }
        command = [sys.executable, "-m", "tests.ascend.graphs", folder, *names]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return {name: (Path(folder) / name).read_text() for name in names}


def compile_graphs() -> dict[str, Graph]:
    """Compile and read all of `GRAPHS`, the groups side by side."""
    with ThreadPoolExecutor(len(GROUPS)) as pool:
        texts = {n: text for dumps in pool.map(dump_graphs, GROUPS) for n, text in dumps.items()}
    return {name: read_graph(texts[name]) for name in GRAPHS}


def main() -> None:
    """Compile the graphs that the command line names and leave each dump under its name."""
    from src.device import prepare_environment

    prepare_environment()
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    folder, *names = sys.argv[1:]
    for name in names:
        {**GRAPHS, "faulty": _faulty}[name]()
        dumps = list(Path(folder).rglob("*_validate_*.ir"))
        if len(dumps) != 1:
            sys.exit(f"{name}: {len(dumps)} dumps of its graph")
        dumps[0].rename(Path(folder) / name)


if __name__ == "__main__":
    main()
