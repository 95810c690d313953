"""Counts and estimates that need no run."""

from __future__ import annotations

import dataclasses

from src.build import build_model, image_size, without_flash_attention
from src.config import Config
from src.models import uninitialised
from src.models.attention import use_flash_attention
from src.models.complexity import complexity
from tools.benchmark.estimate import ASCEND_910, all_reduce_seconds, step_memory

CARDS = (8, 16, 32, 64, 128, 256, 512, 1024)


def measure_complexity(config: Config) -> dict:
    """Print and return parameters and MACs by stage for one image."""
    with uninitialised():
        net = build_model(config)
    size = image_size(config.model)
    counted = complexity(net, size)
    model = {
        "model": config.model.name,
        "image_size": list(size),
        "num_classes": config.model.num_classes,
    }
    height, width = size
    print(f"{model['model']}, image {height} x {width}, {model['num_classes']} classes")
    print(counted)
    return {**model, **counted.to_dict()}


def estimate_scaling(config: Config) -> dict:
    """Print and return the memory of a training step and the all-reduce time of its gradients."""
    with uninitialised():
        net = build_model(without_flash_attention(config))
    runtime, batch = config.runtime, config.training.batch_size
    if runtime.flash_attention:
        use_flash_attention(net)
    size = image_size(config.model)
    memory = step_memory(
        net, size, batch, runtime.precision, config.optimizer.name, config.training.ema_decay > 0
    )
    held = {**dataclasses.asdict(memory), "total": memory.total}
    times = {n: all_reduce_seconds(memory.gradients, n, ASCEND_910) for n in CARDS}
    print(
        f"{config.model.name}, image {size[0]} x {size[1]}, {batch} images per card, "
        f"{runtime.precision}, {config.optimizer.name}"
    )
    print("\n".join(f"{name:<12}{count / 1e9:>10.3f} GB" for name, count in held.items()))
    print(f"all-reduce of {memory.gradients / 1e6:.1f} MB ({ASCEND_910.name}), without overlap:")
    print("\n".join(f"{n:>5} cards{1e3 * t:>10.2f} ms" for n, t in times.items()))
    return {
        "model": config.model.name,
        "image_size": list(size),
        "batch_size": batch,
        "precision": runtime.precision,
        "optimizer": config.optimizer.name,
        "bytes": held,
        "all_reduce_seconds": {str(n): t for n, t in times.items()},
    }
