"""Randomness inside the network that is a pure function of a key.

The random kernels of a compiled graph keep a state that can neither be saved nor restored, so a
resumed run would draw other masks. Here every mask follows from an int32 key per image that the
training step derives from (seed, step, place in the global batch): a counter-based generator made
of plain integer operations. So it neither depends on how many devices share that batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

_GOLDEN_RATIO = 0x9E3779B9 - 2**32  # as int32 sees these bits
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - 2**32


def _times(x: Tensor, factor: int) -> Tensor:
    """int32 product modulo 2**32."""
    return x * Tensor(factor, mstype.int32)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: the shift of an int32 copies the sign, so the copies are masked off."""
    return ops.bitwise_and(
        ops.bitwise_right_shift(x, Tensor(bits, mstype.int32)),
        Tensor((1 << (32 - bits)) - 1, mstype.int32),
    )


def hash_bits(x: Tensor) -> Tensor:
    """Mix int32 bits so that neighbouring inputs give unrelated outputs.

    Source: the 32-bit finaliser "lowbias32" of C. Wellons' hash-prospector (2018).
    """
    x = _times(ops.bitwise_xor(x, _shift_right(x, 16)), _MULTIPLIER_1)
    x = _times(ops.bitwise_xor(x, _shift_right(x, 15)), _MULTIPLIER_2)
    return ops.bitwise_xor(x, _shift_right(x, 16))


def sample_keys(key: Tensor, positions: Tensor) -> Tensor:
    """One int32 key for each of the int32 positions [B], from an int32 scalar key."""
    return hash_bits(ops.bitwise_xor(_times(positions, _GOLDEN_RATIO), hash_bits(key)))


def random_bits(keys: Tensor, num_slots: int) -> Tensor:
    """Random bits, int32 [slots, B], from int32 keys [B], one for each image."""
    counter = _times(ops.arange(num_slots).astype(mstype.int32), _GOLDEN_RATIO).reshape((-1, 1))
    return hash_bits(ops.bitwise_xor(counter, hash_bits(keys).reshape((1, -1))))


def uniform(bits: Tensor) -> Tensor:
    """Turn random bits into float32 numbers uniform on [0, 1), from their lower 24 bits."""
    return ops.bitwise_and(bits, Tensor(0xFFFFFF, mstype.int32)).astype(mstype.float32) * 2.0**-24


class DropPath(nn.Cell):
    """Stochastic depth (Huang et al., 2016), drops residual branches per sample.

    Args:
        rate: the probability of dropping.
        rng_slot: this cell's row of the model's random bits.
    """

    def __init__(self, rate: float, rng_slot: int) -> None:
        super().__init__()
        self.rate = rate
        self.rng_slot = rng_slot

    def factors(self, bits: Tensor | None) -> Tensor | None:
        """bits [slots, B] -> float32 [B], 0 or 1 / (1 - rate); None where nothing is dropped."""
        if self.rate == 0.0 or bits is None or not self.training:
            return None
        return (uniform(bits[self.rng_slot]) >= self.rate).astype(mstype.float32) / (
            1.0 - self.rate
        )

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, ...], bits [slots, B] -> [B, ...]; kept samples are scaled by 1 / (1 - rate)."""
        factors = self.factors(bits)
        if factors is None:
            return x
        return x * factors.astype(x.dtype).reshape((-1,) + (1,) * (x.ndim - 1))


class Dropout(nn.Cell):
    """Dropout of single elements, keyed like `DropPath`.

    Args:
        rate: the probability of dropping.
        rng_slot: this cell's row of the model's random bits.
    """

    def __init__(self, rate: float, rng_slot: int) -> None:
        super().__init__()
        self.rate = rate
        self.rng_slot = rng_slot

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, N, C], bits [slots, B] -> [B, N, C]; kept elements are scaled by 1 / (1 - rate)."""
        if self.rate == 0.0 or bits is None or not self.training:
            return x
        counter = ops.arange(x.shape[1] * x.shape[2]).astype(mstype.int32)
        counter = _times(counter, _GOLDEN_RATIO)
        sample = bits[self.rng_slot].reshape((-1, 1))
        element = hash_bits(ops.bitwise_xor(counter.reshape((1, -1)), sample))  # [B, N * C]
        keep = (uniform(element) >= self.rate).astype(x.dtype).reshape(x.shape)
        return x * (keep / (1.0 - self.rate))


class StochasticNet(nn.Cell):
    """A network whose `DropPath` and `Dropout` cells are keyed by image.

    Its constructor calls `set_rng_slots`; its `construct` hands `random_bits_of` to those cells.
    """

    def set_rng_slots(self, num_slots: int, rates: Sequence[float]) -> None:
        """Set the number of RNG slots and the drop rates of the cells that use them."""
        self.num_rng_slots = num_slots
        self.stochastic = any(rate > 0 for rate in rates)
        self.draw_key = ops.UniformInt()

    def random_bits_of(self, images: Tensor, keys: Tensor | None) -> Tensor | None:
        """The random bits [slots, B] of this pass, or None where nothing is random.

        keys: int32 [B], one for each image; without them they are drawn from MindSpore's generator.
        """
        if not (self.training and self.stochastic):
            return None
        if keys is None:
            key = self.draw_key((), Tensor(0, mstype.int32), Tensor(2**31 - 1, mstype.int32))
            keys = sample_keys(key, ops.arange(images.shape[0]).astype(mstype.int32))
        return random_bits(keys, self.num_rng_slots)
