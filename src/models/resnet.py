"""ResNet, the convolutional baseline (He et al., CVPR 2016, arXiv 1512.03385).

Version 1.5, as in torchvision's `resnet.py`: a bottleneck strides in its 3x3 convolution, not in
its first 1x1. Shapes: B batch, C channels, H x W the map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import HeNormal, HeUniform, Uniform

from src.errors import UserError
from src.models.arguments import are_counts, as_size, check_count, check_num_classes, check_rate
from src.models.layers import BatchNorm2d
from src.models.registry import register_model
from src.models.stochastic import Dropout, DropPath, StochasticNet

EXPANSION = {"basic": 1, "bottleneck": 4}  # output channels / width of a block
STEMS = ("conv7", "conv3", "conv3_s2")


class ConvBatchNorm(nn.Cell):
    """Convolution without bias, Kaiming-normal by its fan-out, then BatchNorm."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            channels,
            kernel_size,
            stride=stride,
            pad_mode="pad",
            padding=kernel_size // 2,
            weight_init=HeNormal(mode="fan_out", nonlinearity="relu"),
            has_bias=False,
        )
        self.bn = BatchNorm2d(channels)

    def construct(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> float32 [B, C, H', W']."""
        return self.bn(self.conv(x))


class Residual(nn.Cell):
    """relu(shortcut + branch), with drop path on the branch.

    Args:
        in_channels: channels of the input.
        width: channels of the 3x3 convolutions.
        stride: stride of the block; if it or the channels change the shape, the shortcut is a 1x1
            convolution.
        block: "basic" or "bottleneck", see `ResNet`.
        drop_path_rate, slot: see `DropPath`.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        block: str,
        drop_path_rate: float,
        slot: int,
    ) -> None:
        super().__init__()
        channels = EXPANSION[block] * width
        if block == "basic":
            layers = [ConvBatchNorm(in_channels, width, 3, stride), ConvBatchNorm(width, width, 3)]
        else:
            layers = [
                ConvBatchNorm(in_channels, width, 1),
                ConvBatchNorm(width, width, 3, stride),
                ConvBatchNorm(width, channels, 1),
            ]
        self.layers = nn.CellList(layers)
        self.projects = stride != 1 or in_channels != channels
        if self.projects:
            self.shortcut = ConvBatchNorm(in_channels, channels, 1, stride)
        self.drop_path = DropPath(drop_path_rate, slot)

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, C_in, H, W] -> [B, C, H', W']."""
        shortcut = self.shortcut(x) if self.projects else x
        for i, layer in enumerate(self.layers):  # a slice of a CellList would rename its cells
            x = layer(ops.relu(x) if i else x)
        return ops.relu(shortcut + self.drop_path(x, bits))


class Stage(nn.Cell):
    """Residual blocks at one resolution."""

    def __init__(self, blocks: Sequence[Residual]) -> None:
        super().__init__()
        self.blocks = nn.CellList(blocks)

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, C_in, H, W] -> [B, C, H', W']."""
        for block in self.blocks:
            x = block(x, bits)
        return x


