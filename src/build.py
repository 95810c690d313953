"""Builds network, preprocessing and augmentation from a configuration."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mindspore import dtype as mstype
from mindspore import nn

from src.config import Config, ModelConfig, RuntimeConfig
from src.data import Mixing, Preprocessing, create_train_operations
from src.device import cache_folder, current_device, mindspore_version
from src.errors import UserError
from src.kernels.library import BuildError, library
from src.models import create_model, uninitialised
from src.models.arguments import as_size
from src.models.attention import use_flash_attention
from src.models.compiled import has_plain_convolutions, use_compiled
from src.models.layers import use_shifts

logger = logging.getLogger("cvt")

MIXING_KEYS = ("mixup", "cutmix", "mixup_prob", "mixup_switch_prob")  # as Mixing's fields
SLOW_CONVOLUTIONS = (2, 9)  # from this version of MindSpore
MAX_SIDE = 4096  # pixels of an image before and after the crop; exported files have this limit


def image_size(config: ModelConfig) -> tuple[int, int]:
    """Return (height, width) in pixels.

    Raises:
        UserError: the size is invalid.
    """
    try:
        return as_size(config.image_size)
    except UserError as error:
        raise UserError(f"model.{error}") from None


def build_model(config: Config) -> nn.Cell:
    """Build the network with new weights; `model.num_classes` must be set.

    Raises:
        UserError: a key of `model` is invalid.
    """
    arguments = {k: v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    name, classes = arguments.pop("name"), arguments.pop("num_classes")
    net = set_precision(create_model(name, classes, **arguments), config.runtime.precision)
    return set_attention(net, config.runtime)


def build_for_weights(config: Config) -> nn.Cell:
    """Build the network as `build_model` does, for a weight file: nothing is initialised.

    Initialising takes seconds for a large network. A parameter that no file sets is initialised
    when it is first used.
    """
    with uninitialised():
        return build_model(config)


def set_precision(net: nn.Cell, precision: str) -> nn.Cell:
    """Let Linears, convolutions and thus attention products compute in a precision, in place.

    Weights stay float32; norms, softmax and loss cast to float32 themselves.
    """
    if precision != "float32":
        for _, cell in net.cells_and_names():
            if isinstance(cell, (nn.Dense, nn.Conv2d)):
                cell.to_float(getattr(mstype, precision))
    return net


def set_attention(net: nn.Cell, runtime: RuntimeConfig) -> nn.Cell:
    """Switch attention to Ascend's fused kernel if the configuration says so, in place.

    Raises:
        UserError: the kernel does not support the device, the precision or the network.
    """
    if not runtime.flash_attention:
        return net
    device = current_device()
    if device != "Ascend":
        raise UserError(
            f"runtime.flash_attention: is for Ascend, this runs on {device}; leave it out"
        )
    if runtime.precision == "float32":
        raise UserError(
            "runtime.flash_attention: the kernel has no float32; set runtime.precision to float16 "
            "or bfloat16"
        )
    try:
        return use_flash_attention(net)
    except UserError as error:
        raise UserError(f"runtime.flash_attention: {error}") from None


def uses_compiled(runtime: RuntimeConfig) -> bool:
    """Return whether networks compute in compiled operators; raises as `compiled_library`."""
    return compiled_library(runtime) is not None


def compiled_library(runtime: RuntimeConfig) -> Path | None:
    """Return the library of compiled operators, or None if they are not used.

    The log gives the reason if they could be used but not built.

    Raises:
        UserError: they are required but not available.
    """
    required = runtime.compiled_ops == "always"
    if runtime.compiled_ops == "never":
        return None
    device = current_device()
    if device != "CPU" or runtime.precision != "float32":
        if required:
            raise UserError(
                "runtime.compiled_ops always: they are for the CPU in float32, this runs on "
                f"{device} in {runtime.precision}; leave out the key"
            )
        return None
    try:
        if runtime.mode == "pynative" and int(np.__version__.split(".")[0]) >= 2:
            raise BuildError("with NumPy 2, MindSpore runs them in graph mode only")
        return library(cache_folder())
    except BuildError as error:
        if required:
            raise UserError(f"runtime.compiled_ops always: {error}") from None
        logger.info("running without compiled operators, which is slower: %s", error)
        return None


def accelerate(net: nn.Cell, runtime: RuntimeConfig) -> nn.Cell:
    """Switch a network to the operators of the configuration, in place; do not export the
    network afterwards.

    Raises:
        UserError: they are required but not available.
    """
    if runtime.depthwise == "shifts":
        try:
            use_shifts(net)
        except UserError as error:
            raise UserError(f"runtime.depthwise shifts: {error}") from None
    path = compiled_library(runtime)
    if path is not None:
        use_compiled(net, path)
    if (
        current_device() == "CPU"
        and mindspore_version() >= SLOW_CONVOLUTIONS
        and has_plain_convolutions(net)
    ):
        logger.warning(
            "this MindSpore computes convolutions on the CPU about 100 times slower than 2.8: "
            "install mindspore 2.8, or for CvT a C++ compiler (runtime.compiled_ops)"
        )
    return net


def without_flash_attention(config: Config) -> Config:
    """Return the configuration without flash attention, for other devices than Ascend."""
    runtime = dataclasses.replace(config.runtime, flash_attention=False)
    return dataclasses.replace(config, runtime=runtime)


def check_values(config: Config) -> None:
    """Check the keys of `data`, `augment` and others, with ranges that only MindSpore checks.

    Raises:
        UserError: a key is invalid.
    """
    build_preprocessing(config)
    build_augmentation(config, encoded=True)
    build_mixing(config)
    if np.float32(max(config.optimizer.betas)) == 1:
        raise UserError(f"optimizer.betas {config.optimizer.betas}: 1 in float32; lower them")
    if np.float32(config.optimizer.eps) == 0:
        raise UserError(f"optimizer.eps {config.optimizer.eps}: 0 in float32; raise it")
    scale = config.training.loss_scale
    if scale != "dynamic" and not 2.0**-14 <= scale <= 2.0**24:
        raise UserError(f"training.loss_scale {scale}: must be from 2^-14 to 2^24, or dynamic")


def build_preprocessing(config: Config) -> Preprocessing:
    """Build the preprocessing of evaluation and deployment.

    Raises:
        UserError: a value is out of range.
    """
    size = image_size(config.model)
    _check_normalisation("data.mean", config.data.mean, 0.0)
    _check_normalisation("data.std", config.data.std, 1e-6)
    ratio = config.data.crop_ratio
    if ratio is not None and not 0.05 <= ratio <= 1:
        raise UserError(f"data.crop_ratio {ratio}: must be from 0.05 to 1, or null for no crop")
    resize = None if ratio is None else tuple(int(side / ratio) for side in size)
    if max(resize or size) > MAX_SIDE:
        raise UserError(
            f"model.image_size {config.model.image_size}: images would be resized to "
            f"{max(resize or size)} pixels, at most {MAX_SIDE} are possible; lower it"
        )
    if resize is not None and resize[0] == resize[1]:
        resize = resize[0]
    return Preprocessing(size, resize, config.data.mean, config.data.std, config.data.interpolation)


def _check_normalisation(key: str, values: Sequence[float], least: float) -> None:
    if all(least <= value <= 1 for value in values):
        return
    bytes_ = all(least <= value <= 255 for value in values)
    hint = "; they seem to be for pixels of 0..255, divide them by 255" if bytes_ else ""
    raise UserError(
        f"{key} {list(values)}: each must be from {least:g} to 1, for pixels of 0..1{hint}"
    )


def build_augmentation(config: Config, encoded: bool) -> list:
    """Build the operations on a training image, without mixing and `augment.repeats`."""
    others = (*MIXING_KEYS, "repeats")
    keys = {k: v for k, v in dataclasses.asdict(config.augment).items() if k not in others}
    return create_train_operations(
        image_size(config.model),
        config.data.mean,
        encoded=encoded,
        interpolation=config.data.interpolation,
        **keys,
    )


def build_mixing(config: Config) -> Mixing:
    """Build mixup and cutmix of training batches."""
    return Mixing(*(getattr(config.augment, key) for key in MIXING_KEYS))
