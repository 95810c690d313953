"""A worker of check_device on a device with a fault: python faults.py FAULT ROLE JSON.

Each fault changes the product in this process only, as a device, a disk or a mistake would.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from src.device import prepare_environment

prepare_environment()

from mindspore import dtype as mstype  # noqa: E402
from mindspore import nn, ops  # noqa: E402

from tools.check_device import worker  # noqa: E402


def saturating_hash() -> None:
    """int32 products stop at the largest number instead of wrapping."""
    from src.models import stochastic

    def multiply(x, factor):
        product = x.astype(mstype.float32) * float(factor)
        return ops.clamp(product, -(2.0**31), 2.0**31 - 129).astype(mstype.int32)

    stochastic._multiply = multiply


def labels_not_reversed() -> None:
    """Images are mixed with the reversed batch, labels with themselves."""
    from src.training.train_step import TrainStep, mix_images

    def forward(self, images, labels, mix, keys):
        if self.mixing:
            loss = self.loss(self.net(mix_images(images, mix), keys), labels, labels, mix[0])
        else:
            loss = self.loss(self.net(images, keys), labels)
        return loss * self.loss_scale

    TrainStep._forward = forward


def statistics_not_restored() -> None:
    """A skipped step leaves its running statistics behind."""
    from src.training import updates

    def keep_all(self, finite, before, after):
        return self.original_keep(finite, after, after)

    for each in (updates.PlainUpdates, updates.CompiledUpdates):
        each.original_keep = each.keep_finite_statistics
        each.keep_finite_statistics = keep_all


def norm_of_each_rank() -> None:
    """Each rank clips by its own norm, which differs in the last bits."""
    from src.training import train_step

    def agree(self, loss, norm, after):
        own = (loss, norm, after)
        loss, _, after = train_step.unpack(self.all_reduce(train_step.pack(own)), (0, 1, 2), own)
        return loss, norm * (1.0 + 1.2e-6 * self.rank), after * self.fraction

    train_step.TrainStep._agree = agree


def epsilon_of_adam() -> None:
    """AdamW with MindSpore's default epsilon, 1e-6."""
    from src.training.optimizer import AdamW

    original = AdamW.__init__

    def init(self, parameters, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.05):
        original(self, parameters, betas, 1e-6, weight_decay)

    AdamW.__init__ = init


def drop_path_off_by_one() -> None:
    """A residual branch is dropped by the random bits of another slot."""
    from src.models.stochastic import DropPath

    original = DropPath.__init__

    def init(self, rate, slot):
        original(self, rate, slot - 1)

    DropPath.__init__ = init


def flipped_byte() -> None:
    """A disk that changes a byte of each state."""
    from src.training import state

    original = state.save_checkpoint

    def save(parameters, path, **extra):
        original(parameters, path, **extra)
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 4
        Path(path).write_bytes(content)

    state.save_checkpoint = save


def convolution_in_float16() -> None:
    """The second token embedding's convolution computes in float16 and in no compiled operator.

    In every network, so that the logits of one will do.
    """
    from src import models
    from src.models.layers import ConvEmbed

    class HalfConv(nn.Conv2d):
        """A convolution in float16 whose result is float32 again."""

        def construct(self, x):
            return super().construct(x).astype(mstype.float32)

    class HalfConvEmbed(ConvEmbed):
        """No class that is replaced by a compiled one."""

    original = models.create_model

    def create(name, *arguments, **options):
        net = original(name, *arguments, **options)
        embed = net.stage1.patch_embed
        embed.__class__ = HalfConvEmbed
        embed.proj.to_float(mstype.float16)
        embed.proj.__class__ = HalfConv
        return net

    models.create_model = create
    from tools.check_device.checks import network  # not before, because it imports `create_model`

    network.SMALL, network.LARGE = (), network.SMALL[0]


def crash_and_hang() -> None:
    """Kernels of which one kills the process, one raises, one never ends."""
    from tools.check_device.checks import layers

    def crash(setting):
        os.kill(os.getpid(), signal.SIGSEGV)

    def fail(setting):
        raise RuntimeError("aclnnSoftmax failed\nmore lines")

    layers.class_token, layers.quick_gelu = crash, fail
    layers.loss = lambda setting: time.sleep(600)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    worker.main(sys.argv[2:])
