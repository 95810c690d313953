"""Drop path and dropout with a counter-based random generator.

The state of a compiled graph's random kernels can be neither saved nor restored, so a resumed run
would draw other masks. Here, plain integer operations compute every mask from an int32 key per
image, which the training step derives from (seed, step, position in the global batch). The masks do
not depend on the number of devices that share the batch either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.models.root_cell import RootCell

_GOLDEN_RATIO = 0x9E3779B9 - 2**32  # these bits as int32
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - 2**32


def _multiply(x: Tensor, factor: int) -> Tensor:
    """Return the int32 product modulo 2**32."""
    return x * Tensor(factor, mstype.int32)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right logically: an int32 shift copies the sign, so mask the copies."""
    return ops.bitwise_and(
        ops.bitwise_right_shift(x, Tensor(bits, mstype.int32)),
        Tensor((1 << (32 - bits)) - 1, mstype.int32),
    )


def hash_bits(x: Tensor) -> Tensor:
    """Hash int32 bits so that neighbouring inputs give unrelated outputs.

    Source: the 32-bit finaliser "lowbias32" of C. Wellons' hash-prospector (2018).
    """
    x = _multiply(ops.bitwise_xor(x, _shift_right(x, 16)), _MULTIPLIER_1)
    x = _multiply(ops.bitwise_xor(x, _shift_right(x, 15)), _MULTIPLIER_2)
    return ops.bitwise_xor(x, _shift_right(x, 16))


def sample_keys(key: Tensor, positions: Tensor) -> Tensor:
    """Return an int32 key for each of the int32 positions [B] from an int32 scalar key."""
    return hash_bits(ops.bitwise_xor(_multiply(positions, _GOLDEN_RATIO), hash_bits(key)))


def random_bits(keys: Tensor, slots: int) -> Tensor:
    """Return random bits int32 [slots, B] for int32 keys [B], one per image."""
    counter = _multiply(ops.arange(slots).astype(mstype.int32), _GOLDEN_RATIO).reshape((-1, 1))
    return hash_bits(ops.bitwise_xor(counter, hash_bits(keys).reshape((1, -1))))


def uniform(bits: Tensor) -> Tensor:
    """Return float32 numbers uniform on [0, 1) from the lower 24 of random bits."""
    return ops.bitwise_and(bits, Tensor(0xFFFFFF, mstype.int32)).astype(mstype.float32) * 2.0**-24


class _Drop(nn.Cell):
    """What drops at random in training.

    Args:
        rate: probability of dropping.
        slot: this cell's row of the model's random bits.
    """

    def __init__(self, rate: float, slot: int) -> None:
        super().__init__()
        self.rate = rate
        self.slot = slot


class DropPath(_Drop):
    """Stochastic depth (Huang et al., 2016): drops residual branches per sample."""

    def factors(self, bits: Tensor | None) -> Tensor | None:
        """bits [slots, B] -> float32 [B], 0 or 1 / (1 - rate); None if nothing is dropped."""
        if self.rate == 0.0 or bits is None or not self.training:
            return None
        return (uniform(bits[self.slot]) >= self.rate).astype(mstype.float32) / (1.0 - self.rate)

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, ...], bits [slots, B] -> [B, ...]; kept samples are scaled by 1 / (1 - rate)."""
        factors = self.factors(bits)
        if factors is None:
            return x
        return x * factors.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))


class Dropout(_Drop):
    """Dropout of single elements, with random bits as for `DropPath`."""

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, N, C], bits [slots, B] -> [B, N, C]; kept elements are scaled by 1 / (1 - rate)."""
        if self.rate == 0.0 or bits is None or not self.training:
            return x
        counter = ops.arange(x.shape[1] * x.shape[2]).astype(mstype.int32)
        counter = _multiply(counter, _GOLDEN_RATIO)
        sample = bits[self.slot].reshape((-1, 1))
        element = hash_bits(ops.bitwise_xor(counter.reshape((1, -1)), sample))  # [B, N * C]
        keep = (uniform(element) >= self.rate).astype(x.dtype).reshape(x.shape)
        return x * (keep / (1.0 - self.rate))


class StochasticNet(RootCell):
    """A network whose `DropPath` and `Dropout` cells draw from a key per image.

    Its constructor calls `set_rng_slots`; its `construct` passes `random_bits_of` to those cells.
    """

    def set_rng_slots(self, slots: int, rates: Sequence[float]) -> None:
        """Set the number of slots and their drop rates."""
        self.num_rng_slots = slots
        self.stochastic = any(rate > 0 for rate in rates)
        self.draw_key = ops.UniformInt()

    def random_bits_of(self, images: Tensor, keys: Tensor | None) -> Tensor | None:
        """Return random bits [slots, B] for a pass, or None if nothing is dropped.

        keys: int32 [B], one for each image; by default drawn from MindSpore's generator.
        """
        if not (self.training and self.stochastic):
            return None
        if keys is None:
            key = self.draw_key((), Tensor(0, mstype.int32), Tensor(2**31 - 1, mstype.int32))
            keys = sample_keys(key, ops.arange(images.shape[0]).astype(mstype.int32))
        return random_bits(keys, self.num_rng_slots)


def hash_equals_numpy() -> bool:
    """Return whether the device computes `hash_bits` like NumPy: int32 products modulo 2**32."""
    values = (np.arange(1024, dtype=np.uint32) * np.uint32(0x9E3779B9)).view(np.int32)
    expected = values.view(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        expected = (expected ^ (expected >> np.uint32(shift))) * np.uint32(factor)
    return np.array_equal(hash_bits(Tensor(values)).asnumpy().view(np.uint32), expected)
