"""The three sets of parameter names that CvT weights come with, and which one a file uses.

The official names are the reference: ours differ from them in four suffixes of norm layers, Hugging
Face's (transformers, modeling_cvt.py) in the modules. Shapes are the same in all three.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from src.errors import UserError
from src.weights.content import short

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
    """Hugging Face's modules with # for a number, and the official name of each."""
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
# A CvT's first modules, and the fewest and most dots of the names in them.
_FIRST = re.compile(r"(norm|head|layernorm|classifier)$|(stage\d+)$|(cvt|encoder)$")
_DOTS = {1: range(1, 2), 2: range(1, 7), 3: range(4, 13)}
_MAX_NAME, _MAX_PARTS = 512, 24
_NUMBER = re.compile(r"(?:(?<=^stage)|(?<=stages\.)|(?<=blocks\.)|(?<=layers\.))\d+")


def from_official(name: str) -> str | None:
    """Our name for an official one; None for a name that no official CvT has."""
    module, _, suffix = name.rpartition(".")
    if _NUMBER.sub("#", module) not in _OFFICIAL_MODULES or suffix not in _SUFFIXES:
        return None
    if module.rpartition(".")[2] in _NORMS:
        suffix = _NORM_SUFFIXES.get(suffix, suffix)
    return f"{module}.{suffix}"


def from_huggingface(name: str) -> str | None:
    """The official name for one of Hugging Face's; None for a name that no CvT has there.

    A CvtModel, which has no head, calls its modules as a CvtForImageClassification does, without
    the `cvt.` in front.
    """
    name = f"cvt.{name}" if name.startswith(_HEADLESS) else name
    module, _, suffix = name.rpartition(".")
    numbers = iter(_NUMBER.findall(module))
    template = _MODULES.get(_NUMBER.sub("#", module))
    if template is None or suffix not in _SUFFIXES:
        return None
    return f"{re.sub('#', lambda _: next(numbers), template)}.{suffix}"


def is_ours(name: str) -> bool:
    """Whether a CvT of ours may have a parameter of this name."""
    module, _, suffix = name.rpartition(".")
    return suffix in _OUR_SUFFIXES and _NUMBER.sub("#", module) in _OFFICIAL_MODULES


def split_prefix(name: str, known: Collection[str] = ()) -> tuple[str, str] | None:
    """Split what a wrapper put in front of a parameter's name, as "model." and "norm.weight".

    Args:
        name: without the dicts' keys above it.
        known: names of other networks' parameters.

    Returns:
        The shortest prefix, perhaps "", behind which is a name that a CvT has by any naming, or a
        known one, and that name; None where there is no such prefix.
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
        if module and len(parts) - at - 1 in _DOTS[module.lastindex] and _is_of_cvt(rest):
            return name[:start], rest
        start += len(first) + 1
    return None


def _is_of_cvt(name: str) -> bool:
    return is_ours(name) or bool(from_official(name) or from_huggingface(name))


def to_ours(names: Iterable[str], known: Collection[str] = ()) -> tuple[str, dict[str, str]]:
    """Which of the three sets the names are of, and our name for each.

    MindSpore's norm suffixes, or names that are all known, tell ours, which then stay as they are
    whatever the network.

    Raises:
        UserError: names of more than one set, or of none.
    """
    names = list(names)
    ours = any(name.rpartition(".")[2] in _NORM_SUFFIXES.values() for name in names)
    ours = ours or bool(names) and all(name in known for name in names)
    huggingface = {n: from_huggingface(n) for n in names}
    official = {n: from_official(n) for n in names}
    if ours:
        naming, renamed = OURS, {name: name for name in names}
        others = {n for n in names if huggingface[n] or (official[n] or n) != n} - {*known}
        strange: list[str] = []
    elif any(huggingface.values()):
        naming = HUGGING_FACE
        renamed = {n: name and from_official(name) for n, name in huggingface.items()}
        others = {n for n in names if official[n]}
        strange = [n for n in names if not renamed[n] and n not in others]
    else:
        naming, renamed, others = OFFICIAL, official, set()
        strange = [n for n in names if not official[n]]
    if others:
        known_one = next((n for n in names if renamed[n] and n not in others), "")
        other = next(n for n in names if n in others)
        raise UserError(
            f"mixes {naming}, as {short(known_one)}, with others, as {short(other)}; "
            "save one set alone"
        )
    if strange:
        first = ", ".join(map(short, strange[:3])) + (", ..." if len(strange) > 3 else "")
        raise UserError(
            f"{len(strange)} of its {len(names)} names belong to no CvT, neither MindSpore's nor "
            f"the official nor Hugging Face's: {first}"
        )
    return naming, renamed
