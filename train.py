"""Train a CvT: python train.py --config config/digits/cvt_nano.yaml [--output DIR] [--resume]."""

from __future__ import annotations

from pathlib import Path

from src.command_line import default_output, parse
from src.errors import UserError, executable
from src.runtime import log_to, prepare_environment


@executable
def main(argv: list[str]) -> None:
    """Train what the configuration describes."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--output", type=str, help="folder of the run; default: runs/ and the recipe's name"
        )
        parser.add_argument(
            "--resume",
            nargs="?",
            const=True,
            default=False,
            metavar="STATE",
            help="go on with the run in the output folder, from its newest state or from this one",
        )
        parser.add_argument(
            "--accept_changes", action="store_true", help="resume under other settings too"
        )
        parser.add_argument(
            "--finetune", type=str, help="weights to start from; a head for other classes is new"
        )

    state = _state_to_resume(argv)
    # A run knows its settings.
    beside = "output" if state is not None else None
    if state and not any(word.split("=")[0] == "--output" for word in argv):
        argv = [*argv, "--output", str(Path(state).resolve().parent.parent)]
    config, arguments = parse(
        argv, "train.py", "Train a network.", add_arguments, config_beside=beside
    )
    if arguments.config is None and arguments.output is None:
        raise UserError("--config is missing; give a recipe, as config/digits/cvt_nano.yaml")
    output = Path(arguments.output or default_output(arguments.config))
    prepare_environment()
    log_to()
    from src.training.run import train  # MindSpore takes seconds: arguments are checked by now

    resume = Path(state) if state else state is not None
    train(config, output, resume, arguments.finetune, arguments.accept_changes)


def _state_to_resume(argv: list[str]) -> str | None:
    """The file behind --resume, "" where none is named, None without --resume."""
    for word, following in zip(argv, [*argv[1:], "--"]):
        if word == "--resume":
            return "" if following.startswith("--") else following
        if word.startswith("--resume="):
            return word.partition("=")[2]
    return None


if __name__ == "__main__":
    main()
