"""What a network looks at in a photograph, as infer.py --attention draws it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from mindspore import Tensor

from src.data import Preprocessing
from src.deploy.predictor import Predictor
from src.errors import UserError
from src.models.attention_maps import attention_maps
from src.reporting.attention import IMAGE_SUFFIXES, Panel, draw_attention

logger = logging.getLogger("cvt")


def explain_file(predictor: Predictor, file: str, output: str) -> None:
    """Draw the class token's attention in the last stage over an image; needs PyNative mode.

    Args:
        predictor: of a weight file.
        file: the image.
        output: the picture to write.

    Raises:
        UserError: an exported model, one without a class token, a folder or an unreadable file, or
            a picture that can't be written.
    """
    path = Path(output)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"--attention {path}: must end in one of {' '.join(IMAGE_SUFFIXES)}")
    net = predictor.network
    if Path(file).is_dir():
        raise UserError(f"--input {file}: is a folder; --attention draws one image, give its file")
    inputs = predictor.prepare(file)
    maps = attention_maps(net, Tensor(inputs[None]))
    best = predictor.classify(inputs[None], top_k=1)[0][0]
    even = maps.even()
    (to_keys, to_self), (to_tokens, rollout_self) = maps.heads(), maps.rollout()
    heads = maps.to_image(to_keys / even.heads()[0])[0]  # [h, H, W]
    rollout = maps.to_image(to_tokens / even.rollout()[0])[0]
    count = len(heads)
    try:
        draw_attention(
            pixels_of(inputs, predictor.preprocessing),
            f"{Path(file).name}: {best.name}, {100 * best.probability:.1f} %",
            Panel(f"last block, mean of {count} heads", heads.mean(0), to_self[0].mean()),
            Panel(f"rollout through {len(maps.mean)} blocks", rollout, rollout_self[0]),
            [Panel(f"head {i + 1}", heads[i], to_self[0, i]) for i in range(count)],
            path,
        )
    except UserError as error:
        raise UserError(f"--attention {error}") from None
    logger.info("wrote %s", path)


def pixels_of(inputs: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The network's input float32 [3, H, W] as it looks, uint8 [H, W, 3]."""
    image = inputs.transpose(1, 2, 0) * preprocessing.std + preprocessing.mean
    return np.clip(np.round(255 * image), 0, 255).astype(np.uint8)
