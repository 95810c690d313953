"""Convert published weights to a checkpoint."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import nn

from src.build import build_for_weights, without_flash_attention
from src.config import Config, ModelConfig
from src.errors import UserError
from src.files import replacing, require_replaceable, sha256_of
from src.models.cvt import SIZES
from src.weights.checkpoint import read_checkpoint, read_safetensors, save_weights
from src.weights.files import unchanged
from src.weights.load import load_tensors, read_weights
from src.weights.load_report import LoadReport

# (dimension, depth) of each stage; the tensors do not tell heads and strides.
_VARIANTS = {
    tuple(zip(sizes["embed_dims"], sizes["depths"])): name for name, sizes in SIZES.items()
}


class Conversion(NamedTuple):
    """The result of `convert`.

    Args:
        model: the model's name.
        report: what happened to each tensor.
        verified: the number of compared tensors; None without a comparison.
        sources: the SHA-256 of each file that was read.
    """

    model: str
    report: LoadReport
    verified: int | None
    sources: dict[Path, str]


def convert(
    source: Path,
    target: Path,
    model: str | None,
    config: Config | None,
    verify: bool,
    entry: str | None = None,
    force: bool = False,
) -> Conversion:
    """Load weights of any kind into their network, strictly, and save it.

    Args:
        source: a file or folder that `load_weights` reads.
        target: .ckpt or .safetensors; an existing file may only hold the same tensors.
        model: the model's name; None recognises the variant by its sizes.
        config: a recipe of the model, instead of `model`.
        verify: read the written file again and compare its tensors bitwise with the source's.
        entry: the set of weights to use if the source has several.
        force: replace any existing file.

    Raises:
        UserError: the source can't be read or doesn't fit, the model isn't recognised, the target
            is another file, or tensors differ. `target` is unchanged then.
    """
    require_replaceable(target, "--dst", lambda path: bool(_read_tensors(path)), force)
    known = _parameter_names(config) if config else ()
    with unchanged(source) as files:
        sources = {file: sha256_of(file) for file in files}
        tensors, report = read_weights(source, known, entry)
    if config is None:
        config = Config(model=ModelConfig(name=model or _recognise(source, tensors)))
    if config.model.num_classes is None:
        classes = _first_dimension(source, tensors, "head.bias", 1)
        config = _with_classes(config, classes)
    net = build_for_weights(without_flash_attention(config)).set_train(False)
    load_tensors(net, tensors, report)
    found = {} if force else _read_tensors(target)
    weights = {parameter.name: parameter.asnumpy() for parameter in net.get_parameters()}
    # Even a file with the same names may be another's only copy, such as a run's best.ckpt.
    if found and (
        found.keys() != weights.keys()
        or any(found[name].tobytes() != weights[name].tobytes() for name in found)
    ):
        raise UserError(
            f"--dst {target}: exists and holds other weights; give another name, or add --force to "
            "replace it"
        )
    try:
        with replacing(target) as unfinished:
            save_weights(net, unfinished)
            verified = _verify(tensors, net, unfinished) if verify else None
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; give another --dst") from error
    return Conversion(config.model.name, report, verified, sources)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a .ckpt or .safetensors; none for any other file."""
    read = read_safetensors if path.suffix == ".safetensors" else read_checkpoint
    try:
        return read(path).tensors
    except UserError:
        return {}


def _with_classes(config: Config, classes: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=classes))


def _parameter_names(config: Config) -> set[str]:
    """Return the names of a network's parameters; none for a CvT, whose names are known."""
    if config.model.name in _VARIANTS.values():
        return set()
    net = build_for_weights(without_flash_attention(_with_classes(config, 1)))
    return {parameter.name for parameter in net.get_parameters()}


def _recognise(source: Path, tensors: dict[str, np.ndarray]) -> str:
    """Return the name of the CvT variant with the sizes of these tensors."""
    sizes = []
    for stage in range(3):
        width = _first_dimension(source, tensors, f"stage{stage}.patch_embed.proj.weight", 4)
        blocks = (re.match(rf"stage{stage}\.blocks\.(\d+)\.", name) for name in tensors)
        depth = len({match[1] for match in blocks if match})
        sizes.append((width, depth))
    if tuple(sizes) not in _VARIANTS:
        dims, depths = zip(*sizes)
        raise UserError(
            f"{source}: dimensions {list(dims)} and depths {list(depths)} match none of "
            f"{', '.join(_VARIANTS.values())}; give --config with the model's keys"
        )
    return _VARIANTS[tuple(sizes)]


def _first_dimension(
    source: Path, tensors: dict[str, np.ndarray], name: str, dimensions: int
) -> int:
    """Return the first dimension of a tensor; 0 if the file has no such tensor.

    Raises:
        UserError: the tensor has another number of dimensions.
    """
    if name not in tensors:
        return 0
    shape = tensors[name].shape
    if len(shape) != dimensions:
        raise UserError(
            f"{source}: {name} has shape {list(shape)}, must have {dimensions} dimension"
            f"{'s' * (dimensions > 1)}; the file is damaged or of another model"
        )
    return shape[0]


def _verify(tensors: dict[str, np.ndarray], net: nn.Cell, written: Path) -> int:
    """Compare the written file bitwise with the source, without computing anything.

    Interpolated position embeddings are compared with the network's.

    Returns:
        The number of tensors.

    Raises:
        UserError: a tensor differs.
    """
    found = read_weights(written, {parameter.name for parameter in net.get_parameters()})[0]
    for parameter in net.get_parameters():
        name, expected = parameter.name, parameter.asnumpy()
        if name in tensors and tensors[name].shape == expected.shape:
            expected = tensors[name].astype(expected.dtype)
        if name not in found or found[name].tobytes() != expected.tobytes():
            raise UserError(f"the written {name} differs from the source's: not kept; report a bug")
    return len(found)
