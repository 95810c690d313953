"""Open the validation split with the labels that `data.labels` selects."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from pathlib import Path
from typing import Any, NamedTuple

from src.build import build_preprocessing
from src.config import Config, ModelConfig
from src.config_io import run_config_of
from src.data import Source
from src.data.imagenet_labels import (
    V2_FOLDERS,
    apply_real_labels,
    apply_v2_names,
    check_class_order,
    find_class_order_fault,
    load_real,
    synsets,
)
from src.distributed import SINGLE_PROCESS, Ranks
from src.errors import UserError, join_names
from src.models.cvt import SIZES, CvT
from src.splits import absolute_path, open_checked, open_quietly
from src.weights.origin import are_imagenet, class_names_of, run_settings
from src.weights.pretrained import SHAPELESS

logger = logging.getLogger("cvt")


class LabeledSplit(NamedTuple):
    """A split and, with ReaL labels, the correct classes of each image."""

    source: Source
    label_lists: list[list[int]] | None = None


def with_class_names(config: Config, checkpoint: str | Path) -> Config:
    """Return the configuration with the class names of its weights, where it has none itself.

    Opening the images then sorts them by these names, or raises if they have other classes.
    ImageNet's are left to `check_class_order`, because its folders have the names of synsets.
    """
    names = None
    if config.data.labels == "val" and not config.data.class_names:
        names = class_names_of(checkpoint, config.model.num_classes)
        is_imagenet = config.model.num_classes == len(synsets())  # see `check_class_order`
        if (
            names is None
            and not is_imagenet
            and config.data.source in ("imagefolder", "mindrecord")
        ):
            logger.warning(
                "%s: its class names are unknown; they are taken to be the data's, in the data's "
                "order (data.class_names sets another)", checkpoint,
            )  # fmt: skip
    if names is None or are_imagenet(names) or len({*names}) < len(names):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=names))


def compare_with_run(
    checkpoint: str | Path, config: Config, *, class_names: bool = True, sizes: bool = True
) -> None:
    """Log a warning if the run of the weights had other settings that no tensor's shape shows.

    Args:
        checkpoint: the weight file or its folder.
        config: the recipe that is used with them.
        class_names: compare the class names, too.
        sizes: compare the size of the images, too.
    """
    run = _settings_of_run(checkpoint)
    if run is None:
        return
    before, used = (
        {
            **dataclasses.asdict(build_preprocessing(each)),
            **{f"model.{key}": _shapeless(each.model, key) for key in SHAPELESS},
        }
        for each in (run, config)
    )
    changed = [
        f"{key} {before[key]}, not {value}"
        for key, value in used.items()
        if before[key] != value and (sizes or key not in ("image_size", "resize"))
    ]
    names = run.data.class_names, config.data.class_names
    if class_names and all(names) and names[0] != names[1]:
        changed.append(f"the classes {join_names(names[0])}, not {join_names(names[1])}")
    if changed:
        logger.warning("%s: its run had %s", checkpoint, "; ".join(changed))


def _shapeless(model: ModelConfig, key: str) -> Any:
    """Return the value of a key; for null, that of the CvT variant, or None for another model."""
    value = getattr(model, key)
    if value is None and model.name in SIZES:
        default = inspect.signature(CvT.__init__).parameters[key].default
        value = SIZES[model.name].get(key, default)
    return list(value) if isinstance(value, tuple) else value


def _settings_of_run(checkpoint: str | Path) -> Config | None:
    """Return the settings of the weights' run, or None if they are unknown."""
    try:
        return run_settings(checkpoint)
    except UserError:  # another program's config.yaml
        return None


def warn_trained_before(config: Config, held_out: Source, weights: str) -> None:
    """Warn if the run of the weights trained on images that now measure accuracy.

    With other classes or another number, `data.val_from_train` holds out other images.
    """
    data = config.data
    path = absolute_path(data.path)
    run = _settings_of_run(weights)
    if data.val_from_train is None or run is None:
        return
    if (run.data.source, run.data.path) != (data.source, path) or run.data == data:
        return
    try:
        trained = open_quietly(run, "train")
    except UserError:  # the images have changed since
        return
    before, now = (
        {source.file(k) or int(source.items[k]) for k in range(len(source))}
        for source in (trained, held_out)
    )
    if before & now:
        logger.warning(
            "%s: its run trained on %d of the %d images that data.val_from_train %d now holds out, "
            "so accuracy is too high; evaluate on other images, or start from other weights",
            weights, len(before & now), len(now), data.val_from_train,
        )  # fmt: skip


def open_labeled_split(
    config: Config, checkpoint: str, ranks: Ranks = SINGLE_PROCESS, keep_index: bool = False
) -> LabeledSplit:
    """Open and check a configuration's validation split under its label protocol.

    Args:
        config: the recipe.
        checkpoint: the weight file; its run folder may hold an image index.
        ranks: the ranks that open the split.
        keep_index: write the image index that `data.index` names.

    Raises:
        UserError: the images, classes or labels are invalid.
    """
    data = config.data
    if data.labels_file and data.labels != "real":
        raise UserError(
            f"data.labels_file {data.labels_file}: only ReaL labels use a file; "
            "add --data.labels real, or remove data.labels_file"
        )
    real = load_real(data.labels_file) if data.labels == "real" else None
    if data.labels != "val":
        _check_imagenet_classes(config)
    if data.labels == "v2":
        config = dataclasses.replace(
            config, data=dataclasses.replace(data, class_names=list(V2_FOLDERS))
        )
    run = run_config_of(checkpoint)
    source = open_checked(config, "val", ranks, run and run.parent, keep=keep_index)
    if data.val_from_train is not None and ranks.is_first:
        _log_held_out(config, checkpoint, len(source))
        warn_trained_before(config, source, checkpoint)
    given = bool(data.class_names or data.classes)
    check_class_order(source, given, data.labels, config.model.num_classes)
    if real is not None:
        ranks.require_agreement("labels of ReaL", real)
        return LabeledSplit(*apply_real_labels(source, real))
    return LabeledSplit(apply_v2_names(source) if data.labels == "v2" else source)


def _log_held_out(config: Config, checkpoint: str, count: int) -> None:
    """Log that some training images are evaluated: the key may come from the run's config.yaml."""
    run, path = _settings_of_run(checkpoint), config.data.path
    trained_on = run and run.data.path
    if path and trained_on and absolute_path(path) != absolute_path(trained_on):
        logger.warning(
            "%s: is not the folder of the training, %s, but only %d of its images are evaluated; "
            "if these are other images, add --data.val_from_train null (and --data.val_folder . "
            "if the class folders lie directly in it)", path, trained_on, count,
        )  # fmt: skip
        return
    logger.info(
        "evaluating on %d images held out from the training images (data.val_from_train); "
        "--data.val_from_train null evaluates on the other split", count,
    )  # fmt: skip


def _check_imagenet_classes(config: Config) -> None:
    """Check that class numbers mean ImageNet-1k's classes.

    Raises:
        UserError: another data source, a subset of the classes, or another order.
    """
    data = config.data
    if data.source not in ("imagefolder", "mindrecord"):
        raise UserError(
            f"data.labels {data.labels}: needs ImageNet, but data.source is {data.source}; "
            "remove data.labels"
        )
    if data.classes:
        raise UserError(
            f"data.classes: data.labels {data.labels} covers all of ImageNet's classes; "
            "remove data.classes"
        )
    fault = find_class_order_fault(data.class_names) if data.class_names else None
    if fault:
        raise UserError(
            f"data.labels {data.labels}: the model's classes are not ImageNet-1k's in their order: "
            f"{fault}; use --data.labels val"
        )
