"""The list of checks in the order in which they run, and their input and output types.

This module does not import MindSpore: the program that starts the checks must not use the device.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

RANK_COUNTS = (2, 3, 4, 6, 8)  # that divide the batch of `rank_program`


@dataclass(frozen=True)
class Setting:
    """The input of every check.

    Args:
        device: "Ascend", "GPU" or "CPU"; "auto" until the first check has selected one.
        ranks: devices for checks with several ranks; 0 selects by the host.
        full: whether to run the long checks too.
        folder: temporary folder for files; removed at the end.
        worker: command that starts a worker process, `tools.check_device.worker`.
    """

    device: str
    ranks: int
    full: bool
    folder: str
    worker: Sequence[str]


@dataclass
class Finding:
    """The outcome of a check.

    Args:
        measured: the decisive value as text.
        allowed: its limit as text; "" if there is none.
        passed: whether the check passed.
        hint: details on a failure, beside the check's own `cause`.
        details: further values for the report file.
    """

    measured: str
    allowed: str = ""
    passed: bool = True
    hint: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class NotHere(Exception):
    """The check does not apply to this device or host; the message says why."""


@dataclass(frozen=True)
class Check:
    """A check.

    Args:
        name: its name in the table.
        function: "module:function" below `tools.check_device.checks`; Setting -> Finding.
        process: checks with the same value run in one process and share compiled graphs. After a
            crash, an exception or a time-out, the remaining ones run in a new process.
        seconds: time limit, after which the process is killed.
        cause: likely cause of a failure.
        runtime: keys of `runtime` that the process sets.
        full: whether the check runs only with --full.
        uses_device: False if the process must leave the device to processes that it starts.
    """

    name: str
    function: str
    process: str
    seconds: float
    cause: str
    runtime: tuple[tuple[str, Any], ...] = ()
    full: bool = False
    uses_device: bool = True

    def run(self, setting: Setting) -> Finding:
        """Run the check in this process."""
        module, _, name = self.function.partition(":")
        module = importlib.import_module(f"tools.check_device.checks.{module}")
        return getattr(module, name)(setting)


DETERMINISTIC = (("deterministic", True),)
_LAYER = "the forward or backward kernel of this layer: MindSpore's or CANN's (cuDNN's) version"
CHECKS = (
    Check(
        "environment", "environment:environment", "environment", 300,
        "the installation: the versions of MindSpore, driver and CANN (CUDA) must match; see "
        "docs/install.md",
    ),
    Check(
        "arithmetic", "arithmetic:arithmetic", "operators", 300,
        "how the device handles infinity and NaN: a step that overflows is not detected or "
        "leaves NaN behind. On Atlas A2 unset MS_ASCEND_CHECK_OVERFLOW_MODE",
    ),
    Check(
        "random numbers", "arithmetic:random_numbers", "operators", 300,
        "int32 products or shifts that do not wrap modulo 2^32: drop path and dropout draw "
        "wrong masks; set model.drop_path_rate and model.drop_rate to 0 until it is fixed",
    ),
    Check(
        "drop path", "arithmetic:drop_path", "operators", 300,
        "the masks of drop path: a residual branch is dropped by another branch's numbers. If "
        "'random numbers' fails too, that is the cause; else Gather or slicing of the random bits",
    ),
    Check(
        "mixup and cutmix", "mixing:mixing", "operators", 300,
        "images or labels are not mixed with the batch in reverse order (ReverseV2); leave "
        "augment.mixup and augment.cutmix at 0 until it is fixed",
    ),
    Check("layer: depthwise convolution", "layers:depthwise", "operators", 300,
          f"{_LAYER}; runtime.depthwise selects one of the two forms"),
    Check("layer: token embedding", "layers:token_embedding", "operators", 300, _LAYER),
    Check("layer: BatchNorm", "layers:batch_norm", "operators", 300,
          f"{_LAYER}, or its running statistics"),
    Check("layer: LayerNorm", "layers:layer_norm", "operators", 300, _LAYER),
    Check("layer: attention", "layers:attention", "operators", 300,
          f"{_LAYER}: BatchMatMul, softmax"),
    Check("layer: class token", "layers:class_token", "operators", 300, f"{_LAYER}: Slice, Concat"),
    Check("layer: QuickGELU", "layers:quick_gelu", "operators", 300, _LAYER),
    Check("loss", "layers:loss", "operators", 300, "LogSoftmax, GatherD or their gradients"),
    Check(
        "AdamW", "layers:adamw", "operators", 300,
        "the Adam kernel: bias correction, epsilon or decoupled weight decay differ from PyTorch's",
    ),
    Check(
        "logits float32", "network:float32", "network", 900,
        "the forward pass: see the layers above. If all of them pass, compare the stages "
        "(details in the report), and try runtime.jit_level O0",
    ),
    Check("logits float16", "network:float16", "network", 900,
          "the forward pass in float16; train in float32 or bfloat16 until it is fixed"),
    Check("logits bfloat16", "network:bfloat16", "network", 600,
          "the forward pass in bfloat16; train in float16 until it is fixed"),
    Check("logits flash attention", "network:flash", "network", 600,
          "ops.flash_attention_score, or its call; do not set runtime.flash_attention"),
    Check(
        "gradients", "training:gradients", "training", 900,
        "the backward pass of the named layer; 'logits' checks the forward pass",
    ),
    Check(
        "trajectory float32", "training:trajectory", "training", 600,
        "the training step. If 'gradients' passes: optimizer, weight decay, or the order of "
        "updates; else the cause of 'gradients'",
    ),
    Check(
        "running statistics", "training:statistics", "training", 600,
        "BatchNorm's moving mean or variance, used in evaluation: momentum or unbiased variance. "
        "If 'logits float32' fails too, that is the cause",
    ),
    Check("moving average", "training:average", "training", 600,
          "Assign and the order of updates: the average must see the weights after the update"),
    Check(
        "overflow", "training:overflow", "training", 600,
        "a step with infinite gradients leaves something behind; train without a dynamic "
        "training.loss_scale and with training.non_finite stop until it is fixed",
    ),
    Check(
        "repeatability", "training:repeatability", "training", 600,
        "atomic additions or other kernels that sum in varying order; expected on cards, and "
        "runtime.deterministic true avoids it. Larger differences are a race condition",
    ),
    Check("accumulation", "accumulation:accumulation", "accumulation", 600,
          "sums of gradients over the parts of a batch; use training.accumulate 1"),
    Check(
        "trajectory float16", "training:trajectory_float16", "float16", 900,
        "training in float16 with loss scale, if 'trajectory float32' passes",
    ),
    Check("determinism", "state:determinism", "state", 900,
          "runtime.deterministic true has no effect: a resumed run will not repeat exactly",
          runtime=DETERMINISTIC),
    Check("save and resume", "state:resume", "state", 600,
          "the saved state: the file was changed on its way to the disk or back (disk, memory), or "
          "something is not saved. If 'determinism' fails, that is the cause",
          runtime=DETERMINISTIC),
    Check("state on the CPU", "state:on_cpu", "state", 600,
          "a state written on this device gives other results on a CPU: the file (see 'save and "
          "resume'), or the forward pass (see 'logits')", runtime=DETERMINISTIC),
    Check(
        "collectives", "ranks:collectives", "collectives", 600,
        "AllReduce or Broadcast: HCCL (NCCL), its network interface (HCCL_SOCKET_IFNAME), links",
        uses_device=False,
    ),
    Check(
        "data parallel", "ranks:data_parallel", "data parallel", 900,
        "training on several ranks. Unequal checksums: a rank updates by numbers of its own. "
        "Unequal losses: gradients, statistics or labels are not shared correctly",
        uses_device=False,
    ),
    Check(
        "late rank", "ranks:late_rank", "late rank", 900,
        "the time that ranks wait for each other: HCCL_CONNECT_TIMEOUT, HCCL_EXEC_TIMEOUT",
        full=True, uses_device=False,
    ),
    Check(
        "killed rank", "jobs:killed_rank", "jobs", 900,
        "scripts/run_distribute_train.sh: ending all ranks, or restarting at once on the same "
        "devices and port", uses_device=False,
    ),
    Check("export MINDIR", "programs:mindir", "export", 600,
          "export.py --format mindir, or MindSpore's reader of the file", uses_device=False),
    Check("export ONNX", "programs:onnx", "export", 600,
          "export.py --format onnx, or onnxruntime", uses_device=False),
    Check("export AIR", "programs:air", "export", 600,
          "export.py --format air: MindSpore's graph engine; use --format onnx and ATC instead",
          uses_device=False),
    Check(
        "train.py", "programs:train", "train.py", 900,
        "the whole training path: data, step, evaluation, files; see the failures above",
        uses_device=False,
    ),
    Check("speed", "speed:speed", "speed", 1800, "the profile, in the report file"),
    Check("speed by form", "speed:forms", "speed by form", 7500,  # six forms of up to 1,200 s
          "the failing form; leave runtime.jit_level and runtime.depthwise at their defaults",
          full=True, uses_device=False),
)  # fmt: skip
