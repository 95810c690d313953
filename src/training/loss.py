"""The training loss: cross entropy with label smoothing."""

from __future__ import annotations

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype


class LabelSmoothingCrossEntropy(nn.Cell):
    """Cross entropy with smoothed targets: 1 - smoothing on the label, smoothing / C on each class.

    Matches timm's `LabelSmoothingCrossEntropy`, which the official code uses. For mixed images the
    target is a mixture of two such targets, as in timm's `mixup_target`; mixing the two losses
    gives the same value without building [B, C] targets.
    """

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        self.smoothing = smoothing

    def construct(
        self,
        logits: Tensor,
        labels: Tensor,
        other_labels: Tensor | None = None,
        fraction: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean loss.

        Args:
            logits: float [B, C].
            labels: int32 [B].
            other_labels: int32 [B], labels of the images mixed in.
            fraction: weight of `labels` against `other_labels`, a float32 scalar.

        Returns:
            float32 scalar.
        """
        log_probs = ops.log_softmax(logits.astype(mstype.float32), -1)
        nll = -ops.gather_elements(log_probs, 1, labels.reshape((-1, 1))).mean()
        if other_labels is not None:
            other = -ops.gather_elements(log_probs, 1, other_labels.reshape((-1, 1))).mean()
            nll = fraction * nll + (1.0 - fraction) * other
        return (1.0 - self.smoothing) * nll - self.smoothing * log_probs.mean()
