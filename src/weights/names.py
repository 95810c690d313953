"""Detect and translate the three naming schemes of CvT weights.

The official names are the reference. Our names differ in four suffixes of norm layers, Hugging
Face's (transformers, modeling_cvt.py) in those of the modules. Shapes are the same in all three.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from src.errors import UserError
from src.weights.content import short, short_names

OURS, OFFICIAL, HUGGING_FACE = "MindSpore names", "official names", "Hugging Face names"

_NORM_SUFFIXES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_NORMS = ("norm", "norm1", "norm2", "bn")
_EMBEDDING = "cvt.encoder.stages.#.embedding.convolution_embeddings"
_QKV = "attention.attention.convolution_projection_{}.convolution_projection"


def _modules() -> dict[str, str]:
    """Return the official module name for each of Hugging Face's, with # for a number."""
    block = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    for theirs in ("query", "key", "value"):
        block[f"{_QKV.format(theirs)}.convolution"] = f"attn.conv_proj_{theirs[0]}.conv"
        block[f"{_QKV.format(theirs)}.normalization"] = f"attn.conv_proj_{theirs[0]}.bn"
        block[f"attention.attention.projection_{theirs}"] = f"attn.proj_{theirs[0]}"
    return {
        "layernorm": "norm",
        "classifier": "head",
        "cvt.encoder.stages.#": "stage#",
        f"{_EMBEDDING}.projection": "stage#.patch_embed.proj",
        f"{_EMBEDDING}.normalization": "stage#.patch_embed.norm",
        **{f"cvt.encoder.stages.#.layers.#.{k}": f"stage#.blocks.#.{v}" for k, v in block.items()},
    }


_MODULES = _modules()
_OFFICIAL_MODULES = frozenset(_MODULES.values())
_SUFFIXES = {*_NORM_SUFFIXES, "cls_token", "pos_embed"}
_OUR_SUFFIXES = {*_SUFFIXES, *_NORM_SUFFIXES.values()}
_HEADLESS = "encoder.stages."
# CvT's top-level modules, and the range of dots in the names below them.
_FIRST = re.compile(r"(norm|head|layernorm|classifier)$|(stage\d+)$|(cvt|encoder)$")
_DOTS = {1: range(1, 2), 2: range(1, 7), 3: range(4, 13)}
_MAX_NAME, _MAX_PARTS = 512, 24
_NUMBER = re.compile(r"(?:(?<=^stage)|(?<=stages\.)|(?<=blocks\.)|(?<=layers\.))\d+")


def from_official(name: str) -> str | None:
    """Return our name for an official one; None if no official CvT has it."""
    module, _, suffix = name.rpartition(".")
    if _NUMBER.sub("#", module) not in _OFFICIAL_MODULES or suffix not in _SUFFIXES:
        return None
    if module.rpartition(".")[2] in _NORMS:
        suffix = _NORM_SUFFIXES.get(suffix, suffix)
    return f"{module}.{suffix}"


def from_huggingface(name: str) -> str | None:
    """Return the official name for one of Hugging Face's; None if no CvT has it there.

    CvtModel, which has no head, uses the names of CvtForImageClassification without "cvt.".
    """
    name = f"cvt.{name}" if name.startswith(_HEADLESS) else name
    module, _, suffix = name.rpartition(".")
    numbers = iter(_NUMBER.findall(module))
    template = _MODULES.get(_NUMBER.sub("#", module))
    if template is None or suffix not in _SUFFIXES:
        return None
    return f"{re.sub('#', lambda _: next(numbers), template)}.{suffix}"


def is_ours(name: str) -> bool:
    """Return whether a CvT of ours can have a parameter of this name."""
    module, _, suffix = name.rpartition(".")
    return suffix in _OUR_SUFFIXES and _NUMBER.sub("#", module) in _OFFICIAL_MODULES


def split_prefix(name: str, known: Collection[str] = ()) -> tuple[str, str] | None:
    """Split a name into a wrapper's prefix and the parameter's name: "model.", "norm.weight".

    Args:
        name: without the keys of enclosing dicts.
        known: parameter names of other networks.

    Returns:
        The shortest prefix, possibly "", that leaves a known name or one of CvT in any naming
        scheme, and that name; None if there is no such prefix.
    """
    parts = name.split(".")
    if len(name) > _MAX_NAME or len(parts) > _MAX_PARTS:
        return None
    start = 0
    for at, first in enumerate(parts):
        rest = name[start:]
        if rest in known:
            return name[:start], rest
        module = _FIRST.match(first)
        if module and len(parts) - at - 1 in _DOTS[module.lastindex] and _is_cvt_name(rest):
            return name[:start], rest
        start += len(first) + 1
    return None


def _is_cvt_name(name: str) -> bool:
    return is_ours(name) or bool(from_official(name) or from_huggingface(name))


def to_ours(names: Iterable[str], known: Collection[str] = ()) -> tuple[str, dict[str, str]]:
    """Return the naming scheme of a set of names, and our name for each.

    Names are ours if any has one of MindSpore's norm suffixes or if all are known; ours are kept
    unchanged for every network.

    Raises:
        UserError: the names mix schemes, or belong to no CvT.
    """
    names = list(names)
    ours = any(name.rpartition(".")[2] in _NORM_SUFFIXES.values() for name in names)
    ours = ours or bool(names) and all(name in known for name in names)
    huggingface = {n: from_huggingface(n) for n in names}
    official = {n: from_official(n) for n in names}
    if ours:
        naming, renamed = OURS, {name: name for name in names}
        others = {n for n in names if huggingface[n] or (official[n] or n) != n} - {*known}
        unknown: list[str] = []
    elif any(huggingface.values()):
        naming = HUGGING_FACE
        renamed = {n: name and from_official(name) for n, name in huggingface.items()}
        others = {n for n in names if official[n]}
        unknown = [n for n in names if not renamed[n] and n not in others]
    else:
        naming, renamed, others = OFFICIAL, official, set()
        unknown = [n for n in names if not official[n]]
    if others:
        example = next((n for n in names if renamed[n] and n not in others), "")
        other = next(n for n in names if n in others)
        raise UserError(
            f"mixes {naming} ({short(example)}) with others ({short(other)}); save one set alone"
        )
    if unknown:
        raise UserError(
            f"{len(unknown)} of its {len(names)} names belong to no CvT of MindSpore, Microsoft or "
            f"Hugging Face: {short_names(unknown, 3)}; give the weights of a CvT"
        )
    return naming, renamed
