"""Depthwise 3 x 3 convolution on [B, H, W, C] as nine shifted multiply-adds.

For devices on which vector units are faster at it than the convolution kernel. CvT's tokens are
stored as [B, H, W, C], so no transpose is needed. Always in float32.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

KERNEL_SIZE, PADDING = 3, 1


class ShiftedDepthwise(nn.Cell):
    """y[o] = sum over i, j of x[stride * o + (i, j) - 1] * weight[i, j], zeros outside.

    A map padded to stride * a cells is viewed as [a, stride]: tap i = stride * d + r then reads
    phase r at offset d, a contiguous slice at any stride. The gradient is explicit, because
    automatic differentiation would keep all nine slices of the input until the backward pass.

    Args:
        stride: stride of the convolution, 1 or more.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        # Not ops.pad, which is Python code that fails to compile inside nested loops.
        self.pad = ops.PadV3(paddings_contiguous=True)
        self.zero = Tensor(0.0, mstype.float32)
        self.reach = -(-KERNEL_SIZE // stride) - 1  # cells of a window beyond its first
        # Above stride 2 the last window may end before the last row, which needs one more cell.
        self.spare = int(stride > 2)
        taps = [divmod(i, stride) for i in range(KERNEL_SIZE)]
        self.taps = tuple(
            (i, j, *taps[i], *taps[j]) for i in range(KERNEL_SIZE) for j in range(KERNEL_SIZE)
        )

    def outputs(self, size: int) -> int:
        """Return the output size of an axis of `size` cells."""
        return (size + 2 * PADDING - KERNEL_SIZE) // self.stride + 1

    def construct(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [B, H, W, C], weight [C, 1, 3, 3] -> [B, H', W', C]."""
        phases, total = self._phases(x), None
        for i, j, d, r, e, s in self.taps:
            term = self._tap(phases, x, d, r, e, s) * weight[:, 0, i, j]
            total = term if total is None else total + term
        return total

    def bprop(self, x: Tensor, weight: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of `construct`'s arguments."""
        return self._input_gradient(x, weight, dout), self._weight_gradient(x, weight, dout)

    def _phases(self, x: Tensor) -> Tensor:
        """Pad and view: [B, H, W, C] -> [B, a, stride, b, stride, C]."""
        stride, height, width = self.stride, x.shape[1], x.shape[2]
        a, b = self._axis(height), self._axis(width)
        below, right = a * stride - height - PADDING, b * stride - width - PADDING
        x = self.pad(x, (0, 0, PADDING, right, PADDING, below), self.zero)
        return x.reshape((x.shape[0], a, stride, b, stride, x.shape[3]))

    def _axis(self, size: int) -> int:
        return self.outputs(size) + self.reach + self.spare

    def _tap(self, phases: Tensor, x: Tensor, d: int, r: int, e: int, s: int) -> Tensor:
        """Return the input of one tap in every window: [B, H', W', C]."""
        rows, columns = self.outputs(x.shape[1]), self.outputs(x.shape[2])
        batch, channels = x.shape[0], x.shape[3]
        window = ops.slice(phases, (0, d, r, e, s, 0), (batch, rows, 1, columns, 1, channels))
        return window.reshape((batch, rows, columns, channels))

    def _weight_gradient(self, x: Tensor, weight: Tensor, dout: Tensor) -> Tensor:
        phases, sums = self._phases(x), ()
        for _, _, d, r, e, s in self.taps:
            sums += ((self._tap(phases, x, d, r, e, s) * dout).sum((0, 1, 2)),)
        return ops.stack(sums, 1).reshape(weight.shape)

    def _input_gradient(self, x: Tensor, weight: Tensor, dout: Tensor) -> Tensor:
        """Gather, phase by phase, the windows that read each cell."""
        batch, rows, columns, channels = dout.shape
        stride, reach = self.stride, self.reach
        a, b = rows + reach + self.spare, columns + reach + self.spare
        behind = reach + self.spare
        padded = self.pad(dout, (0, 0, reach, behind, reach, behind), self.zero)
        row_phases = ()
        for r in range(stride):
            column_phases = ()
            for s in range(stride):
                total = ops.zeros((batch, a, b, channels), dout.dtype)
                for i in range(r, KERNEL_SIZE, stride):
                    for j in range(s, KERNEL_SIZE, stride):
                        begin = (0, reach - i // stride, reach - j // stride, 0)
                        window = ops.slice(padded, begin, (batch, a, b, channels))
                        total = total + window * weight[:, 0, i, j]
                column_phases += (total.reshape((batch, a, 1, b, 1, channels)),)
            row_phases += (ops.cat(column_phases, 4),)
        dx = ops.cat(row_phases, 2).reshape((batch, a * stride, b * stride, channels))
        return ops.slice(dx, (0, PADDING, PADDING, 0), x.shape)
