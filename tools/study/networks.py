"""Checks a study's networks and data before any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from src.build import build_model, build_preprocessing, image_size
from src.config import Config
from src.data import Source
from src.errors import UserError
from src.models import uninitialised
from src.models.complexity import complexity
from src.splits import open_split, resolve_classes
from tools.study.cells import Cell


@dataclass(frozen=True)
class Network:
    """A network's costs and evaluation set.

    Args:
        parameters: trainable ones.
        macs: multiply-accumulates for one image.
        held_out: images it is evaluated on.
        class_names: of the data.
        images: checksums of the training and held-out images, of names and of contents.
    """

    parameters: int
    macs: int
    held_out: int
    class_names: tuple[str, ...] = ()
    images: tuple[int, ...] = ()


def check_networks(cells: Sequence[Cell]) -> dict[str, Network]:
    """Build each model of a study without initialising it; return their costs by name.

    Raises:
        UserError: training would refuse the data or a network.
    """
    opened: dict[str, tuple[Source, Source]] = {}
    networks: dict[str, Network] = {}
    for cell in cells:
        config = cell.config
        data = dataclasses.replace(config.data, train_images=None)
        if repr(data) not in opened:
            whole = dataclasses.replace(config, data=data)
            opened[repr(data)] = open_split(whole, "train"), open_split(whole, "val")
        source, held_out = opened[repr(data)]
        if cell.train_images > len(source):
            raise UserError(
                f"train_images {cell.train_images}: {source.title} has only {len(source)}"
            )
        if not len(held_out):
            raise UserError(f"{source.title}: there are no held-out images; add some")
        if cell.model not in networks:
            try:
                config = resolve_classes(config, source)
                networks[cell.model] = _network(config, source, held_out)
            except UserError as error:
                raise UserError(f"models.{cell.model}: {error}") from None
    return networks


def _network(config: Config, source: Source, held_out: Source) -> Network:
    build_preprocessing(config)
    with uninitialised():
        net = build_model(config)
    total = complexity(net, image_size(config.model)).total
    names = tuple(config.data.class_names)
    images = source.digest(), source.digest_content(), held_out.digest(), held_out.digest_content()
    return Network(total.parameters, total.total_macs, len(held_out), names, images)
