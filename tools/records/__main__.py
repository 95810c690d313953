"""Packs an image folder into MindRecord shards: python -m tools.records --src DIR --dst DIR."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from src.cli import parse
from src.config import DataConfig
from src.device import log_to, prepare_environment
from src.errors import UserError, executable


@executable
def main(argv: list[str]) -> None:
    """Convert an image folder, verify shards, or both; print the number of images."""

    def add_arguments(parser) -> None:
        parser.add_argument("--src", type=str, help="image folder: train/<class>/*, val/<class>/*")
        parser.add_argument(
            "--dst", type=str, required=True, help="folder for the shards, data.path of mindrecord"
        )
        parser.add_argument(
            "--images_per_shard", type=int, default=50_000, help="images of the folder in a shard"
        )
        parser.add_argument(
            "--workers",
            type=int,
            default=0,
            help="threads that read and check; 0: one per core, at most 16",
        )
        parser.add_argument("--train_folder", type=str, default="train", help="below --src")
        parser.add_argument("--val_folder", type=str, default="val", help="below --src")
        parser.add_argument(
            "--skip_broken", action="store_true", help="skip unreadable images and count them"
        )
        parser.add_argument(
            "--force", action="store_true", help="continue although images or options have changed"
        )
        parser.add_argument(
            "--verify", action="store_true", help="read all of --dst against its checksums"
        )

    description = "Pack an image folder into MindRecord shards; run again to continue."
    _, arguments = parse(argv, "-m tools.records", description, add_arguments, schema=None)
    if not arguments.src and not arguments.verify:
        raise UserError("--src is missing; give the image folder, or --verify to check --dst")
    words = {word.partition("=")[0] for word in argv}
    for option in ("--images_per_shard", "--workers", "--skip_broken", "--force"):
        if not arguments.src and option in words:
            raise UserError(f"{option}: applies to a conversion; give --src too, or leave it out")
    prepare_environment()
    log_to()
    from src.data.records import INDEX, verify
    from tools.records.writer import Options, convert

    target = Path(os.path.expanduser(arguments.dst))
    if arguments.src:
        options = Options(
            arguments.images_per_shard, arguments.workers, arguments.skip_broken, arguments.force
        )
        folders = {name: getattr(arguments, name) for name in ("train_folder", "val_folder")}
        done = convert(Path(os.path.expanduser(arguments.src)), target, options, **folders)
        for name, split in done.items():
            print(
                f"{target / name}: {split.images} images in {split.shards} shards ({split.kept} "
                f"kept from an earlier start), {len(split.skipped)} broken images skipped"
            )
    if arguments.verify:
        for folder, images in verify(target).items():
            print(f"{folder}: verified, {images} images")
    if not (target / arguments.train_folder / INDEX).is_file():  # one split, or other folders
        return
    words = ["--data.source", "mindrecord", "--data.path", str(target)]
    for name in ("train_folder", "val_folder"):
        if getattr(arguments, name) != getattr(DataConfig, name):
            words += [f"--data.{name}", getattr(arguments, name)]
    print(f"next: python train.py --config RECIPE {shlex.join(words)}")


if __name__ == "__main__":
    main()
