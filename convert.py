"""Convert published weights: python convert.py --src CvT-13-224x224-IN-1k.pth --dst cvt_13.ckpt."""

from __future__ import annotations

from pathlib import Path

from src.command_line import load_config, parse
from src.config import RuntimeOnly
from src.errors import UserError, executable
from src.runtime import log_to, prepare_environment, setup


@executable
def main(argv: list[str]) -> None:
    """Print what became of each tensor, and what identifies source and result."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--src", type=str, required=True, help="official .pth, Hugging Face's, or one of ours"
        )
        parser.add_argument("--dst", type=str, required=True, help="a .ckpt or .safetensors")
        parser.add_argument("--model", type=str, help="default: told by the tensors' sizes")
        parser.add_argument(
            "--verify", action="store_true", help="compare logits of source and result"
        )
        parser.add_argument("--force", action="store_true", help="replace an existing file")

    description = "Convert weights; --config gives the model's keys where it is no named variant."
    keys, arguments = parse(argv, "convert.py", description, add_arguments, schema=RuntimeOnly)
    source, target = Path(arguments.src), Path(arguments.dst)
    if target.suffix not in (".ckpt", ".safetensors"):
        raise UserError(f"--dst {target}: the name must end in .ckpt or .safetensors")
    if target.exists() and (not arguments.force or target.resolve() == source.resolve()):
        raise UserError(f"--dst {target}: exists; add --force to replace it, or give another name")
    if arguments.model and arguments.config:
        raise UserError("--model and --config: give one of them, the recipe names its model")
    config = load_config(Path(arguments.config)) if arguments.config else None
    prepare_environment()
    log_to()
    from src.deploy.convert import convert
    from src.weights import sha256_of

    setup(keys.runtime)
    done = convert(source, target, arguments.model, config, arguments.verify)
    print(f"{done.report.table()}\n\n{done.model}: {done.report}")
    if done.difference is not None:
        print(f"verified: the largest difference of the logits is {done.difference:g}")
    print(f"source  {sha256_of(source)}  {source}\nresult  {sha256_of(target)}  {target}")
    print(f"next: python eval.py --ckpt {target} --config RECIPE --data.path FOLDER")


if __name__ == "__main__":
    main()
