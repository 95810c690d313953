"""Images for the tests of image operations, and torchvision's normalisation."""

import io

import numpy as np
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(height, width, seed=0, grain=20):
    """Smooth colours with grain, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((width, height), Image.BICUBIC), np.int32)
    return (smooth + rng.integers(-grain, grain + 1, smooth.shape)).clip(0, 255).astype(np.uint8)


def file_of(image, kind="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def normalised(pixels):
    scaled = (np.asarray(pixels, np.float64) / 255 - MEAN) / STD
    return scaled.transpose(2, 0, 1)
