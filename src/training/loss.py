"""The training loss."""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype


class LabelSmoothingCrossEntropy(nn.Cell):
    """Cross entropy against targets of 1 - smoothing on the label plus smoothing / classes on all.

    Source: `LabelSmoothingCrossEntropy` of timm and the official code's `build_criterion`. For
    mixed images the target is the mixture of two such targets, as timm's `mixup_target`; their
    cross entropies mix likewise, so nothing of [B, C] needs to be made.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = smoothing

    def construct(
        self,
        logits: Tensor,
        labels: Tensor,
        other_labels: Tensor | None = None,
        share: Tensor | None = None,
    ) -> Tensor:
        """logits float [B, C], labels int32 [B] -> mean loss, a float32 scalar.

        other_labels: int32 [B], of the images mixed in; share: of `labels`, a float32 scalar.
        """
        log_probs = ops.log_softmax(logits.astype(mstype.float32), -1)
        nll = -ops.gather_elements(log_probs, 1, labels.reshape((-1, 1))).mean()
        if other_labels is not None:
            other = -ops.gather_elements(log_probs, 1, other_labels.reshape((-1, 1))).mean()
            nll = share * nll + (1.0 - share) * other
        return (1.0 - self.smoothing) * nll - self.smoothing * log_probs.mean()
