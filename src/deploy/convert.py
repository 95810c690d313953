"""Conversion of published weights to a file of ours, checked against the network on the way."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import nn

from src.build import build_model, without_flash_attention
from src.config import Config, ModelConfig
from src.errors import UserError
from src.files import replacing, require_replaceable
from src.weights.checkpoint import read_checkpoint, read_safetensors, save_weights
from src.weights.load import load_tensors, read_weights
from src.weights.load_report import LoadReport

# (dimension, depth) of each stage; heads and strides can't be seen in the tensors.
_VARIANTS = {
    ((64, 1), (192, 2), (384, 10)): "cvt_13",
    ((64, 1), (192, 4), (384, 16)): "cvt_21",
    ((192, 2), (768, 2), (1024, 20)): "cvt_w24",
    ((32, 1), (64, 1), (128, 2)): "cvt_nano",
}


class Conversion(NamedTuple):
    """What was done: `verified` is how many tensors were compared, None where none was."""

    model: str
    report: LoadReport
    verified: int | None


def convert(
    source: Path,
    target: Path,
    model: str | None,
    config: Config | None,
    verify: bool,
    entry: str | None = None,
    force: bool = False,
) -> Conversion:
    """Load weights of any kind into their network, strictly, and save that.

    Args:
        source: what `load_weights` reads.
        target: .ckpt or .safetensors; an earlier result, with the same parameters, is replaced.
        model: a model's name; None recognises the variant by its sizes.
        config: a recipe whose model it is, instead of `model`.
        verify: read the written file again and demand the source's tensors, bit for bit.
        entry: which weights to take where the source holds several sets.
        force: replace any existing file.

    Raises:
        UserError: a source that can't be read or doesn't fit, a model that isn't recognised, a
            target that is another file, or tensors that differ; then `target` is as it was.
    """
    require_replaceable(target, "--dst", lambda path: bool(_names_in(path)), force)
    known = _parameters(config) if config else ()
    tensors, report = read_weights(source, known, entry)
    if config is None:
        config = Config(model=ModelConfig(name=model or _recognise(source, tensors)))
    if config.model.num_classes is None:
        classes = len(tensors["head.bias"]) if "head.bias" in tensors else 0
        config = _with_classes(config, classes)
    net = build_model(without_flash_attention(config)).set_train(False)
    names = {parameter.name for parameter in net.get_parameters()}
    require_replaceable(target, "--dst", lambda path: _names_in(path) == names, force)
    load_tensors(net, tensors, report)
    try:
        with replacing(target) as unproven:
            save_weights(net, unproven)
            verified = _verify(tensors, net, unproven) if verify else None
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; give another --dst") from error
    return Conversion(config.model.name, report, verified)


def _names_in(path: Path) -> set[str]:
    """The names in a file of ours; none in any other file."""
    read = read_safetensors if path.suffix == ".safetensors" else read_checkpoint
    try:
        return {*read(path).tensors}
    except UserError:
        return set()


def _with_classes(config: Config, classes: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=classes))


def _parameters(config: Config) -> set[str]:
    """The names of a network's parameters; a CvT's are known without building it."""
    if config.model.name in _VARIANTS.values():
        return set()
    net = build_model(without_flash_attention(_with_classes(config, 1)))
    return {parameter.name for parameter in net.get_parameters()}


def _recognise(source: Path, tensors: dict[str, np.ndarray]) -> str:
    sizes = []
    for stage in range(3):
        embedding = tensors.get(f"stage{stage}.patch_embed.proj.weight")
        blocks = (re.match(rf"stage{stage}\.blocks\.(\d+)\.", name) for name in tensors)
        depth = len({match[1] for match in blocks if match})
        sizes.append((0 if embedding is None else embedding.shape[0], depth))
    if tuple(sizes) not in _VARIANTS:
        dims, depths = zip(*sizes)
        raise UserError(
            f"{source}: dimensions {list(dims)} and depths {list(depths)} are of none of "
            f"{', '.join(_VARIANTS.values())}; give --config with the model's keys"
        )
    return _VARIANTS[tuple(sizes)]


def _verify(tensors: dict[str, np.ndarray], net: nn.Cell, written: Path) -> int:
    """Compare the written file with the source; no device computes anything for it.

    Position embeddings that were interpolated are compared with the network's.

    Returns:
        The number of tensors.

    Raises:
        UserError: one of them differs in a bit.
    """
    found = read_weights(written, {parameter.name for parameter in net.get_parameters()})[0]
    for parameter in net.get_parameters():
        name, there = parameter.name, parameter.asnumpy()
        if name in tensors and tensors[name].shape == there.shape:
            there = tensors[name].astype(there.dtype)
        if name not in found or found[name].tobytes() != there.tobytes():
            raise UserError(
                f"the written {name} differs from the source's: not kept; report this as a fault"
            )
    return len(found)
