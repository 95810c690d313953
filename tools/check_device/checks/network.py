"""Compares logits of whole networks with the official implementation's."""

from __future__ import annotations

from mindspore import nn

from src.build import accelerate, set_precision
from src.config import RuntimeConfig
from src.device import current_device
from src.models.attention import use_flash_attention
from tools.check_device.compare import by_largest, check_limits
from tools.check_device.golden import official
from tools.check_device.limits import limit
from tools.check_device.registry import Finding, NotHere, Setting

SMALL = ("nano_64", "nano_kv1_64", "nano_avg_64", "nano_nocls_64")
LARGE = "cvt_13_224"
CASES = {case["tag"]: case for case in official.DESCRIPTION["cases"]}


def float32(setting: Setting) -> Finding:
    """Check small networks and CvT-13; with --full every golden case, including CvT-W24."""
    tags = tuple(CASES) if setting.full else (*SMALL, LARGE)
    return _compare_logits("float32", tags, lambda net: accelerate(net, RuntimeConfig()))


def float16(setting: Setting) -> Finding:
    """Check Linears, convolutions and attention products in float16."""
    tags = SMALL[:1] if current_device() == "CPU" else (SMALL[0], LARGE)
    return _compare_logits("float16", tags, lambda net: set_precision(net, "float16"))


def bfloat16(setting: Setting) -> Finding:
    """Check the same in bfloat16."""
    if current_device() != "Ascend":
        raise NotHere("MindSpore has bfloat16 kernels for Ascend only")
    return _compare_logits(
        "bfloat16", (SMALL[0], LARGE), lambda net: set_precision(net, "bfloat16")
    )


def flash(setting: Setting) -> Finding:
    """Check attention in Ascend's fused kernel in float16."""
    if current_device() != "Ascend":
        raise NotHere("the kernel exists on Ascend only")
    if _soc_version() == "ascend910":
        raise NotHere(
            "the kernel is documented for Atlas A2 only; this is an Atlas training card (910)"
        )
    tags = (SMALL[0], LARGE)
    return _compare_logits(
        "float16", tags, lambda net: use_flash_attention(set_precision(net, "float16"))
    )


def _soc_version() -> str:
    """Return the card's type such as "ascend910b", or "" if MindSpore does not report it."""
    try:
        from mindspore._c_expression import MSContext

        return MSContext.get_instance().get_ascend_soc_version()
    except (ImportError, AttributeError):
        return ""


def _compare_logits(precision: str, tags: tuple[str, ...], prepare) -> Finding:
    differences = {}
    for tag in tags:
        case = CASES[tag]
        net: nn.Cell = prepare(official.model(case))
        found = net(official.images(case)).asnumpy()
        differences[tag] = by_largest(found, official.REFERENCE[f"{tag}/logits"])
    return check_limits(differences, limit("logits", precision))
