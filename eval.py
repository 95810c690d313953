"""Evaluate a checkpoint: python eval.py --ckpt runs/digits_cvt_nano/checkpoints/best.ckpt."""

from __future__ import annotations

from pathlib import Path

from src.cli import parse, require_recipe
from src.config_io import find_checkpoint
from src.device import (
    choose_device,
    import_mindspore,
    inference_runtime,
    log_to,
    prepare_environment,
    setup,
)
from src.errors import executable
from src.files import require_different, require_replaceable, write_json


@executable
def main(argv: list[str]) -> None:
    """Print top-1, top-5, loss, images counted and img/s of a checkpoint on the held-out images."""

    def add_arguments(parser) -> None:
        parser.add_argument(
            "--ckpt",
            type=str,
            required=True,
            help="weights (.ckpt, .safetensors, .pth, .bin) or a run's folder",
        )
        parser.add_argument("--json", type=str, help="also write the metrics to this file")
        parser.add_argument(
            "--report",
            type=str,
            help="folder for accuracy per class, confusion matrix, calibration and worst images",
        )
        parser.add_argument(
            "--force", action="store_true", help="also replace files that are not earlier results"
        )

    description = "Evaluate a checkpoint; --config defaults to its run's config.yaml."
    config, arguments = parse(argv, "eval.py", description, add_arguments, config_beside="ckpt")
    arguments.ckpt = str(find_checkpoint(Path(arguments.ckpt)))
    prepare_environment()
    log_to()
    import_mindspore()
    from src.evaluation.evaluator import evaluate_checkpoint
    from src.evaluation.report import calibrate, check_report, is_result, write_report

    require_recipe(arguments.ckpt, arguments.config)
    chosen = {key.removeprefix("runtime.") for key in arguments.given}
    device = choose_device(config.runtime.device)
    config.runtime = inference_runtime(config.runtime, device, chosen)
    _, ranks = setup(config.runtime)
    report = bool(arguments.report)
    folder = None
    if ranks.is_first and report:
        folder = check_report(arguments.report, arguments.force)
    if report and arguments.json:
        require_different({"--json": arguments.json, "--report": arguments.report})
    if ranks.is_first and arguments.json:
        require_replaceable(arguments.json, "--json", is_result, arguments.force)
    # Only the user may name files to write, not a config.yaml found beside a checkpoint.
    named = "data.index" in arguments.given
    result, images = evaluate_checkpoint(config, arguments.ckpt, ranks, report, named)
    if ranks.is_first:
        metrics = result.to_dict()
        if folder:
            metrics["ece"] = calibrate(result.outcomes).ece
        print(
            f"top1 {metrics['top1']:.2f} %  top5 {metrics['top5']:.2f} %  loss "
            f"{metrics['loss']:.4f}  images {metrics['images']}  "
            f"{metrics['images_per_second']:.0f} img/s"
        )
        if arguments.json:
            write_json(metrics, arguments.json)
        if folder:
            write_report(metrics, result.outcomes, images, folder)
            print(f"ece {metrics['ece']:.2f} %  report in {folder}")
    ranks.announce_end(0)  # a rank that crashes at its exit must not end the one that writes


if __name__ == "__main__":
    main()
