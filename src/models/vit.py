"""ViT, the baseline without convolutions (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929).

As in DeiT (Touvron et al., ICML 2021, arXiv 2012.12877, official `models.py`) without distillation:
class token, learned positions, pre-norm blocks, bias on q, k and v, drop path ramped over all
blocks, head on the class token. Parameters have timm's names, except for the norms' gamma, beta.
Shapes: B batch, C channels, N tokens of the image, T = 1 + N, h heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.errors import UserError
from src.models.arguments import (
    as_size,
    check_count,
    check_num_classes,
    check_number,
    check_rate,
)
from src.models.attention import ScaledDotProductAttention
from src.models.layers import LayerNorm, Mlp, conv2d, dense, to_tokens, token_parameter
from src.models.registry import register_model
from src.models.stochastic import Dropout, DropPath, StochasticNet

EPS = 1e-6  # as in DeiT's LayerNorms


class PatchEmbed(nn.Cell):
    """A Linear on non-overlapping patches, as a strided convolution."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = conv2d(
            in_channels, dim, patch_size, stride=patch_size, padding=0, has_bias=True
        )

    def construct(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> tokens [B, N, C]."""
        return to_tokens(self.proj(x))


class Attention(nn.Cell):
    """Multi-head self-attention with q, k and v from one Linear."""

    def __init__(self, dim: int, num_heads: int, drop_rate: float, slot: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = dense(dim, 3 * dim)
        self.attend = ScaledDotProductAttention(num_heads, self.head_dim, self.head_dim**-0.5)
        self.proj = dense(dim, dim)
        self.proj_drop = Dropout(drop_rate, slot)

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        qkv = self.qkv(x).reshape((-1, x.shape[1], 3, self.num_heads, self.head_dim))
        qkv = qkv.transpose((2, 0, 3, 1, 4))  # [3, B, h, T, C / h]
        x = self.attend(qkv[0], qkv[1], qkv[2]).transpose((0, 2, 1, 3))  # [B, T, h, C / h]
        x = x.reshape((-1, x.shape[1], self.num_heads * self.head_dim))
        return self.proj_drop(self.proj(x), bits)


class Block(nn.Cell):
    """Pre-norm transformer block: x + attention, then x + MLP, each with drop path."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        drop_rate: float,
        drop_path_rate: float,
        slots: Iterator[int],
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, EPS)
        self.attn = Attention(dim, num_heads, drop_rate, next(slots))
        self.drop_path1 = DropPath(drop_path_rate, next(slots))
        self.norm2 = LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, hidden_dim, nn.GELU(approximate=False), drop_rate, slots)
        self.drop_path2 = DropPath(drop_path_rate, next(slots))

    def construct(self, x: Tensor, bits: Tensor | None) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        x = x + self.drop_path1(self.attn(self.norm1(x), bits), bits)
        return x + self.drop_path2(self.mlp(self.norm2(x), bits), bits)


