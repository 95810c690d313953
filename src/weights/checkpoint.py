"""Weight files: written whole or not at all, checked when read, never loaded in part silently."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from src.errors import UserError

EMA = "ema."
TRAINING_ONLY = ("moment1.", "moment2.", "step")
_CRC_MARK, _CRC_BYTES = b"crc_num", 17  # how MindSpore ends a checkpoint that has a checksum


@dataclass
class LoadReport:
    """What became of every tensor of a file and every parameter of a network.

    `loaded`, `missing`, `unexpected` and `ignored` hold names; `mismatched` holds
    (name, shape in the file, shape in the network); `ignored` are state of training.
    """

    path: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    averaged: bool = False  # the file holds a moving average, and that was taken

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded from {self.path}"
        text += " (the moving average)" if self.averaged else ""
        return text + (f", {len(self.ignored)} of training left" if self.ignored else "")

    def complaint(self) -> str:
        """One line that names what does not fit, or "" where everything does."""
        shapes = [f"{name} {there} for {here}" for name, there, here in self.mismatched]
        kinds = (
            (self.missing, "missing"),
            (self.unexpected, "unexpected"),
            (shapes, "of another shape"),
        )
        return "; ".join(f"{len(names)} {kind}: {_some(names)}" for names, kind in kinds if names)


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def save_checkpoint(parameters: dict[str, Tensor], path: Path, **extra: int | float | str) -> None:
    """Write an ordinary MindSpore checkpoint with a checksum, aside first, then in one move.

    A reader sees the old file or the new one, whole, whatever interrupts the writing.

    Raises:
        UserError: the file can't be written.
    """
    entries = [{"name": name, "data": tensor} for name, tensor in parameters.items()]
    aside = path.with_name(f".{path.stem}.partial.ckpt")
    try:
        ms.save_checkpoint(entries, str(aside), append_dict=extra or None, crc_check=True)
        make_readable(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: can't be written: {' '.join(str(error).split())}") from error


def make_readable(path: Path) -> None:
    """Give a file that MindSpore wrote for its owner's eyes only the usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by name; numbers and strings saved beside them come as 0-d.

    Raises:
        UserError: no such file, no checkpoint, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a checkpoint")
    if path.suffix != ".ckpt":
        raise UserError(f"{path}: not a MindSpore checkpoint; its name must end in .ckpt")
    try:
        tensors = ms.load_checkpoint(str(path), crc_check=_has_checksum(path))
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        raise UserError(
            f"{path}: damaged, or no MindSpore checkpoint; restore or remake it"
        ) from error
    return {
        name: value.asnumpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in tensors.items()
    }


def _has_checksum(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-min(path.stat().st_size, _CRC_BYTES), os.SEEK_END)
        return file.read(len(_CRC_MARK)) == _CRC_MARK


def load_weights(net: nn.Cell, path: str | Path, strict: bool = True) -> LoadReport:
    """Load a checkpoint into a network; of a training state with a moving average, the average.

    Args:
        net: is changed only if the file fits, or `strict` is false.
        path: a MindSpore checkpoint (.ckpt).
        strict: raise on anything missing, left over or misshapen. Otherwise load what fits; the
            report tells what did not.

    Raises:
        UserError: an unreadable file, or, if strict, one that doesn't fit.
    """
    tensors = read_checkpoint(path)
    report = LoadReport(str(path))
    report.averaged = any(name.startswith(EMA) for name in tensors)
    if report.averaged:
        plain = [n for n in tensors if f"{EMA}{n}" in tensors]
        report.ignored = plain
        tensors = {n.removeprefix(EMA): t for n, t in tensors.items() if n not in plain}
    state = [n for n, t in tensors.items() if n.startswith(TRAINING_ONLY) or t.ndim == 0]
    report.ignored += state
    tensors = {name: tensor for name, tensor in tensors.items() if name not in state}
    _assign(dict(net.parameters_and_names()), tensors, report, strict)
    return report


def _assign(parameters, tensors, report: LoadReport, strict: bool) -> None:
    """Sort names into the report, then copy what fits, unless strict forbids."""
    parameters = {parameter.name: parameter for parameter in parameters.values()}
    report.unexpected = [name for name in tensors if name not in parameters]
    report.missing = [name for name in parameters if name not in tensors]
    for name, tensor in tensors.items():
        if name not in parameters:
            continue
        if tensor.shape != parameters[name].shape:
            report.mismatched.append((name, tensor.shape, parameters[name].shape))
        else:
            report.loaded.append(name)
    if strict and report.complaint():
        raise UserError(f"{report.path}: does not fit the network: {report.complaint()}")
    for name in report.loaded:  # assign, because a compiled graph does not see set_data
        ops.assign(parameters[name], Tensor(tensors[name], parameters[name].dtype))


def load_state(cell: nn.Cell, path: Path) -> dict[str, float]:
    """Load every parameter of a training step; returns the numbers saved beside them.

    Raises:
        UserError: an unreadable file, or one of another network or recipe.
    """
    tensors = read_checkpoint(path)
    names = {parameter.name for parameter in cell.get_parameters()}
    extra = {n: t.item() for n, t in tensors.items() if n not in names and t.ndim == 0}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in extra}
    _assign(dict(cell.parameters_and_names()), tensors, LoadReport(str(path)), strict=True)
    return extra


def sha256_of(path: str | Path) -> str:
    """The hexadecimal digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
