"""Draw a network's attention over an image, for infer.py --attention."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor

from src.data import Preprocessing
from src.deploy.loaded_model import EXPORTED_SUFFIXES
from src.deploy.predictor import Predictor
from src.errors import UserError, printable
from src.models.attention_maps import attention_maps
from src.plots.attention_overlay import IMAGE_SUFFIXES, Panel, draw_attention
from src.plots.image_files import check_picture

logger = logging.getLogger("cvt")


def check_attention(model: str, files: Sequence[str], output: str, force: bool) -> None:
    """Check the arguments of --attention before the model is loaded.

    Args:
        model: the value of --model.
        files: the values of --input; exactly one image is drawn.
        output: the picture to write.
        force: replace any existing file.

    Raises:
        UserError: the model is an exported file, there are several inputs or a folder, or the
            picture can't be written.
    """
    if Path(model).suffix in EXPORTED_SUFFIXES:
        raise UserError(
            f"--attention: {model} is an exported file, whose layers are not accessible; give the "
            "weights"
        )
    if len(files) > 1:
        raise UserError(f"--input: {len(files)} inputs; --attention draws one image, give its file")
    if Path(files[0]).is_dir():
        raise UserError(
            f"--input {files[0]}: is a folder; --attention draws one image, give its file"
        )
    check_picture(output, "--attention", IMAGE_SUFFIXES, force)


def save_attention(predictor: Predictor, inputs: np.ndarray, name: str, path: str | Path) -> None:
    """Draw the class token's attention in the last stage over an image; needs PyNative mode.

    Args:
        predictor: a predictor of weights.
        inputs: the result of `predictor.prepare`, float32 [3, H, W].
        name: the image's name, for the title.
        path: the picture to write.

    Raises:
        UserError: the model is an exported file or has no class token, or the picture can't be
            written.
    """
    maps = attention_maps(predictor.network, Tensor(inputs[None]))
    best = predictor.classify(inputs[None], top_k=1)[0][0]
    even = maps.uniform()
    (to_keys, to_self), (to_tokens, rollout_self) = maps.heads(), maps.rollout()
    heads = maps.to_image(to_keys / even.heads()[0])[0]  # [h, H, W]
    rollout = maps.to_image(to_tokens / even.rollout()[0])[0]
    count = len(heads)
    draw_attention(
        denormalize(inputs, predictor.preprocessing),
        f"{printable(name)}: {printable(best.name)}, {100 * best.probability:.1f} %",
        Panel(f"last block, mean of {count} heads", heads.mean(0), to_self[0].mean()),
        Panel(f"rollout through {len(maps.mean)} blocks", rollout, rollout_self[0]),
        [Panel(f"head {i + 1}", heads[i], to_self[0, i]) for i in range(count)],
        Path(path),
    )
    logger.info("wrote %s", path)


def denormalize(inputs: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Convert a network's input, float32 [3, H, W], back to pixels, uint8 [H, W, 3]."""
    image = inputs.transpose(1, 2, 0) * preprocessing.std + preprocessing.mean
    return np.clip(np.round(255 * image), 0, 255).astype(np.uint8)