class VisionTransformer(StochasticNet):
    """The ViT network.

    Args:
        embed_dim, depth, num_heads: sizes; the dimension is a multiple of the heads.
        patch_size: edge of a patch in pixels.
        num_classes: outputs of the head; 0 for no head, then the network returns features [B, C].
        mlp_ratio: ratio of the MLP's hidden dimension to the embedding dimension.
        drop_path_rate: stochastic depth of the last block; the first has 0.
        drop_rate: dropout after the embeddings, the attention's output and the MLP's Linears.
        in_channels: channels of the images.
        image_size: int or (H, W), multiples of the patch; the position embedding fits only this.

    Raises:
        UserError: an argument is invalid.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        in_channels: int = 3,
        image_size: int | Sequence[int] = 224,
    ) -> None:
        super().__init__()
        sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        for name, value in {**sizes, "patch_size": patch_size}.items():
            check_count(name, value)
        if embed_dim % num_heads:
            raise UserError(f"embed_dim: {embed_dim} is not a multiple of num_heads, {num_heads}")
        check_number("mlp_ratio", mlp_ratio)
        if embed_dim * mlp_ratio < 1:
            raise UserError(f"mlp_ratio {mlp_ratio}: must give at least one hidden channel")
        check_num_classes(num_classes)
        check_count("in_channels", in_channels)
        check_rate("drop_path_rate", drop_path_rate)
        check_rate("drop_rate", drop_rate)
        self.image_size = as_size(image_size)
        self.patch_size = patch_size
        rows, columns = self.grid(self.image_size)

        slots = itertools.count()
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        self.cls_token = token_parameter(1, 1, embed_dim)
        self.pos_embed = token_parameter(1, 1 + rows * columns, embed_dim)
        self.pos_drop = Dropout(drop_rate, next(slots))
        hidden_dim = int(embed_dim * mlp_ratio)
        rates = np.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.CellList(
            [Block(embed_dim, num_heads, hidden_dim, drop_rate, rate, slots) for rate in rates]
        )
        self.set_rng_slots(next(slots), (drop_rate, drop_path_rate))
        self.norm = LayerNorm(embed_dim, EPS)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        if num_classes:
            self.head = dense(embed_dim, num_classes)

    def grid(self, image_size: int | Sequence[int]) -> tuple[int, int]:
        """Return rows and columns of patches in an image.

        Raises:
            UserError: patches do not divide the size.
        """
        height, width = as_size(image_size)
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"image_size {image_size}: height and width must be multiples of the patch, "
                f"{self.patch_size} pixels"
            )
        return height // self.patch_size, width // self.patch_size

    def forward_features(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] -> tokens [B, T, C'] after the last LayerNorm, class token first."""
        if images.ndim != 4 or images.shape[1:] != (self.in_channels, *self.image_size):
            raise ValueError(
                f"images must be [B, {self.in_channels}, {self.image_size[0]}, "
                f"{self.image_size[1]}], the size of the position embedding, not "
                f"{images.shape}; create the model with this image_size"
            )
        bits = self.random_bits_of(images, keys)
        x = self.patch_embed(images)  # [B, N, C']
        cls = ops.broadcast_to(self.cls_token, (x.shape[0], 1, self.embed_dim))
        x = self.pos_drop(ops.cat((cls, x.astype(cls.dtype)), 1) + self.pos_embed, bits)
        for block in self.blocks:
            x = block(x, bits)
        return self.norm(x)

    def construct(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Images float32 [B, C, H, W] -> logits float32 [B, num_classes].

        keys: int32 [B], one for each image, which determine drop path and dropout in training; by
        default they are drawn from MindSpore's generator.
        """
        feature = self.forward_features(images, keys)[:, 0]  # [B, C']
        if self.num_classes:
            return self.head(feature).astype(mstype.float32)
        return feature


@register_model
def vit_base_16(**kwargs) -> VisionTransformer:
    """ViT-B/16 (ViT, table 1; DeiT-B, table 1): 86,567,656 parameters, 17.6 GMACs at 224 px."""
    return VisionTransformer(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


@register_model
def deit_small_16(**kwargs) -> VisionTransformer:
    """DeiT-S (DeiT, table 1): 22,050,664 parameters, 4.6 GMACs at 224 px."""
    return VisionTransformer(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


@register_model
def vit_nano(**kwargs) -> VisionTransformer:
    """ViT for 32 x 32 images with our own sizes: 408,010 parameters at 10 classes."""
    sizes = {"embed_dim": 64, "depth": 8, "num_heads": 2, "patch_size": 4, "image_size": 32}
    return VisionTransformer(**{**sizes, **kwargs})


@register_model
def vit_nano_8(**kwargs) -> VisionTransformer:
    """`vit_nano` with patches of 8 pixels: 414,154 parameters at 10 classes, 7.2 MMACs.

    A ViT uses nearly every parameter once per token, so size and number of tokens determine its
    MACs. Of the patch sizes that divide 32, 8 is closest to `cvt_nano` (11.5 MMACs).
    """
    sizes = {"embed_dim": 64, "depth": 8, "num_heads": 2, "patch_size": 8, "image_size": 32}
    return VisionTransformer(**{**sizes, **kwargs})
