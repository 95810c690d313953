"""Train a small segmentation head on the feature maps of `forward_pyramid`.

    python examples/segmentation.py

The head is in the style of Semantic FPN: it projects the maps to one width, resizes and adds them,
and classifies each pixel. The images are noise with a bright rectangle, so no data is needed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn, ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.models import create_model  # noqa: E402


class Segmenter(nn.Cell):
    """Images [B, 3, H, W] -> logits of each pixel, [B, classes, H, W]."""

    def __init__(self, backbone, embed_dims, classes, width=32):
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.CellList([nn.Conv2d(dim, width, 1) for dim in embed_dims])
        self.classify = nn.Conv2d(width, classes, 1)

    def construct(self, images):
        maps = self.backbone.forward_pyramid(images)
        x = 0.0
        for lateral, level in zip(self.lateral, maps):
            x = x + ops.interpolate(lateral(level), size=maps[0].shape[2:], mode="bilinear")
        return ops.interpolate(self.classify(x), size=images.shape[2:], mode="bilinear")


def batch(rng, size=4, edge=32):
    """Noise with a bright rectangle: the mask to find."""
    images = rng.normal(0, 0.3, (size, 3, edge, edge)).astype(np.float32)
    masks = np.zeros((size, edge, edge), np.int32)
    for image, mask in zip(images, masks):
        top, left = rng.integers(0, edge // 2, 2)
        image[:, top : top + edge // 2, left : left + edge // 2] += 1.0
        mask[top : top + edge // 2, left : left + edge // 2] = 1
    return ms.Tensor(images), ms.Tensor(masks)


def main() -> None:
    """Train for twelve steps and print the first and the last loss."""
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=form).parse_args()
    dims = (16, 32, 64)
    net = Segmenter(create_model("cvt_nano", embed_dims=dims, num_heads=(1, 2, 4)), dims, classes=2)
    net.set_train(True)
    optimizer = nn.Adam(net.trainable_params(), learning_rate=3e-3)

    def loss_of(images, masks):
        return ops.cross_entropy(net(images), masks)

    step = ms.value_and_grad(loss_of, None, optimizer.parameters)
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(12):
        loss, gradients = step(*batch(rng))
        optimizer(gradients)
        losses.append(float(loss.asnumpy()))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
