"""Builds network, data and preprocessing from a configuration."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mindspore import dtype as mstype
from mindspore import nn

from src.config import Config, ModelConfig, RuntimeConfig
from src.data import (
    Mixing,
    Preprocessing,
    Source,
    balanced_subset,
    check_files,
    create_train_operations,
    drop_broken,
    hold_out,
    missing_classes,
    open_source,
    select_classes,
)
from src.device import cache_folder, current_device, mindspore_version
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError, join_names
from src.kernels.library import BuildError, library
from src.models import create_model
from src.models.arguments import as_size
from src.models.attention import use_flash_attention
from src.models.compiled import has_plain_convolutions, use_compiled
from src.models.layers import use_shifts
from src.progress import progress_bar

logger = logging.getLogger("cvt")

MIXING_KEYS = ("mixup", "cutmix", "mixup_prob", "mixup_switch_prob")  # as Mixing's fields
SLOW_CONVOLUTIONS = (2, 9)  # from this version of MindSpore
MAX_SIDE = 8192  # pixels of a network's input
INDEX_FILE = "images.json"  # in a run's folder


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
    return use_flash_attention(net)


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
        use_shifts(net)
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


def open_split(config: Config, split: str) -> Source:
    """Open the images of "train" or "val", labelled in the order of `data.class_names`.

    Raises:
        UserError: the data or a key of `data` is invalid.
    """
    data = config.data
    folders = {"train_folder": data.train_folder, "val_folder": data.val_folder}
    for key in ("classes", "class_names"):
        names = getattr(data, key)
        twice = [name for name, count in Counter(names or ()).items() if count > 1]
        if names is not None and (twice or not names):
            what = f"names {join_names(twice)} more than once" if twice else "is empty"
            raise UserError(f"data.{key}: {what}; name each class once")
    names = None if data.classes else data.class_names
    held_out = data.val_from_train is not None
    opened = "train" if held_out else split
    source = open_source(data.source, data.path, opened, class_names=names, **folders)
    if data.classes:
        source = select_classes(source, data.classes, data.class_names)
    if split == "train":
        _check_train_classes(source, given=bool(data.class_names))
    if held_out:  # the same images for any runtime.seed, so that trials are comparable
        source = hold_out(source, data.val_from_train, seed=0)[split == "val"]
    if data.train_images and split == "train":
        classes = len(set(source.labels.tolist()))
        if data.train_images < classes:
            raise UserError(
                f"data.train_images {data.train_images}: {source.title} has {classes} classes; "
                "give one image for each, or more"
            )
        source = balanced_subset(source, data.train_images, config.runtime.seed)
    return source


def _check_train_classes(source: Source, given: bool) -> None:
    """Check which classes have images to train on.

    Args:
        source: the images for training.
        given: whether `data.class_names` may name more classes than the data have, such as those
            of pretrained weights.

    Raises:
        UserError: fewer than two classes have images, or one of the data's own has none.
    """
    counts = np.bincount(source.labels, minlength=len(source.class_names))
    present, absent = (
        [name for name, count in zip(source.class_names, counts) if bool(count) is wanted]
        for wanted in (True, False)
    )
    if len(present) < 2:
        found = f"only one class ({present[0]!r}) has images" if present else "no images"
        raise UserError(
            f"{source.title}: {found}; training needs two or more: add class folders, or name more "
            "in data.classes"
        )
    if not absent:
        return
    what = f"{source.title}: no images of {len(absent)} of {len(counts)} classes"
    if not given:
        raise UserError(
            f"{what}: {join_names(absent)}; add some, or name the others in data.classes"
        )
    logger.warning("%s: %s", what, join_names(absent))


def open_quietly(config: Config, split: str) -> Source:
    """Call `open_split` without logging, to check a split that is opened again later."""
    logger.disabled = True
    try:
        return open_split(config, split)
    finally:
        logger.disabled = False


def open_checked(
    config: Config,
    split: str,
    ranks: Ranks = SINGLE_PROCESS,
    run: Path | None = None,
    *,
    keep: bool = True,
    source: Source | None = None,
    sample: bool = False,
) -> Source:
    """Open a split as `open_split` does, without broken images; the ranks share the check.

    Args:
        config: the recipe.
        split: "train" or "val".
        ranks: the ranks that open the split.
        run: a run's folder for the index of the images unless `data.index` is set.
        keep: whether to write the index; False for a configuration that came with a checkpoint,
            which must not decide where files are written.
        source: the result of `open_split` if it was called before.
        sample: `source` has only some images, so a class may lose all of them.

    Raises:
        UserError: more images are broken than may be skipped.
    """
    if split == "train":
        check_values(config)
    else:
        build_preprocessing(config)
    data = config.data
    if source is None:
        source = open_split(config, split)
        if split == "train" and len(source) and source.file(0) is not None:
            open_quietly(config, "val")  # report its errors before any image is read
    ranks.require_agreement(f"{split} images", source.digest())
    if not len(source) or source.file(0) is None:
        return source
    if not data.check_images:
        logger.warning(
            "%s: images are not checked (data.check_images): a broken one stops the run when it is "
            "read, and a damaged header can end it without a message", source.title
        )  # fmt: skip
        return source
    index = Path(data.index).expanduser() if data.index else run and run / INDEX_FILE
    files = [source.file(k) for k in range(len(source))]
    entries = check_files(
        files, Path(data.path).expanduser(), index,
        write=keep, workers=data.workers, progress=progress_bar, ranks=ranks,
    )  # fmt: skip
    faults = {k: entry.fault for k, entry in enumerate(entries) if entry.fault}
    turned = sum(entry.turned for entry in entries)
    source.inflated = bool(turned)
    if turned and ranks.is_first:
        logger.info("%s: %d images are rotated as their EXIF data says", source.title, turned)
    skips = data.broken == "skip" or (data.broken == "auto" and split == "train")
    raise_limit = f"or raise data.broken_share (now {data.broken_share:g})"
    remedy = raise_limit if skips else "or skip them with --data.broken skip"
    kept = drop_broken(source, faults, data.broken_share if skips else 0.0, remedy)
    lost = [] if sample else missing_classes(source, kept)
    if lost:
        message = f"{source.title}: no image of {join_names(lost)} can be read"
        if split == "train":
            raise UserError(f"{message}; replace them, or remove the class folder")
        logger.warning(message)
    return kept


def resolve_classes(config: Config, source: Source) -> Config:
    """Return the configuration with the data's classes and absolute path.

    Raises:
        UserError: `model.num_classes` differs from the number of classes.
    """
    names = list(source.class_names)
    classes = config.model.num_classes or len(names)
    if classes != len(names):
        raise UserError(
            f"model.num_classes {classes}: {source.title} has {len(names)} classes; leave out "
            "the key, or name all classes in the order of the labels in data.class_names"
        )
    path = config.data.path and str(Path(config.data.path).resolve())
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=classes),
        data=dataclasses.replace(config.data, class_names=names, path=path),
    )


def check_values(config: Config) -> None:
    """Check the keys of `data` and `augment`, including ranges that only MindSpore checks.

    Raises:
        UserError: a key is invalid.
    """
    build_preprocessing(config)
    build_augmentation(config, encoded=True)
    build_mixing(config)


def build_preprocessing(config: Config) -> Preprocessing:
    """Build the preprocessing of evaluation and deployment.

    Raises:
        UserError: a value is out of range.
    """
    size = image_size(config.model)
    if max(size) > MAX_SIDE:
        raise UserError(f"model.image_size {config.model.image_size}: at most {MAX_SIDE} pixels")
    _check_normalisation("data.mean", config.data.mean, 0.0)
    _check_normalisation("data.std", config.data.std, 1e-6)
    ratio = config.data.crop_ratio
    if ratio is not None and not 0.05 <= ratio <= 1:
        raise UserError(f"data.crop_ratio {ratio}: must be from 0.05 to 1, or null for no crop")
    resize = None if ratio is None else tuple(int(side / ratio) for side in size)
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
