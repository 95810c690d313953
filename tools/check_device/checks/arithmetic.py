"""Checks the device's arithmetic and the random numbers based on it."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.arithmetic import overflows_to_infinity
from src.models import create_model
from src.models.stochastic import hash_bits, random_bits, sample_keys, uniform
from tools.check_device import reference
from tools.check_device.golden import official
from tools.check_device.limits import arithmetic as kind_of_arithmetic
from tools.check_device.limits import products
from tools.check_device.registry import Finding, Setting

KEY, IMAGES, SLOTS, RATE = 0x89ABCDEF, 256, 40, 0.4


def arithmetic(setting: Setting) -> Finding:
    """Detect the precision of float32 products; check infinity and NaN."""
    values = Tensor(np.array([np.inf, -np.inf, np.nan, 1.0], np.float32))
    finite = ops.isfinite(values).asnumpy().tolist()
    zeros = ops.MulNoNan()(values, Tensor(0.0, mstype.float32)).asnumpy()
    total = ops.square(values[:1]).sum().asnumpy()
    faults = []
    if finite != [False, False, False, True]:
        faults.append(f"isfinite of inf, -inf, nan, 1 is {finite}")
    if zeros.any():
        faults.append(f"MulNoNan of inf, -inf, nan, 1 by 0 is {zeros.tolist()}")
    if np.isfinite(total):
        faults.append(f"the sum of infinity squared is {total}")
    overflow = "infinity" if overflows_to_infinity() else "65504 (no dynamic training.loss_scale)"
    return Finding(
        f"{kind_of_arithmetic()}; float16 overflows to {overflow}",
        "any",
        not faults,
        hint="; ".join(faults),
        details={"products": products(), "float16 overflows to": overflow},
    )


class _Random(nn.Cell):
    def construct(self, key: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Draw numbers as the training step does."""
        keys = sample_keys(key, positions)
        bits = random_bits(keys, SLOTS)
        return hash_bits(positions), keys, bits, uniform(bits)


def _int32(value: int) -> Tensor:
    return Tensor(np.uint32(value).astype(np.int32))


def random_numbers(setting: Setting) -> Finding:
    """Check hash, keys of the images, random bits and uniform numbers: exact."""
    positions = np.arange(IMAGES, dtype=np.int32)
    found = [each.asnumpy() for each in _Random()(_int32(KEY), Tensor(positions))]
    keys = reference.sample_keys(KEY, IMAGES)
    bits = reference.random_bits(keys, SLOTS)
    right = [reference.hash_bits(positions.view(np.uint32)), keys, bits]
    right = [each.view(np.int32) for each in right]
    right.append((bits & 0xFFFFFF).astype(np.float32) * np.float32(2**-24))
    names = ("hash", "keys of images", "random bits", "uniform numbers")
    wrong = {name: int((a != b).sum()) for name, a, b in zip(names, found, right)}
    return _exact(wrong, sum(each.size for each in right))


class _Masks(nn.Cell):
    """The factors of every drop path of a network: float32 [paths, B]."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, images: Tensor, keys: Tensor) -> Tensor:
        """images [B, 3, H, W], keys int32 [B]."""
        bits = self.net.random_bits_of(images, keys)
        rows = ()
        for stage in (self.net.stage0, self.net.stage1, self.net.stage2):
            for block in stage.blocks:
                for path in (block.drop_path1, block.drop_path2):
                    if path.rate > 0:
                        rows += (path.factors(bits),)
        return ops.stack(rows)


def drop_path(setting: Setting) -> Finding:
    """Check which images each residual branch of a network drops: exact.

    The random bits have these slots, stage by stage: the embedding's dropout, then for each block
    the attention's dropout, its drop path, the MLP's two dropouts, its drop path.
    """
    net = create_model("cvt_13", num_classes=10, **{**official.NANO, "depths": (1, 2, 3)},
                       drop_path_rate=RATE).set_train(True)  # fmt: skip
    keys = reference.sample_keys(KEY, IMAGES)
    images = Tensor(np.zeros((IMAGES, 3, 16, 16), np.float32))
    found = _Masks(net)(images, Tensor(keys.view(np.int32))).asnumpy()
    slots, rates, slot = [], [], 0
    for depth in (1, 2, 3):
        for block, rate in enumerate(np.linspace(0, RATE, depth)):
            first = slot + 1 + 5 * block
            if rate > 0:
                slots += [first + 1, first + 4]
                rates += [rate, rate]
        slot += 1 + 5 * depth
    bits = reference.random_bits(keys, slot)[slots]
    drawn = (bits & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)
    rates = np.array(rates, np.float32)[:, None]
    wrong = int(((found > 0) != (drawn >= rates)).sum())
    factors = np.where(drawn >= rates, 1 / (1 - rates), 0)
    scaled = int((np.abs(found - factors) > 1e-6).sum())
    return _exact({"masks": wrong, "scaled masks": scaled}, found.size)


def _exact(wrong: dict[str, int], count: int) -> Finding:
    """Return a finding on numbers that must be equal."""
    named = [f"{number} {name}" for name, number in wrong.items() if number]
    return Finding(
        f"{sum(wrong.values())} of {count:,} differ", "0", not named, hint=", ".join(named),
        details={"different": wrong},
    )  # fmt: skip
