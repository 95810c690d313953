"""Measure a network: python benchmark.py --mode complexity --model.name cvt_13."""

from __future__ import annotations

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
            help="complexity: parameters and multiply-accumulates (MACs) for an image, by stage",
        )
        parser.add_argument("--json", type=str, help="also write the figures to this file")

    description = (
        f"Measure a network. model.num_classes null means {IMAGENET_CLASSES} here. MACs are those "
        "of convolutions, Linears and both attention products; norms, softmax, activations, biases "
        "and pooling are not counted. The paper's FLOPs are these MACs."
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


MODES = {"complexity": measure_complexity}


if __name__ == "__main__":
    main()
