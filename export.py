"""Export a checkpoint: python export.py --ckpt P --format mindir --output model.mindir."""

from __future__ import annotations

from pathlib import Path

from jsonargparse.typing import PositiveFloat

from src.command_line import find_checkpoint, parse
from src.errors import UserError, executable
from src.runtime import log_to, prepare_environment, setup

FORMATS = ("mindir", "onnx", "air")


@executable
def main(argv: list[str]) -> None:
    """Write a file for deployment and check it against the checkpoint."""

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
            help="float16 halves the file; the weights are cast up when it runs",
        )
        parser.add_argument(
            "--unfused", action="store_true", help="write the network as it was trained"
        )
        parser.add_argument(
            "--tolerance",
            type=PositiveFloat,
            help="largest difference from the checkpoint's logits, as a share of the largest where "
            "that exceeds 1; default 1e-5, onnx 1e-4, with float16 2e-2",
        )
        parser.add_argument("--force", action="store_true", help="replace an existing file")

    description = "Export a checkpoint; --config is found in its run's folder."
    config, arguments = parse(argv, "export.py", description, add_arguments, config_beside="ckpt")
    arguments.ckpt = str(find_checkpoint(Path(arguments.ckpt)))
    batch_size = None if arguments.batch_size == "dynamic" else _count(arguments.batch_size)
    checkpoint = Path(arguments.ckpt)
    output = Path(arguments.output or checkpoint.with_suffix(f".{arguments.format}"))
    if output.suffix != f".{arguments.format}":
        raise UserError(f"--output {output}: the name must end in .{arguments.format}")
    if (output.exists() or Path(f"{output}.json").exists()) and not arguments.force:
        raise UserError(f"--output {output}: exists; add --force to replace it")
    if arguments.config is None:
        raise UserError(f"{checkpoint}: no config.yaml of a run beside it; give --config")
    prepare_environment()
    log_to()
    from src.deploy.export import ExportOptions, export
    from src.deploy.fuse import Rewrites

    device, _ = setup(config.runtime)
    options = ExportOptions(
        arguments.format,
        batch_size,
        arguments.weight_dtype,
        None if arguments.unfused else Rewrites(),
        arguments.tolerance,
    )
    export(config, checkpoint, output, options, device)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"--batch_size {text}: must be a whole number of 1 or more, or dynamic")
    return int(text)


if __name__ == "__main__":
    main()
