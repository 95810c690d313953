"""Train a CvT: python train.py --config config/digits/cvt_nano.yaml [--output DIR] [--resume]."""

from __future__ import annotations

import os
from pathlib import Path

from src.cli import parse, take_option
from src.config_io import CONFIG, default_output, run_config_of
from src.device import log_to, prepare_environment
from src.errors import UserError, executable


@executable
def main(argv: list[str]) -> None:
    """Train the network that the configuration describes."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--output", type=str, help="run folder; default: runs/ and the recipe's name"
        )
        parser.add_argument(
            "--resume",
            nargs="?",
            const=True,
            default=False,
            metavar="STATE",
            help="continue the run in the output folder, from its newest state or from STATE",
        )
        parser.add_argument(
            "--accept_changes", action="store_true", help="resume although settings differ"
        )
        parser.add_argument(
            "--finetune",
            type=str,
            help="weights to start from; the head is new if the classes differ",
        )

    state = _state_to_resume(argv)
    if state is not None:
        argv = [*argv, *_output_of(argv, state)]
    # A resumed run uses its own config.yaml unless --config is given.
    beside = "output" if state is not None else None
    config, arguments = parse(
        argv, "train.py", "Train a network.", add_arguments, config_beside=beside
    )
    if arguments.config is None and arguments.output is None:
        raise UserError("--config is missing; give a recipe, such as config/digits/cvt_nano.yaml")
    if arguments.accept_changes and state is None:
        raise UserError("--accept_changes: works only with --resume; add --resume, or leave it out")
    output = Path(arguments.output or default_output(arguments.config))
    prepare_environment()
    log_to()
    from src.training.run import train  # late: importing MindSpore takes seconds

    resume = Path(state) if state and state.is_file() else state is not None
    train(config, output, resume, arguments.finetune, arguments.accept_changes)


def _state_to_resume(argv: list[str]) -> Path | bool | None:
    """Return the file or folder given with --resume, False if none is given, None without --resume.

    Raises:
        UserError: the file or folder does not exist.
    """
    state: Path | bool | None = None
    for word, following in zip(argv, [*argv[1:], "--"]):
        name, _, value = word.partition("=")
        if name == "--resume":
            value = value or ("" if following.startswith("--") else following)
            state = Path(value).expanduser() if value else False
    if state and not state.exists():
        raise UserError(
            f"--resume {state}: no such file; a run's states are in its checkpoints folder"
        )
    return state


def _output_of(argv: list[str], state: Path | bool) -> list[str]:
    """Return the --output option for the run of a state, or nothing if the user gives --output.

    Raises:
        UserError: the run is not found.
    """
    rest, output = take_option(argv, "--output")
    if output is None and not state:
        return []
    config = run_config_of(os.path.expanduser(output or state))
    if config is None and take_option(rest, "--config")[1] is None:
        where = f"--output {output}" if output else f"--resume {state}"
        raise UserError(f"{where}: no run there to resume (no {CONFIG}); give its folder")
    return [] if output or config is None else ["--output", str(config.parent)]


if __name__ == "__main__":
    main()
