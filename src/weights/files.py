"""Find the files of a set of weights, one or several shards, and read their tensors."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from src.errors import UserError
from src.weights.checkpoint import read_checkpoint, read_safetensors
from src.weights.content import AGAIN, Content, KeyPath, short, short_names
from src.weights.kinds import (
    CHECKPOINT,
    MAX_BYTES,
    MAX_TENSORS,
    SAFETENSORS,
    TORCH_LEGACY,
    TORCH_ZIP,
    kind_of,
    require_file,
)
from src.weights.torch_file import read_torch_file

_READERS = {CHECKPOINT: read_checkpoint, SAFETENSORS: read_safetensors}
_READERS |= dict.fromkeys((TORCH_ZIP, TORCH_LEGACY), read_torch_file)
_INDEX = ".index.json"
# A training run's files, as `find_checkpoint` looks for them, and Hugging Face's libraries'.
_IN_FOLDER = (
    "checkpoints/best.ckpt", "best.ckpt", "model.safetensors", f"model.safetensors{_INDEX}",
    "pytorch_model.bin", f"pytorch_model.bin{_INDEX}", "checkpoints/last.ckpt",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
_MAX_INDEX, _MAX_SHARDS = 4 << 20, 1000


def read_content(
    path: Path, choose: Callable[[Mapping[KeyPath, Any]], dict[KeyPath, str]]
) -> Content:
    """Read the tensors of a weight file, a folder, or an index and its shards.

    Args:
        path: the file or folder.
        choose: as for `read_torch_file`.

    Raises:
        UserError: no readable weights, or the shards do not belong together.
    """
    files, indexed = _weight_files(path)
    if not indexed and _kind(files[0]) in (TORCH_ZIP, TORCH_LEGACY):
        return read_torch_file(files[0], choose)
    tensors: dict[str, np.ndarray] = {}
    notes: dict[str, None] = {}
    for file in files:
        content = _READERS[_kind(file)](file)
        duplicate = next((name for name in content.tensors if name in tensors), None)
        if duplicate is not None:
            raise UserError(f"{file}: {short(duplicate)} is also in another shard; {AGAIN}")
        tensors.update(content.tensors)
        notes.update(dict.fromkeys(content.notes))
        if len(tensors) > MAX_TENSORS:
            raise UserError(f"{path}: more than {MAX_TENSORS} tensors; {AGAIN}")
    missing = sorted(indexed - tensors.keys())
    if missing:
        raise UserError(
            f"{path}: its index lists tensors in no shard: {short_names(missing, 3)}; {AGAIN}"
        )
    try:
        names = choose({(name,): tensor for name, tensor in tensors.items()})
    except UserError as error:
        error.args = (f"{path}: {error}", *error.args[1:])
        raise
    notes.update({f"{len(files)} shards": None} if indexed else {})
    return Content({name: tensors[keys[0]] for keys, name in names.items()}, list(notes))


def weight_files(path: str | Path) -> list[Path]:
    """Return the files that hold the weights of a file, folder or index, the index first.

    Raises:
        UserError: no weight files, several sets of them, or a file of another format.
    """
    path = Path(path)
    files, indexed = _weight_files(path)
    for file in files:
        _kind(file)
    return [_index_of(path), *files] if indexed else files


@contextlib.contextmanager
def unchanged(path: str | Path) -> Iterator[list[Path]]:
    """Yield the files of some weights, to be read and hashed in the block as one version.

    Raises:
        UserError: as `weight_files`, or a file was replaced before the end of the block.
    """

    def versions() -> list[tuple[Path, int, int, int]]:
        stats = [(file, file.stat()) for file in weight_files(path)]
        return [(file, stat.st_ino, stat.st_mtime_ns, stat.st_size) for file, stat in stats]

    before = versions()
    yield [file for file, *_ in before]
    if versions() != before:
        raise UserError(
            f"{path}: was replaced while it was read, as by a run that saves better weights; run "
            "this command again, or give it a copy"
        )


def _kind(file: Path) -> str:
    try:
        return kind_of(file)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a file that can be read") from None


def _index_of(path: Path) -> Path:
    return _in_folder(path) if path.is_dir() else path


def _weight_files(path: Path) -> tuple[list[Path], set[str]]:
    """Return the weight files, and the names of the tensors that an index lists."""
    file = _index_of(path)
    if file.name.endswith(_INDEX):
        return _shards(file)
    shard = _SHARD.search(file.name)
    if shard and int(shard[2]) > 1 and file.is_file():
        raise UserError(f"{file}: one of {int(shard[2])} shards; give their folder or index")
    return [file], set()


def _in_folder(folder: Path) -> Path:
    for name in _IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.is_file())
    indexes = [file for file in files if file.name.endswith(_INDEX)]
    weights = [file for file in files if file.name.endswith(_SUFFIXES)]
    candidates = indexes or [file for file in weights if file.name != "training_args.bin"]
    if len(candidates) != 1:
        found = short_names([file.name for file in candidates], 4) or "none"
        raise UserError(f"{folder}: must contain one weight file, found {found}; give a file")
    return candidates[0]


def _shards(index: Path) -> tuple[list[Path], set[str]]:
    try:
        require_file(index)
        if index.stat().st_size > _MAX_INDEX:
            raise UserError(f"larger than {_MAX_INDEX >> 20} MB; {AGAIN}")
        shard_of = json.loads(index.read_bytes())["weight_map"]
        names = list(dict.fromkeys(shard_of.values()))
        if not names or len(names) > _MAX_SHARDS or len(shard_of) > MAX_TENSORS:
            raise UserError(f"lists {len(shard_of)} tensors in {len(names)} files; {AGAIN}")
        for name in names:
            if type(name) is not str or not re.fullmatch(r"[^/\\\0]*[^./\\\0][^/\\\0]*", name):
                raise UserError(f"names {short(name)}, which is not a file of its folder; {AGAIN}")
        files = [index.parent / name for name in names]
        for file in files:
            if not file.is_file():
                raise UserError(f"shard {short(file.name)} is missing; {AGAIN}")
        if sum(file.stat().st_size for file in files) > MAX_BYTES:
            raise UserError(f"its shards have more than {MAX_BYTES >> 30} GiB; {AGAIN}")
    except UserError as error:
        raise UserError(f"{index}: {error}") from None
    except OSError as error:
        raise UserError(f"{index}: {error.strerror}; give a file that can be read") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of shards ({short(error)}); {AGAIN}") from None
    return files, {*shard_of}
