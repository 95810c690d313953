"""BatchNorm over the batches of all devices.

`nn.SyncBatchNorm` exists on Ascend only; this one runs on every backend and is tested against one
large batch.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.models.layers import BatchNorm2d, update_running_statistic

PARTS = ("gamma", "beta", "moving_mean", "moving_variance")


class SyncBatchNorm2d(BatchNorm2d):
    """BatchNorm2d with the statistics of `world` devices' batches, which must be equally large."""

    def __init__(self, dim: int, world: int) -> None:
        super().__init__(dim)
        self.world = world
        self.all_reduce = ops.AllReduce()

    def _mean(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [1, C, 1, 1], or rows [R, C] -> [1, C], over all devices."""
        axes = (0, 2, 3) if x.ndim == 4 else (0,)
        return self.all_reduce(x.mean(axes, keep_dims=True)) / self.world

    def construct(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> float32 [B, C, H, W]; rows [R, C] -> float32 [R, C]."""
        x = x.astype(mstype.float32)
        if not self.training:
            moving = (self.moving_mean, self.moving_variance)
            return self.bn_infer(x, self.gamma, self.beta, *moving)[0]
        mean = self._mean(x)
        centred = x - mean
        variance = self._mean(ops.square(centred))
        count = self.world * x.size // x.shape[1]
        unbiased = variance * (count / max(count - 1, 1))
        update_running_statistic(self.moving_mean, mean.reshape((-1,)), self.momentum)
        update_running_statistic(self.moving_variance, unbiased.reshape((-1,)), self.momentum)
        shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
        scale = self.gamma.reshape(shape) * ops.rsqrt(variance + self.eps)
        return centred * scale + self.beta.reshape(shape)


def synchronise_batchnorm(net: nn.Cell, world: int) -> nn.Cell:
    """Replace every BatchNorm2d of a network by SyncBatchNorm2d, in place; parameters stay."""
    for _, parent in list(net.cells_and_names()):
        for name, cell in parent.name_cells().items():
            if type(cell) is BatchNorm2d:
                shared = SyncBatchNorm2d(cell.num_features, world)
                names = {part: getattr(cell, part).name for part in PARTS}
                for part in PARTS:
                    setattr(shared, part, getattr(cell, part))
                setattr(parent, name, shared)  # renames the parameters
                for part in PARTS:
                    getattr(shared, part).name = names[part]
    return net
