"""Scaled dot-product attention in plain operators or Ascend's fused kernel."""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from src.errors import UserError

# Limits of mindspore.ops.flash_attention_score, from its documentation.
HEAD_DIM_MULTIPLE, HEAD_DIM_MAX, HEADS_MAX = 16, 512, 256
BATCH_MAX, TOKENS_MAX = 2 * 1024, 512 * 1024


class ScaledDotProductAttention(nn.Cell):
    """Compute softmax(scale q k^T) v in every head, the softmax in float32.

    Args:
        num_heads, head_dim: sizes of its inputs.
        scale: factor on the scores.
    """

    def __init__(self, num_heads: int, head_dim: int, scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.flash = False
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def use_flash(self) -> None:
        """Compute in `mindspore.ops.flash_attention_score` (Ascend; float16 or bfloat16 inputs).

        It does not store the scores [B, h, T, T'], forward or backward.

        Raises:
            UserError: the kernel does not support the heads.
        """
        if self.head_dim % HEAD_DIM_MULTIPLE or self.head_dim > HEAD_DIM_MAX:
            raise UserError(
                f"flash attention needs {HEAD_DIM_MULTIPLE}, {2 * HEAD_DIM_MULTIPLE}, ... "
                f"{HEAD_DIM_MAX} channels per head, the model has {self.head_dim}; change "
                "embed_dims or num_heads, or leave out flash attention"
            )
        if self.num_heads > HEADS_MAX:
            raise UserError(
                f"flash attention supports at most {HEADS_MAX} heads, the model has "
                f"{self.num_heads}; change num_heads, or leave out flash attention"
            )
        self.flash = True

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """q [B, h, T, C / h], k [B, h, T', C / h] -> weights of v [B, h, T, T']."""
        return ops.softmax(self.scores(q * self.scale, k).astype(mstype.float32), -1)

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, h, T, C / h], k and v [B, h, T', C / h] -> [B, h, T, C / h]."""
        if self.flash:
            return self._flash(q, k, v)
        return self.mix(self.weights(q, k).astype(v.dtype), v)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype not in (mstype.float16, mstype.bfloat16):
            raise ValueError(f"flash attention needs float16 or bfloat16, not {q.dtype}")
        if q.shape[0] > BATCH_MAX or q.shape[2] > TOKENS_MAX:
            raise ValueError(
                f"flash attention supports at most {BATCH_MAX} images and {TOKENS_MAX} tokens, "
                f"not {q.shape[0]} and {q.shape[2]}"
            )
        # scalar_value multiplies q k^T; BNSD names the axes [batch, heads, tokens, channels].
        return ops.flash_attention_score(
            q, k, v, self.num_heads, scalar_value=self.scale, input_layout="BNSD"
        )


def use_flash_attention(net: nn.Cell) -> nn.Cell:
    """Switch every attention of a network to Ascend's fused kernel, in place.

    Raises:
        UserError: the kernel does not support the heads, or the network has no attention.
    """
    cells = [c for _, c in net.cells_and_names() if isinstance(c, ScaledDotProductAttention)]
    if not cells:
        raise UserError("the model has no attention; leave out flash attention")
    for cell in cells:
        cell.use_flash()
    return net
