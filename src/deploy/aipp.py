"""Configure AIPP, the preprocessing unit of Ascend's inference chips."""

from __future__ import annotations

from pathlib import Path

from src.deploy.description import read_description

_TEMPLATE = """\
aipp_op {{
    aipp_mode: static
    input_format: RGB888_U8
    src_image_size_w: {width}
    src_image_size_h: {height}
    csc_switch: false
    rbuv_swap_switch: false
{channels}}}
"""


def aipp_config(model: str | Path) -> str:
    """Return the text for ATC's --insert_op_conf that lets the chip normalise uint8 pixels.

    The converted model then takes uint8 [B, H, W, 3] in RGB, resized and cropped on the host, and
    AIPP computes (pixel - min_chn) * var_reci_chn for each channel (CANN, "Normalization
    Configuration"): min_chn is 255 * mean, var_reci_chn 1 / (255 * std).

    Args:
        model: an exported file with its .json beside it.

    Raises:
        UserError: the .json is missing or invalid.
    """
    preprocessing = read_description(model)["preprocessing"]
    height, width = preprocessing.image_size
    channels = "".join(
        f"    min_chn_{i}: {255 * mean:.9g}\n    var_reci_chn_{i}: {1 / (255 * std):.9g}\n"
        for i, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std))
    )
    return _TEMPLATE.format(width=width, height=height, channels=channels)
