"""Opens what a Predictor classifies with: an exported file, or weights with their configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindspore import nn

from src.arithmetic import keep_float32, require_precision
from src.build import accelerate, build_for_weights, build_preprocessing, without_flash_attention
from src.config_io import load_config, parse_runtime, run_config_of
from src.data import Preprocessing
from src.deploy.class_names import known_class_names
from src.deploy.description import read_description
from src.deploy.engines import MINDSPORE_LOCK, Session, mindspore_session, open_model
from src.device import current_device, inference_runtime
from src.errors import UserError
from src.evaluation.labels import compare_with_run
from src.forks import register_mindspore_use
from src.weights import load_weights, weight_files

EXPORTED_SUFFIXES = (".mindir", ".onnx")
RUNTIME_OF_WEIGHTS = ("mode", "precision", "flash_attention", "compiled_ops", "depthwise")


class LoadedModel(NamedTuple):
    """A model that is ready to run.

    Args:
        session: runs it.
        network: the network of a weight file; None for an exported file.
        preprocessing: of an image.
        class_names: empty if unknown.
        batch_size: the only batch size that the file takes; None for any.
    """

    session: Session
    network: nn.Cell | None
    preprocessing: Preprocessing
    class_names: list[str]
    batch_size: int | None


def open_exported(
    path: Path,
    config: str | Path | None,
    engine: str,
    threads: int | None,
    runtime: Mapping[str, Any] | None,
) -> LoadedModel:
    """Open an exported file; arguments and errors are those of `Predictor`."""
    if config is not None:
        raise UserError(f"--config {config}: is for weights only; {path} has its {path.name}.json")
    for key in runtime or ():
        raise UserError(f"runtime.{key}: is for weights only; {path} was exported without it")
    description = read_description(path)
    session = open_model(path, engine, threads)
    names, batch_size = description["class_names"], description["input_shape"][0]
    return LoadedModel(session, None, description["preprocessing"], names, batch_size)


def open_weights(
    path: Path, config: str | Path | None, threads: int | None, runtime: Mapping[str, Any]
) -> LoadedModel:
    """Open weights; arguments and errors are those of `Predictor`."""
    weight_files(path)  # raises UserError for files of any other kind
    named = config is not None
    config = config or run_config_of(path)
    if config is None:
        raise UserError(
            f"{path}: no config.yaml of a run beside it; give its recipe with --config, such as "
            "config/imagenet/cvt_13_224.yaml"
        )
    settings = load_config(Path(config))
    if settings.model.num_classes is None:
        raise UserError(
            f"{config}: model.num_classes is not set; give the run's config.yaml, or a recipe that "
            "sets it, such as config/imagenet/cvt_13_224.yaml"
        )
    for key in set(runtime) - set(RUNTIME_OF_WEIGHTS):
        raise UserError(f"runtime.{key}: choose from {', '.join(RUNTIME_OF_WEIGHTS)}")
    if not runtime.get("flash_attention"):
        settings = without_flash_attention(settings)
    settings.runtime = dataclasses.replace(settings.runtime, **parse_runtime(runtime))
    register_mindspore_use()
    settings.runtime = inference_runtime(settings.runtime, current_device(), runtime)
    require_precision(settings.runtime.precision, current_device())
    if settings.runtime.precision == "float32":
        keep_float32(current_device())
    with MINDSPORE_LOCK:
        net = build_for_weights(settings)
        load_weights(net, path)
        accelerate(net, settings.runtime).set_train(False)
    compiled = runtime.get("mode") != "pynative"
    session = mindspore_session(net, threads, compiled=compiled)
    names = settings.data.class_names or known_class_names(path, settings.model.num_classes) or []
    if named:
        compare_with_run(path, settings)
    return LoadedModel(session, net, build_preprocessing(settings), names, None)
