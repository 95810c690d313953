"""CvT: Introducing Convolutions to Vision Transformers (Wu et al., ICCV 2021, arXiv 2103.15808).

Each of the three stages starts with a convolutional token embedding, which shrinks the grid and
widens the channels, followed by transformer blocks that compute q, k and v with depthwise
convolutions. CvT needs no position embedding. This implementation equals the official
`lib/models/cls_cvt.py` up to float rounding; tools/check_device/golden has that code's numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Uniform

from src.errors import UserError
from src.models.arguments import (
    are_counts,
    as_size,
    check_count,
    check_flag,
    check_num_classes,
    check_number,
    check_rate,
)
from src.models.layers import (
    Block,
    ConvEmbed,
    LayerNorm,
    StageConfig,
    to_map,
    token_parameter,
    trunc_normal,
)
from src.models.registry import register_model
from src.models.stochastic import Dropout, StochasticNet

STAGES = 3
MAX_SIZE = 65_536  # of channels, blocks, heads, strides: beyond all networks, within memory
QKV_PROJECTIONS = ("conv", "avg", "linear")
PATCH_EMBEDS = ("conv", "patch")


class Stage(nn.Cell):
    """Token embedding, then blocks; drop path increases linearly from 0 within the stage."""

    def __init__(self, stage: StageConfig, slots: Iterator[int]) -> None:
        super().__init__()
        self.patch_embed = ConvEmbed(stage)
        self.dim, self.depth = stage.dim, stage.depth
        self.pos_embed_grid = stage.pos_embed_grid
        self.has_cls_token = stage.cls_token
        if stage.pos_embed_grid is not None:
            self.pos_embed = token_parameter(1, math.prod(stage.pos_embed_grid), stage.dim)
        if stage.cls_token:
            self.cls_token = token_parameter(1, 1, stage.dim)
        self.pos_drop = Dropout(stage.drop_rate, next(slots))
        rates = np.linspace(0, stage.drop_path_rate, stage.depth).tolist()
        self.blocks = nn.CellList([Block(stage, rate, slots) for rate in rates])

    def construct(
        self, x: Tensor, height: int, width: int, bits: Tensor | None, only_cls: bool = False
    ) -> tuple[Tensor, int, int]:
        """Run a stage.

        Args:
            x: images [B, C_in, height, width] or tokens [B, N_in, C_in] on this grid.
            only_cls: return only the class token; the last block then computes only that.

        Returns:
            Tokens [B, T, C], the class token first if there is one, or [B, 1, C]; H, W.
        """
        x, height, width = self.patch_embed(x, height, width)  # [B, N, C]
        if self.pos_embed_grid is not None:
            if self.pos_embed_grid != (height, width):
                raise ValueError(
                    f"the position embedding has a grid of {self.pos_embed_grid}, the image gives "
                    f"{(height, width)}; create the model with this image_size"
                )
            x = x + self.pos_embed
        if self.has_cls_token:
            cls = ops.broadcast_to(self.cls_token, (x.shape[0], 1, self.dim))
            x = ops.cat((cls, x), 1)  # [B, 1 + N, C]
        x = self.pos_drop(x, bits)
        for i in range(self.depth):
            x = self.blocks[i](x, height, width, bits, only_cls and i == self.depth - 1)
        return x, height, width


class CvT(StochasticNet):
    """The CvT network. Every sequence has one entry for each of the three stages.

    Args:
        embed_dims, depths, num_heads: sizes; each dimension is a multiple of its heads.
        patch_sizes, patch_strides, patch_paddings: arguments of the token embeddings.
        num_classes: outputs of the head; 0 for no head, then the network returns features [B, C].
        mlp_ratio: ratio of the MLP's hidden dimension to the embedding dimension.
        kv_stride: stride of the key and value projection (1: slower, more accurate; table 5).
        qkv_projection: "conv" | "avg" (pooled k and v, plain q) | "linear" (section 3.2; table 6).
        cls_token: whether the last stage has a class token; else the head gets the tokens' mean.
        pos_embed: learned position embedding, in all stages or in each; needs `image_size`.
        patch_embed: "conv", or "patch" for embeddings that do not overlap (table 4).
        drop_path_rate: stochastic depth, one rate or one per stage.
        drop_rate: dropout after the embeddings, the attention's output and the MLP's Linears.
        in_channels: channels of the images.
        image_size: int or (H, W), checked against the strides; only `pos_embed` needs it.

    Raises:
        UserError: an argument is invalid.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        patch_sizes: Sequence[int] = (7, 3, 3),
        patch_strides: Sequence[int] = (4, 2, 2),
        patch_paddings: Sequence[int] = (2, 1, 1),
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        kv_stride: int = 2,
        qkv_projection: str = "conv",
        cls_token: bool = True,
        pos_embed: bool | Sequence[bool] = False,
        patch_embed: str = "conv",
        drop_path_rate: float | Sequence[float] = 0.0,
        drop_rate: float = 0.0,
        in_channels: int = 3,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        pos_embeds = _per_stage("pos_embed", pos_embed)
        drop_path_rates = _per_stage("drop_path_rate", drop_path_rate)
        _check_sizes(
            {
                "embed_dims": embed_dims,
                "depths": depths,
                "num_heads": num_heads,
                "patch_sizes": patch_sizes,
                "patch_strides": patch_strides,
                "patch_paddings": patch_paddings,
            }
        )
        _check_choices(embed_dims, mlp_ratio, kv_stride, qkv_projection, patch_embed)
        check_num_classes(num_classes)
        check_count("in_channels", in_channels)
        for name, flag in (("cls_token", cls_token), *(("pos_embed", each) for each in pos_embeds)):
            check_flag(name, flag)
        for rate in drop_path_rates:
            check_rate("drop_path_rate", rate)
        check_rate("drop_rate", drop_rate)
        if patch_embed == "patch":
            patch_sizes, patch_paddings = patch_strides, (0,) * STAGES
        self.patches = tuple(zip(patch_sizes, patch_strides, patch_paddings))
        self.min_size = math.prod(patch_strides)
        grids = self.grids(image_size) if image_size is not None else [None] * STAGES
        if any(pos_embeds) and image_size is None:
            raise UserError("pos_embed: needs image_size; give that too")

        slots = itertools.count()

        def stage(i: int) -> Stage:
            config = StageConfig(
                in_channels if i == 0 else embed_dims[i - 1],
                embed_dims[i],
                *self.patches[i],
                depth=depths[i],
                num_heads=num_heads[i],
                mlp_ratio=mlp_ratio,
                kv_stride=kv_stride,
                qkv_projection=qkv_projection,
                cls_token=cls_token and i == STAGES - 1,
                pos_embed_grid=grids[i] if pos_embeds[i] else None,
                drop_rate=drop_rate,
                drop_path_rate=drop_path_rates[i],
            )
            return Stage(config, slots)

        self.stage0, self.stage1, self.stage2 = stage(0), stage(1), stage(2)
        self.set_rng_slots(next(slots), (drop_rate, *drop_path_rates))
        self.in_channels = in_channels
        self.num_classes = num_classes
        dim = embed_dims[-1]
        self.norm = LayerNorm(dim)
        if num_classes:
            bias = Uniform(1 / math.sqrt(dim))
            self.head = nn.Dense(dim, num_classes, weight_init=trunc_normal(), bias_init=bias)

    def grids(self, image_size: int | Sequence[int]) -> list[tuple[int, int]]:
        """Return the token grid (H, W) of each stage for an image size.

        Raises:
            UserError: the size is too small for the strides.
        """
        size = as_size(image_size)
        if min(size) < self.min_size:
            raise UserError(
                f"image_size {image_size}: the embeddings' strides shrink an image {self.min_size} "
                f"times, so height and width must be {self.min_size} pixels or more"
            )
        grids = []
        for kernel, stride, padding in self.patches:
            size = tuple((edge + 2 * padding - kernel) // stride + 1 for edge in size)
            grids.append(size)
        return grids

    def _forward_stages(
        self, images: Tensor, keys: Tensor | None, only_cls: bool = False
    ) -> list[tuple[Tensor, int, int]]:
        """Images [B, C, H, W] -> tokens and grid of each stage, as `Stage` returns them."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be [B, {self.in_channels}, H, W], not {images.shape}")
        if images.shape[2] < self.min_size or images.shape[3] < self.min_size:
            raise ValueError(f"images {images.shape}: H and W must be {self.min_size} or more")
        bits = self.random_bits_of(images, keys)
        first = self.stage0(images, images.shape[2], images.shape[3], bits)
        second = self.stage1(*first, bits)
        return [first, second, self.stage2(*second, bits, only_cls)]

    def forward_pyramid(self, images: Tensor) -> list[Tensor]:
        """Images [B, C, H, W] -> a map [B, C_i, H_i, W_i] per stage, for dense prediction."""
        first, second, (x, height, width) = self._forward_stages(images, None)
        x = x[:, 1:] if self.stage2.has_cls_token else x
        return [to_map(*first), to_map(*second), to_map(x, height, width)]

    def forward_features(
        self, images: Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Images [B, C, H, W] -> the last stage's map [B, C', H', W'], class token [B, C'] or None.

        The class token is the last block's output, before the final LayerNorm.
        """
        x, height, width = self._forward_stages(images, keys)[-1]
        if self.stage2.has_cls_token:
            return to_map(x[:, 1:], height, width), x[:, 0]
        return to_map(x, height, width), None

    def construct(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images float32 [B, C, H, W] -> logits float32 [B, num_classes].

        keys: int32 [B], one for each image, which determine drop path and dropout in training; by
        default they are drawn from MindSpore's generator.
        """
        has_cls = self.stage2.has_cls_token
        x, _, _ = self._forward_stages(images, keys, has_cls)[-1]
        x = x.reshape((-1, x.shape[2])) if has_cls else x  # [B, 1, C'] -> [B, C']
        feature = self.norm(x) if has_cls else self.norm(x).mean(1)  # [B, C']
        if self.num_classes:
            return self.head(feature).astype(mstype.float32)
        return feature


def _per_stage(name: str, value) -> tuple:
    if not isinstance(value, Sequence):
        return (value,) * STAGES
    if len(value) != STAGES:
        raise UserError(f"{name} {list(value)}: give one value or one for each of {STAGES} stages")
    return tuple(value)


def _check_sizes(sizes: dict[str, Sequence[int]]) -> None:
    for name, values in sizes.items():
        lowest = 0 if name == "patch_paddings" else 1
        if not are_counts(values, STAGES, lowest):
            raise UserError(f"{name} {values!r}: must be {STAGES} integers, {lowest} or more")
        if max(values) > MAX_SIZE:
            raise UserError(f"{name} {values!r}: must be at most {MAX_SIZE}")
    for dim, heads in zip(sizes["embed_dims"], sizes["num_heads"]):
        if dim % heads:
            raise UserError(f"embed_dims: {dim} is not a multiple of its num_heads, {heads}")


def _check_choices(embed_dims, mlp_ratio, kv_stride, qkv_projection, patch_embed) -> None:
    check_number("mlp_ratio", mlp_ratio)
    check_count("kv_stride", kv_stride)
    if not mlp_ratio >= 1 / min(embed_dims):
        raise UserError(f"mlp_ratio {mlp_ratio}: must give at least one hidden channel")
    if mlp_ratio * max(embed_dims) > MAX_SIZE:
        raise UserError(f"mlp_ratio {mlp_ratio}: gives more than {MAX_SIZE} hidden channels")
    if kv_stride > MAX_SIZE:
        raise UserError(f"kv_stride {kv_stride}: must be from 1 to {MAX_SIZE}")
    if qkv_projection not in QKV_PROJECTIONS:
        raise UserError(f"qkv_projection {qkv_projection!r}: choose from {QKV_PROJECTIONS}")
    if patch_embed not in PATCH_EMBEDS:
        raise UserError(f"patch_embed {patch_embed!r}: choose from {PATCH_EMBEDS}")


SIZES = {
    "cvt_13": {"embed_dims": (64, 192, 384), "depths": (1, 2, 10), "num_heads": (1, 3, 6)},
    "cvt_21": {"embed_dims": (64, 192, 384), "depths": (1, 4, 16), "num_heads": (1, 3, 6)},
    "cvt_w24": {"embed_dims": (192, 768, 1024), "depths": (2, 2, 20), "num_heads": (3, 12, 16)},
    "cvt_nano": {
        "embed_dims": (32, 64, 128),
        "depths": (1, 1, 2),
        "num_heads": (1, 2, 4),
        "patch_sizes": (5, 3, 3),
        "patch_strides": (2, 2, 2),
        "patch_paddings": (2, 1, 1),
        "mlp_ratio": 2.0,
    },
}


@register_model
def cvt_13(**kwargs) -> CvT:
    """CvT-13 (table 2): 19,997,480 parameters, 4.57 GMACs at 224 px."""
    return CvT(**{**SIZES["cvt_13"], **kwargs})


@register_model
def cvt_21(**kwargs) -> CvT:
    """CvT-21 (table 2): 31,622,696 parameters, 7.18 GMACs at 224 px."""
    return CvT(**{**SIZES["cvt_21"], **kwargs})


@register_model
def cvt_w24(**kwargs) -> CvT:
    """CvT-W24 (table 2): 277,196,392 parameters, 194 GMACs at 384 px."""
    return CvT(**{**SIZES["cvt_w24"], **kwargs})


@register_model
def cvt_nano(**kwargs) -> CvT:
    """CvT for 32 x 32 images with our own sizes; the last stage has a 4 x 4 grid."""
    return CvT(**{**SIZES["cvt_nano"], **kwargs})
