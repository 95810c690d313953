"""Reads PyTorch's checkpoint files without PyTorch; `torch_pickle` interprets what they contain.

The formats (PyTorch's note "Serialization semantics"; torch/serialization.py in its source):

- since 1.6, a zip of uncompressed records: `NAME/data.pkl`, a pickle in which a tensor is a call of
  `torch._utils._rebuild_tensor_v2` on a reference to a storage; `NAME/data/KEY`, the raw storages;
  `NAME/byteorder`, "little" (where it is missing, too);
- before, pickles one after the other: magic number, version 1001, the writer's C types, the object,
  the storage keys; then for each key an int64 count and the raw elements, little-endian.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.errors import UserError
from src.weights.content import AGAIN, WIDENED, Content, Place, short, widen
from src.weights.kinds import MAX_TENSORS, TORCH_LEGACY, TORCH_ZIP, kind_of
from src.weights.torch_pickle import (
    BFLOAT16,
    REFUSED,
    Interpreter,
    Storage,
    StoredTensor,
    Stream,
)

_MAX_PICKLE = 4 << 20  # CvT-W24's, with its average and AdamW's state, takes 0.5 MB
_MAX_DIRECTORY, _MAX_DEPTH, _MAX_LIST = 4 << 20, 5, 16
_MAGIC = 0x1950A86A20F9469CFC6C
_RESAVE = "in PyTorch 1.6 or later: torch.save(torch.load(FILE, map_location='cpu'), FILE)"
_HELPERS = ("_codecs.encode", "copyreg._reconstructor", "copy_reg._reconstructor")

# Tells which of the tensors to read and what to call each.
Choose = Callable[[dict[Place, StoredTensor]], dict[Place, str]]
_Opened = tuple[Any, Callable[[Storage], bytes]]  # the unpickled content, what reads a storage


def read_torch_file(path: str | Path, choose: Choose | None = None) -> Content:
    """Read the tensors of a file that torch.save wrote, whatever its suffix.

    Args:
        path: the file.
        choose: is given all tensors by their place, the keys of the dicts down to them, and
            returns a name for each that is to be read; by default those of the fullest dict.

    Returns:
        Arrays that are C-contiguous, read-only, of the file's own type, but float32 (exact) for
        bfloat16. Tensors of one storage may share memory. The notes name the objects that were set
        aside, and the top level's entries of which nothing was read.

    Raises:
        UserError: no such file, damaged, another format, an attack, or no tensors; the message
            says which and what to do. Errors of `choose` come with the path before them.
    """
    path = Path(path)
    try:
        kind = kind_of(path)
        if kind not in (TORCH_ZIP, TORCH_LEGACY):
            raise UserError(f"this is a {kind} file, not one that torch.save wrote")
        with path.open("rb") as file:
            size = path.stat().st_size
            pickles = Interpreter()
            opened = _open_zip if kind == TORCH_ZIP else _open_legacy
            content, read_storage = opened(file, size, pickles)
            stored = _tensors(content, pickles)
            names = (choose or _fullest)(stored)
            tensors = {name: stored[place] for place, name in names.items()}
            arrays = _arrays(tensors, read_storage, size)
        return Content(arrays, _notes(content, names, tensors, pickles))
    except UserError as error:
        error.args = (f"{path}: {error}", *error.args[1:])
        raise
    except Exception as error:  # zipfile, pickletools, NumPy ... each has its own for damaged bytes
        reason = f"{type(error).__name__}: {short(error)}"
        raise UserError(f"{path}: cannot be read, perhaps damaged ({reason}); {AGAIN}") from error


def _notes(content: Any, names: dict, tensors: dict, pickles: Interpreter) -> list[str]:
    notes = []
    entries = {place[0] for place in names}
    items = content.items() if isinstance(content, dict) else ()
    left = [k for k, v in items if k not in entries and type(v) is not StoredTensor]
    if left:
        listed = ", ".join(map(short, left[:8])) + (", ..." if len(left) > 8 else "")
        notes.append(f"left aside {listed}")
    foreign = [name for name in pickles.foreign if name not in _HELPERS]
    if foreign:
        listed = ", ".join(map(short, foreign[:8])) + (", ..." if len(foreign) > 8 else "")
        notes.append(f"objects set aside, nothing of them run: {listed}")
    if any(tensor.storage.dtype == BFLOAT16 for tensor in tensors.values()):
        notes.append(WIDENED)
    return notes


def _open_zip(file: BinaryIO, size: int, pickles: Interpreter) -> _Opened:
    _require_small_directory(file, size)
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise UserError(f"the archive's end is missing or damaged; {AGAIN}") from None
    records = {info.filename: info for info in archive.infolist()}
    roots = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError("a zip archive, but not one that torch.save wrote (no data.pkl)")
    root = roots[0]
    if f"{root}constants.pkl" in records:
        raise UserError("a TorchScript archive; save its weights alone: torch.save of state_dict()")
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise UserError(f"compressed records, which torch.save never writes; save it {_RESAVE}")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise UserError(f"its records claim more bytes than the file has; {AGAIN}")
    for info in records.values():
        # 0 is what torch.serialization.set_crc32_options(False) leaves: nothing to compare with.
        info.CRC = info.CRC or None
    if records[f"{root}data.pkl"].file_size > _MAX_PICKLE:
        raise UserError(f"its data.pkl is larger than {_MAX_PICKLE >> 20} MB; {REFUSED}")
    if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
        raise UserError(f"a big-endian file; save it again on this machine {_RESAVE}")

    def read_storage(storage: Storage) -> bytes:
        info = records.get(f"{root}data/{storage.key}")
        if info is None or info.file_size != storage.nbytes:
            found = "is missing" if info is None else f"has {info.file_size} bytes"
            name = short(storage.key)
            raise UserError(f"storage {name} of {storage.nbytes} bytes {found}; {AGAIN}")
        return archive.read(info)

    content = pickles.unpickle(Stream(archive.read(f"{root}data.pkl")))
    return content, read_storage


def _require_small_directory(file: BinaryIO, size: int) -> None:
    """Refuse an archive of so many records that zipfile would be busy for long with their list."""
    tail = min(size, 22 + (1 << 16))
    file.seek(-tail, os.SEEK_END)
    end = file.read(tail)
    at = end.rfind(b"PK\x05\x06")
    length = int.from_bytes(end[at + 12 : at + 16], "little") if at >= 0 else 0
    wide = end.rfind(b"PK\x06\x06", 0, at)
    if length == 0xFFFFFFFF and wide >= 0:  # zip64
        length = int.from_bytes(end[wide + 40 : wide + 48], "little")
    if length > min(size, _MAX_DIRECTORY):
        raise UserError(f"its list of records claims {length} bytes; {AGAIN}")
    file.seek(0)


def _open_legacy(file: BinaryIO, size: int, pickles: Interpreter) -> _Opened:
    head = Stream(file.read(_MAX_PICKLE))
    storages = pickles.storages
    if pickles.unpickle(head) != _MAGIC or pickles.unpickle(head) != 1001:
        raise UserError("a pickle, but not one that torch.save wrote")
    pickles.unpickle(head)  # the writer's C types: unused by PyTorch, too
    content, keys = pickles.unpickle(head), pickles.unpickle(head)

    starts, position = {}, head.tell()
    for key in keys:
        storage = storages.get(key) if type(key) is str else None
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        if storage is None or count != storage.numel or position + 8 + storage.nbytes > size:
            raise UserError(f"the storages do not fit their list: cut short or damaged; {AGAIN}")
        starts[key] = position + 8
        position += 8 + storage.nbytes

    def read_storage(storage: Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.nbytes)

    return content, read_storage


def _tensors(content: Any, pickles: Interpreter) -> dict[Place, StoredTensor]:
    """Every tensor in dicts within dicts and short lists; what comes twice, at its first place.

    Raises:
        UserError: none, or too many.
    """
    if not isinstance(content, (dict, list, tuple)) or type(content) is StoredTensor:
        raise UserError(f"no dict in it{_objects(pickles)}; save model.state_dict() alone")
    found: dict[Place, StoredTensor] = {}
    seen, level = {id(content)}, [((), content)]
    for _ in range(_MAX_DEPTH):
        deeper = []
        for place, container in level:
            for key, value in _entries(container):
                if type(value) is StoredTensor:
                    found[(*place, key)] = value
                elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                    seen.add(id(value))
                    deeper.append(((*place, key), value))
        if len(found) > MAX_TENSORS:
            raise UserError(f"it has more than {MAX_TENSORS} tensors; {REFUSED}")
        level = deeper
    if not found:
        keys = [key for key, _ in _entries(content)]
        listed = ", ".join(map(short, keys[:8])) + (", ..." if len(keys) > 8 else "")
        only = f", only: {listed}" if listed else ""
        raise UserError(
            f"no tensors in the top level{only}{_objects(pickles)}; save model.state_dict() alone"
        )
    return found


def _fullest(stored: dict[Place, StoredTensor]) -> dict[Place, str]:
    """The tensors of the dict that holds the most, by its own keys."""
    above = Counter(place[:-1] for place in stored).most_common(1)[0][0]
    return {place: place[-1] for place in stored if place[:-1] == above}


def _entries(container: dict | list | tuple) -> list[tuple[str, Any]]:
    if isinstance(container, dict):
        return list(container.items())
    short_enough = len(container) <= _MAX_LIST
    return [(str(n), each) for n, each in enumerate(container)] if short_enough else []


def _objects(pickles: Interpreter) -> str:
    first = ", ".join(map(short, list(pickles.foreign)[:3]))
    return f" (objects of {first}, which are not run)" if first else ""


def _arrays(
    tensors: dict[str, StoredTensor], read_storage: Callable[[Storage], bytes], size: int
) -> dict[str, np.ndarray]:
    """One storage after the other, so that no raw bytes lie beside all the copies of them."""
    by_storage: dict[Storage, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage, []).append(name)
    arrays: dict[str, Any] = dict.fromkeys(tensors)
    # Views cost nothing, but copies of one storage, or strides of 0, could grow without bound.
    budget = 2 * size + (64 << 20)
    for storage, names in by_storage.items():
        raw = read_storage(storage)
        for name in names:
            array = _view(tensors[name], raw, short(name))
            wide = storage.dtype == BFLOAT16
            if wide or not array.flags.c_contiguous:
                budget -= array.nbytes * (2 if wide else 1)
                if budget < 0:
                    raise UserError(f"its tensors would take far more memory than it; {AGAIN}")
                array = widen(array) if wide else array.copy(order="C")
            array.flags.writeable = False
            arrays[name] = array
    return arrays


def _view(tensor: StoredTensor, raw: bytes, name: str) -> np.ndarray:
    storage, offset, shape, strides = tensor
    dtype = np.dtype(storage.dtype)
    if 0 in shape:
        return np.ndarray(shape, dtype)
    if offset + sum((n - 1) * step for n, step in zip(shape, strides)) >= storage.numel:
        raise UserError(f"tensor {name} reaches beyond its storage; {AGAIN}")
    # This constructor checks the bounds against `raw` once more, as as_strided does not.
    in_bytes = [step * dtype.itemsize for step in strides]
    return np.ndarray(shape, dtype, raw, offset * dtype.itemsize, in_bytes)
