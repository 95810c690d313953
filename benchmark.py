"""Figures of a network: python benchmark.py --mode complexity|scaling --model.name cvt_13."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from src.command_line import parse
from src.config import Config
from src.errors import UserError, executable
from src.runtime import log_to, prepare_environment

IMAGENET_CLASSES = 1000


@executable
def main(argv: list[str]) -> None:
    """Print the figures of a mode; write them as JSON too if asked to."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--mode",
            choices=list(MODES),
            required=True,
            help="complexity: parameters and multiply-accumulates (MACs) for an image, by stage; "
            "scaling: estimates of a training step's memory and of its all-reduce",
        )
        parser.add_argument("--json", type=str, help="also write the figures to this file")

    description = (
        f"Measure a network. model.num_classes null means {IMAGENET_CLASSES} here. MACs are those "
        "of convolutions, Linears and both attention products; norms, softmax, activations, biases "
        "and pooling are not counted. The paper's FLOPs are these MACs. Scaling is arithmetic, as "
        "src/training/estimate.py tells; nothing runs."
    )
    config, arguments = parse(argv, "benchmark.py", description, add_arguments)
    config.model.num_classes = config.model.num_classes or IMAGENET_CLASSES
    prepare_environment()
    log_to()
    figures = MODES[arguments.mode](config)
    if arguments.json:
        try:
            Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--json {arguments.json}: {error.strerror}; name a file that can be written"
            ) from None


def measure_complexity(config: Config) -> dict:
    """Print parameters and MACs by stage for one image; needs no device, for nothing runs."""
    from src.models.complexity import complexity, uninitialised
    from src.recipe import build_model, image_size

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
    """Print what a training step holds on a card, and the all-reduce of its gradients."""
    from src.models.attention import use_flash_attention
    from src.models.complexity import uninitialised
    from src.recipe import build_model, image_size, without_flash_attention
    from src.training.estimate import ASCEND_910, all_reduce_seconds, step_memory

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
        f"{config.model.name}, image {size[0]} x {size[1]}, {batch} images a card, "
        f"{runtime.precision}, {config.optimizer.name}"
    )
    print("\n".join(f"{name:<12}{count / 1e9:>10.3f} GB" for name, count in held.items()))
    print(f"all-reduce of {memory.gradients / 1e6:.1f} MB ({ASCEND_910.name}), nothing overlapped:")
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


MODES = {"complexity": measure_complexity, "scaling": estimate_scaling}
CARDS = (8, 16, 32, 64, 128, 256, 512, 1024)


if __name__ == "__main__":
    main()
