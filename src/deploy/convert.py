"""Conversion of published weights to a file of ours, checked against the network on the way."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn, ops

from src.config import Config, ModelConfig
from src.errors import UserError
from src.files import replacing
from src.recipe import build_model, image_size, without_flash_attention
from src.weights.checkpoint import save_weights
from src.weights.load import load_tensors, load_weights, read_weights
from src.weights.report import LoadReport

# (dimension, depth) of each stage; heads and strides can't be seen in the tensors.
_VARIANTS = {
    ((64, 1), (192, 2), (384, 10)): "cvt_13",
    ((64, 1), (192, 4), (384, 16)): "cvt_21",
    ((192, 2), (768, 2), (1024, 20)): "cvt_w24",
    ((32, 1), (64, 1), (128, 2)): "cvt_nano",
}


class Conversion(NamedTuple):
    """What was done: `difference` is of the logits, None where they were not compared."""

    model: str
    report: LoadReport
    difference: float | None


def convert(
    source: Path, target: Path, model: str | None, config: Config | None, verify: bool
) -> Conversion:
    """Load a weight file of any kind into its network, strictly, and save that.

    Args:
        source: what `load_weights` reads.
        target: .ckpt or .safetensors; is replaced if it exists.
        model: a model's name; None recognises the variant by its sizes.
        config: a recipe whose model it is, instead of `model`.
        verify: demand that the source and the written file give equal logits.

    Raises:
        UserError: a source that can't be read or doesn't fit, a model that isn't recognised, or
            logits that differ; then `target` is as it was.
    """
    tensors, report = read_weights(source)
    if config is None:
        config = Config(model=ModelConfig(name=model or _recognise(source, tensors)))
    if config.model.num_classes is None:
        classes = len(tensors["head.bias"]) if "head.bias" in tensors else 0
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, num_classes=classes)
        )
    net = build_model(without_flash_attention(config)).set_train(False)
    load_tensors(net, tensors, report)
    del tensors
    try:
        with replacing(target) as unproven:
            save_weights(net, unproven)
            difference = _verify(net, unproven, config) if verify else None
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; give another --dst") from error
    return Conversion(config.model.name, report, difference)


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


def _verify(net: nn.Cell, written: Path, config: Config) -> float:
    """Largest difference of the logits between the network as it is and the written file.

    Raises:
        UserError: there is one.
    """
    noise = np.random.default_rng(0).standard_normal((1, 3, *image_size(config.model)))
    images = Tensor(noise.astype(np.float32))
    expected = net(images).asnumpy()
    for parameter in net.get_parameters():  # so that nothing of the source is left
        ops.assign(parameter, ops.zeros_like(parameter))
    load_weights(net, written)
    difference = float(np.abs(net(images).asnumpy() - expected).max())
    if difference != 0:
        raise UserError(
            f"the written weights' logits differ by {difference:.1e} from the source's: not kept; "
            "report this as a fault"
        )
    return difference
