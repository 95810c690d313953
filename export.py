"""Export a checkpoint: python export.py --ckpt P --format mindir --output model.mindir."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

from jsonargparse.typing import PositiveFloat

from src.cli import parse, require_recipe
from src.config import RuntimeConfig
from src.config_io import find_checkpoint
from src.device import import_mindspore, log_to, prepare_environment, setup
from src.errors import UserError, executable
from src.files import require_writable

FORMATS = ("mindir", "onnx", "air")


@executable
def main(argv: list[str]) -> None:
    """Write a file for deployment and compare it with the checkpoint."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--ckpt",
            type=str,
            required=True,
            help="weights (.ckpt, .safetensors, .pth, .bin) or a run's folder",
        )
        parser.add_argument(
            "--format", choices=FORMATS, default="mindir", help="air: on Ascend only"
        )
        parser.add_argument("--output", type=str, help="default: beside the checkpoint")
        parser.add_argument("--batch_size", type=str, default="1", help="a number, or dynamic")
        parser.add_argument(
            "--weight_dtype",
            choices=("float32", "float16"),
            default="float32",
            help="float16 halves the file size; --precision sets the arithmetic",
        )
        parser.add_argument(
            "--precision",
            choices=("float32", "float16"),
            default="float32",
            help="float16: linear layers, convolutions and attention compute in float16, for "
            "accelerators; independent of the precision used in training",
        )
        parser.add_argument(
            "--tolerance",
            type=PositiveFloat,
            help="largest allowed difference from the checkpoint's logits, relative to the largest "
            "logit if that exceeds 1; default 1e-5, onnx 1e-4, with float16 2e-2",
        )
        parser.add_argument(
            "--quantize",
            choices=("int8",),
            help="int8: linear layers and convolutions compute with 8-bit integers, in onnxruntime "
            "on CPUs; calibrated on training images; needs --format onnx",
        )
        parser.add_argument("--force", action="store_true", help="replace an existing file")

    description = "Export a checkpoint; --config defaults to its run's config.yaml."
    config, arguments = parse(argv, "export.py", description, add_arguments, config_beside="ckpt")
    arguments.ckpt = str(find_checkpoint(Path(arguments.ckpt)))
    batch_size = None if arguments.batch_size == "dynamic" else _count(arguments.batch_size)
    checkpoint = Path(arguments.ckpt)
    named = checkpoint if checkpoint.name.strip(".") else checkpoint.resolve()  # "." or ".."
    output = Path(arguments.output or named.with_suffix(f".{arguments.format}"))
    if output.suffix != f".{arguments.format}":
        raise UserError(f"--output {output}: the name must end in .{arguments.format}")
    if any(map(os.path.lexists, (output, f"{output}.json"))) and not arguments.force:
        raise UserError(f"--output {output}: exists; add --force to replace it")
    for written in (output, f"{output}.json"):
        require_writable(written, "--output")
    if arguments.quantize and arguments.format != "onnx":
        raise UserError("--quantize int8: works only for ONNX files; add --format onnx")
    if arguments.quantize and "float16" in (arguments.weight_dtype, arguments.precision):
        raise UserError("--quantize int8: quantizes float32 weights; leave out float16")
    require_recipe(checkpoint, arguments.config)
    if any(word.split("=")[0] == "--runtime.precision" for word in argv):
        raise UserError(
            "--runtime.precision: applies to training; use --precision for the exported file"
        )
    # As Ctrl-C, remove the unfinished files; while MindSpore compiles, both wait.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    prepare_environment()
    log_to()
    import_mindspore()
    from src.deploy.export import ExportOptions, export

    device, _ = setup(_runtime(config.runtime, arguments.format))
    options = ExportOptions(
        arguments.format,
        batch_size,
        arguments.weight_dtype,
        arguments.precision,
        arguments.tolerance,
        arguments.quantize is not None,
    )
    export(config, checkpoint, output, options, device)


def _runtime(runtime: RuntimeConfig, file_format: str) -> RuntimeConfig:
    """Return the runtime that writes and checks the file: the CPU, because its float32 is exact.

    AIR needs the Ascend backend. The other files do not depend on the device that writes them.
    """
    if file_format == "air":
        return dataclasses.replace(runtime, precision="float32")
    return RuntimeConfig(device="CPU", mode=runtime.mode, seed=runtime.seed)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"--batch_size {text}: must be a whole number of 1 or more, or dynamic")
    return int(text)


if __name__ == "__main__":
    main()
