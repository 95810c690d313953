"""Convert published weights: python convert.py --src CvT-13-224x224-IN-1k.pth --dst cvt_13.ckpt."""

from __future__ import annotations

import shlex
from pathlib import Path

from src.cli import parse, take_keys
from src.config import RuntimeOnly
from src.config_io import load_config, run_config_of
from src.device import import_mindspore, log_to, prepare_environment, setup
from src.errors import UserError, executable
from src.files import require_writable


@executable
def main(argv: list[str]) -> None:
    """Convert weights; print what happened to each tensor, and both checksums."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--src",
            type=str,
            required=True,
            help="MindSpore, PyTorch or safetensors weights: a file, a folder or an index",
        )
        parser.add_argument(
            "--dst", type=str, required=True, help=".ckpt or .safetensors file to write"
        )
        parser.add_argument("--model", type=str, help="network; default: detected from the tensors")
        parser.add_argument(
            "--entry",
            type=str,
            help="which weights to take, such as state_dict or ema; default: the moving average if "
            "there is one",
        )
        parser.add_argument(
            "--verify", action="store_true", help="compare the tensors of both files"
        )
        parser.add_argument(
            "--force",
            action="store_true",
            help="replace any existing file; without it, only one with the same tensors",
        )

    description = "Convert weights; --config is needed if the model is not a named variant."
    keys, arguments = parse(argv, "convert.py", description, add_arguments, schema=RuntimeOnly)
    for word in take_keys(argv)[1]:
        if word.partition("=")[0] not in ("--runtime.device", "--runtime.device_id"):
            raise UserError(f"{word}: has no effect on a conversion; leave it out")
    source, target = Path(arguments.src), Path(arguments.dst)
    if target.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"--dst {target}: the name must end in .ckpt or .safetensors")
    require_writable(target, "--dst")
    if arguments.model and arguments.config:
        raise UserError("--model and --config: give only one; the recipe names its model")
    config = load_config(Path(arguments.config)) if arguments.config else None
    prepare_environment()
    log_to()
    import_mindspore()
    from src.deploy.convert import convert
    from src.files import sha256_of
    from src.weights import weight_files

    files = weight_files(source)
    if target.resolve() in (file.resolve() for file in files):
        raise UserError(f"--dst {target}: is the source file; give another name")
    setup(keys.runtime)
    done = convert(
        source, target, arguments.model, config, arguments.verify, arguments.entry, arguments.force
    )
    print(f"{done.report.table()}\n\n{done.model}: {done.report}")
    if done.verified is not None:
        print(f"verified: all {done.verified} tensors of the result equal the source's")
    for file, checksum in done.sources.items():
        print(f"source  {checksum}  {file}")
    print(f"result  {sha256_of(target)}  {target}")
    recipe = arguments.config or _own_recipe(files[0]) or "RECIPE"
    words = shlex.join(["--ckpt", str(target), "--config", str(recipe)])
    print(f"next: python eval.py {words} --data.path FOLDER")


def _own_recipe(weights: Path) -> Path | None:
    """Return the configuration beside weights, which has their classes and preprocessing."""
    found = run_config_of(weights)
    try:
        return found if found and load_config(found) else None
    except UserError:  # another program's file
        return None


if __name__ == "__main__":
    main()
