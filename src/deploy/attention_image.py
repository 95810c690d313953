"""What a network looks at in a photograph, as infer.py --attention draws it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mindspore import Tensor

from src.data import Preprocessing
from src.deploy.predictor import Predictor
from src.errors import UserError, printable
from src.files import require_replaceable
from src.models.attention_maps import attention_maps
from src.plots.attention_overlay import IMAGE_SUFFIXES, Panel, draw_attention
from src.plots.image_files import is_picture_of_ours

logger = logging.getLogger("cvt")


def check_attention(files: Sequence[str], output: str, force: bool = False) -> None:
    """Check the command line's words for a picture of the attention, before any work.

    Args:
        files: the inputs; one image is drawn.
        output: the picture to write.
        force: replace also a file that is no earlier picture.

    Raises:
        UserError: several inputs or a folder, or a picture that can't be written.
    """
    if Path(output).suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"--attention {output}: must end in one of {' '.join(IMAGE_SUFFIXES)}")
    if len(files) > 1:
        raise UserError(f"--input: {len(files)} inputs; --attention draws one image, give its file")
    if Path(files[0]).is_dir():
        raise UserError(
            f"--input {files[0]}: is a folder; --attention draws one image, give its file"
        )
    require_replaceable(output, "--attention", is_picture_of_ours, force)


def explain_file(predictor: Predictor, file: str, output: str, force: bool = False) -> None:
    """Draw the class token's attention in the last stage over an image; needs PyNative mode.

    Args:
        predictor: of a weight file.
        file: the image.
        output: the picture to write.
        force: replace also a file that is no earlier picture.

    Raises:
        UserError: an exported model, one without a class token, a folder or an unreadable file, or
            a picture that can't be written.
    """
    check_attention([file], output, force)
    explain_image(predictor, predictor.prepare(file), Path(file).name, Path(output))
    logger.info("wrote %s", output)


def explain_image(predictor: Predictor, inputs: np.ndarray, name: str, path: Path) -> None:
    """Draw the attention over an image that `predictor.prepare` made; needs PyNative mode.

    Args:
        predictor: of a weight file.
        inputs: float32 [3, H, W].
        name: of the image, for the title.
        path: of the picture.

    Raises:
        UserError: an exported model, one without a class token, or a picture that can't be written.
    """
    maps = attention_maps(predictor.network, Tensor(inputs[None]))
    best = predictor.classify(inputs[None], top_k=1)[0][0]
    even = maps.uniform()
    (to_keys, to_self), (to_tokens, rollout_self) = maps.heads(), maps.rollout()
    heads = maps.to_image(to_keys / even.heads()[0])[0]  # [h, H, W]
    rollout = maps.to_image(to_tokens / even.rollout()[0])[0]
    count = len(heads)
    draw_attention(
        pixels_of(inputs, predictor.preprocessing),
        f"{printable(name)}: {printable(best.name)}, {100 * best.probability:.1f} %",
        Panel(f"last block, mean of {count} heads", heads.mean(0), to_self[0].mean()),
        Panel(f"rollout through {len(maps.mean)} blocks", rollout, rollout_self[0]),
        [Panel(f"head {i + 1}", heads[i], to_self[0, i]) for i in range(count)],
        path,
    )


def pixels_of(inputs: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The network's input float32 [3, H, W] as it looks, uint8 [H, W, 3]."""
    image = inputs.transpose(1, 2, 0) * preprocessing.std + preprocessing.mean
    return np.clip(np.round(255 * image), 0, 255).astype(np.uint8)