class ResNet(StochasticNet):
    """The ResNet network.

    Args:
        depths: blocks in each stage; every stage but the first halves the map.
        block: "basic" (two 3x3 convolutions) | "bottleneck" (1x1, 3x3, 1x1).
        width: channels of the first stage's 3x3 convolutions; doubles with every stage.
        stem: "conv7" (7x7, stride 2, then max-pooling) | "conv3" (3x3, for small images) |
            "conv3_s2" (3x3, stride 2).
        num_classes: outputs of the head; 0 for no head, then the network returns features [B, C].
        drop_path_rate: stochastic depth of the last block; the first has 0.
        drop_rate: dropout before the head.
        in_channels: channels of the images.
        image_size: int or (H, W), checked against the strides; the weights do not depend on it.

    Raises:
        UserError: an argument is invalid.
    """

    def __init__(
        self,
        depths: Sequence[int],
        block: str = "bottleneck",
        width: int = 64,
        stem: str = "conv7",
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_channels: int = 3,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not are_counts(depths):
            raise UserError(f"depths {depths!r}: must be integers, 1 or more")
        if block not in EXPANSION:
            raise UserError(f"block {block!r}: choose from {tuple(EXPANSION)}")
        if stem not in STEMS:
            raise UserError(f"stem {stem!r}: choose from {STEMS}")
        check_count("width", width)
        check_num_classes(num_classes)
        check_count("in_channels", in_channels)
        check_rate("drop_path_rate", drop_path_rate)
        check_rate("drop_rate", drop_rate)
        self.pools = stem == "conv7"
        shrinkage = {"conv7": 4, "conv3": 1, "conv3_s2": 2}[stem]
        self.min_size = shrinkage * 2 ** (len(depths) - 1)
        if image_size is not None:
            self.check_size(image_size)

        if self.pools:
            self.stem = ConvBatchNorm(in_channels, width, 7, stride=2)
            self.pool = nn.MaxPool2d(3, 2)
        else:
            self.stem = ConvBatchNorm(in_channels, width, 3, stride=shrinkage)
        slots = itertools.count()
        rates = iter(np.linspace(0, drop_path_rate, sum(depths)).tolist())
        channels, stages = width, []
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(
                    Residual(channels, width * 2**i, stride, block, next(rates), next(slots))
                )
                channels = EXPANSION[block] * width * 2**i
            stages.append(Stage(blocks))
        self.stages = nn.CellList(stages)
        self.drop = Dropout(drop_rate, next(slots))
        self.set_rng_slots(next(slots), (drop_rate, drop_path_rate))
        self.in_channels = in_channels
        self.num_classes = num_classes
        if num_classes:
            weight = HeUniform(negative_slope=math.sqrt(5))
            bias = Uniform(1 / math.sqrt(channels))
            self.head = nn.Dense(channels, num_classes, weight_init=weight, bias_init=bias)

    def check_size(self, image_size: int | Sequence[int]) -> tuple[int, int]:
        """Return (H, W) of an image size.

        Raises:
            UserError: the size is too small for the strides.
        """
        size = as_size(image_size)
        if min(size) < self.min_size:
            raise UserError(
                f"image_size {image_size}: the strides shrink an image {self.min_size} times, so "
                f"height and width must be {self.min_size} pixels or more"
            )
        return size

    def _forward(self, images: Tensor, bits: Tensor | None) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be [B, {self.in_channels}, H, W], not {images.shape}")
        if images.shape[2] < self.min_size or images.shape[3] < self.min_size:
            raise ValueError(f"images {images.shape}: H and W must be {self.min_size} or more")
        x = ops.relu(self.stem(images))
        if self.pools:
            x = self.pool(ops.pad(x, (1, 1, 1, 1)))  # after a ReLU, zero padding equals -infinity
        for stage in self.stages:
            x = stage(x, bits)
        return x

    def forward_features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] -> the last stage's map [B, C', H', W']."""
        return self._forward(images, self.random_bits_of(images, keys))

    def construct(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images float32 [B, C, H, W] -> logits float32 [B, num_classes].

        keys: int32 [B], one for each image, which determine drop path and dropout in training; by
        default they are drawn from MindSpore's generator.
        """
        bits = self.random_bits_of(images, keys)
        feature = self._forward(images, bits).mean((2, 3), keep_dims=True)  # [B, C', 1, 1]
        feature = self.drop(feature.reshape((images.shape[0], 1, -1)), bits)[:, 0]  # [B, C']
        if self.num_classes:
            return self.head(feature).astype(mstype.float32)
        return feature


@register_model
def resnet_50(**kwargs) -> ResNet:
    """ResNet-50 (table 1; v1.5): 25,557,032 parameters, 4.09 GMACs at 224 px."""
    return ResNet(**{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def resnet_nano(**kwargs) -> ResNet:
    """ResNet for 32 x 32 images (section 4.2) with about as many parameters as `cvt_nano`."""
    sizes = {"depths": (3, 3, 3), "block": "basic", "width": 20, "stem": "conv3"}
    return ResNet(**{**sizes, **kwargs})


@register_model
def resnet_nano_s2(**kwargs) -> ResNet:
    """`resnet_nano` with a stem of stride 2: parameters and MACs of `cvt_nano` (420,325, 11.4 M).

    `cvt_nano` halves the image at once too. Most blocks are in the last stage, which has most of
    the parameters, so that both counts match.
    """
    sizes = {"depths": (1, 2, 3), "block": "basic", "width": 21, "stem": "conv3_s2"}
    return ResNet(**{**sizes, **kwargs})
