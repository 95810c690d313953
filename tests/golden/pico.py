"""The pico model: weights as real libraries saved them, and the official logits."""

import json
import zlib
from pathlib import Path

import mindspore as ms
import numpy as np

from src.models import create_model

FOLDER = Path(__file__).parent

FILES = (
    "pico_official.pth",
    "pico_official_fp16.pth",
    "pico_wrapped.pth",
    "pico_legacy.pth",
    "pico_hf.bin",
    "pico_hf.safetensors",
)
SIZES = {"embed_dims": (8, 16, 32), "num_heads": (1, 2, 4), "depths": (1, 2, 3)}
RECIPE = (
    "model: {name: cvt_13, embed_dims: [8, 16, 32], num_heads: [1, 2, 4], depths: [1, 2, 3], "
    "image_size: 64}\n"
)
_DESCRIPTION = json.loads((FOLDER / "pico.json").read_text())
with np.load(FOLDER / "pico.npz") as _arrays:
    LOGITS = _arrays["logits"]


def model(**options):
    """The network, freshly initialised."""
    return create_model("cvt_13", **{**SIZES, "num_classes": 10, **options}).set_train(False)


def images() -> ms.Tensor:
    """The input that belongs to the logits."""
    rng = np.random.default_rng([_DESCRIPTION["seed"], zlib.crc32(b"input")])
    return ms.Tensor(rng.standard_normal(_DESCRIPTION["input_shape"]).astype(np.float32))
