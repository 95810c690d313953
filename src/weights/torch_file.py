"""Read PyTorch's checkpoint files without PyTorch; `torch_pickle` interprets their pickles.

The formats (PyTorch's note "Serialization semantics"; torch/serialization.py):

- since 1.6, a zip of uncompressed records: `NAME/data.pkl`, a pickle in which a tensor is a call of
  `torch._utils._rebuild_tensor_v2` on a reference to a storage; `NAME/data/KEY`, the raw storages;
  `NAME/byteorder`, "little" (the default if missing);
- before, consecutive pickles: magic number, version 1001, the writer's C types, the object, the
  storage keys; then for each key an int64 count and the raw elements, little-endian.
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
from src.weights.content import AGAIN, RESAVE, WIDENED, Content, KeyPath, short, short_names, widen
from src.weights.kinds import MAX_TENSORS, TORCH_LEGACY, TORCH_ZIP, kind_of
from src.weights.torch_pickle import (
    BFLOAT16,
    REFUSED,
    Foreign,
    Interpreter,
    Storage,
    StoredTensor,
    Stream,
)

_MAX_PICKLE = 4 << 20  # CvT-W24's, with its average and AdamW's state, takes 0.5 MB
_MAX_DIRECTORY, _MAX_DEPTH, _MAX_LIST = 4 << 20, 5, 16
_MAGIC = 0x1950A86A20F9469CFC6C
_HELPERS = ("_codecs.encode", "copyreg._reconstructor", "copy_reg._reconstructor")

_PARAMETERS = ("weight", "bias", "running_mean", "running_var")
_ARRAYS = "NumPy arrays, which are not read; save torch.from_numpy(array) of each with torch.save"

# Given all tensors, returns a name for each one to read.
Choose = Callable[[dict[KeyPath, StoredTensor]], dict[KeyPath, str]]
_Opened = tuple[Any, Callable[[Storage], bytes]]  # the unpickled content, the storage reader


def read_torch_file(path: str | Path, choose: Choose | None = None) -> Content:
    """Read the tensors of a file that torch.save wrote, whatever its suffix.

    Args:
        path: the file.
        choose: receives all tensors by key path and returns a name for each one to read; by
            default, those of the dict with the most tensors.

    Returns:
        C-contiguous, read-only arrays of the file's dtype, or float32 (exact) for bfloat16. Tensors
        of one storage may share memory. The notes name the objects and the top-level entries that
        were skipped.

    Raises:
        UserError: no such file, damaged, another format, an attack, or no tensors. Errors of
            `choose` get the path in front.
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
            stored = _find_tensors(content, pickles)
            names = (choose or _largest_dict)(stored)
            _require_no_arrays(content, {path[:-1] for path in names})
            tensors = {name: stored[path] for path, name in names.items()}
            arrays = _arrays(tensors, read_storage, size)
        return Content(arrays, _notes(content, names, tensors, pickles))
    except UserError as error:
        error.args = (f"{path}: {error}", *error.args[1:])
        raise
    except Exception as error:  # for damaged bytes, zipfile, pickletools and NumPy raise many types
        reason = f"{type(error).__name__}: {short(error)}"
        raise UserError(f"{path}: cannot be read, possibly damaged ({reason}); {AGAIN}") from error


def _require_no_arrays(content: Any, places: set[KeyPath]) -> None:
    """Raise UserError if a parameter beside the chosen tensors is a NumPy array, which is not read.

    Its tensor would be missing, and a new head would take its place.
    """
    for place in places:
        container = content
        for key in place:
            container = dict(_entries(container))[key]
        arrays = [
            key
            for key, value in _entries(container)
            if key.rpartition(".")[2] in _PARAMETERS and _is_array(value)
        ]
        if arrays:
            raise UserError(f"{short_names(arrays, 4)}: {_ARRAYS}")


def _is_array(value: Any) -> bool:
    return type(value) is Foreign and str(value.kind).endswith("multiarray._reconstruct")


def _notes(content: Any, names: dict, tensors: dict, pickles: Interpreter) -> list[str]:
    notes = []
    entries = {path[0] for path in names}
    items = content.items() if isinstance(content, dict) else ()
    skipped = [k for k, v in items if k not in entries and type(v) is not StoredTensor]
    if skipped:
        notes.append(f"skipped {short_names(skipped, 8)}")
    foreign = [name for name in pickles.foreign if name not in _HELPERS]
    if foreign:
        notes.append(f"objects skipped without running them: {short_names(foreign, 8)}")
    if any(tensor.storage.dtype == BFLOAT16 for tensor in tensors.values()):
        notes.append(WIDENED)
    return notes


def _open_zip(file: BinaryIO, size: int, pickles: Interpreter) -> _Opened:
    _require_small_directory(file, size)
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise UserError(f"the end of the archive is missing or damaged; {AGAIN}") from None
    records = {info.filename: info for info in archive.infolist()}
    roots = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError(
            "a zip archive, but not one that torch.save wrote (no data.pkl); give the weight file, "
            "or save NumPy's arrays as .safetensors"
        )
    root = roots[0]
    if f"{root}constants.pkl" in records:
        raise UserError(
            "a TorchScript archive; save its weights alone: torch.save(model.state_dict(), FILE)"
        )
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise UserError(f"compressed records, which torch.save never writes; save it {RESAVE}")
    if sum(info.file_size for info in archive.infolist()) > size:
        raise UserError(f"its records claim more bytes than the file has; {AGAIN}")
    for info in records.values():
        # torch.serialization.set_crc32_options(False) writes 0; None skips the comparison.
        info.CRC = info.CRC or None
    if records[f"{root}data.pkl"].file_size > _MAX_PICKLE:
        raise UserError(f"its data.pkl is larger than {_MAX_PICKLE >> 20} MB; {REFUSED}")
    if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
        raise UserError(f"a big-endian file; save it again on this machine {RESAVE}")

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
    """Check the length of the archive's directory, because zipfile parses all of it at once.

    Raises:
        UserError: the directory is longer than any weight file's.
    """
    tail = min(size, 22 + (1 << 16))
    file.seek(-tail, os.SEEK_END)
    end = file.read(tail)
    at = end.rfind(b"PK\x05\x06")
    length = int.from_bytes(end[at + 12 : at + 16], "little") if at >= 0 else 0
    wide = end.rfind(b"PK\x06\x06", 0, at)
    if length == 0xFFFFFFFF and wide >= 0:  # zip64
        length = int.from_bytes(end[wide + 40 : wide + 48], "little")
    if length > min(size, _MAX_DIRECTORY):
        raise UserError(f"its directory claims {length} bytes; {AGAIN}")
    file.seek(0)


def _open_legacy(file: BinaryIO, size: int, pickles: Interpreter) -> _Opened:
    head = Stream(file.read(_MAX_PICKLE))
    storages = pickles.storages
    if pickles.unpickle(head) != _MAGIC or pickles.unpickle(head) != 1001:
        raise UserError(
            "a pickle, but not one that torch.save wrote; give the weight file, or save its "
            "tensors with torch.save"
        )
    pickles.unpickle(head)  # the writer's C types, which PyTorch does not use either
    content, keys = pickles.unpickle(head), pickles.unpickle(head)

    starts, position = {}, head.tell()
    for key in keys:
        storage = storages.get(key) if type(key) is str else None
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        if storage is None or count != storage.numel or position + 8 + storage.nbytes > size:
            raise UserError(f"its storages do not match their list: truncated or damaged; {AGAIN}")
        starts[key] = position + 8
        position += 8 + storage.nbytes

    def read_storage(storage: Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.nbytes)

    return content, read_storage


def _find_tensors(content: Any, pickles: Interpreter) -> dict[KeyPath, StoredTensor]:
    """Collect the tensors in nested dicts and short lists; a shared container counts once.

    Raises:
        UserError: no tensors, or too many.
    """
    if not isinstance(content, (dict, list, tuple)) or type(content) is StoredTensor:
        raise UserError(f"contains no dict{_objects(pickles)}; save model.state_dict() alone")
    found: dict[KeyPath, StoredTensor] = {}
    seen, level = {id(content)}, [((), content)]
    for _ in range(_MAX_DEPTH):
        deeper = []
        for path, container in level:
            for key, value in _entries(container):
                if type(value) is StoredTensor:
                    found[(*path, key)] = value
                elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                    seen.add(id(value))
                    deeper.append(((*path, key), value))
        if len(found) > MAX_TENSORS:
            raise UserError(f"it has more than {MAX_TENSORS} tensors; {REFUSED}")
        level = deeper
    if not found:
        listed = short_names([key for key, _ in _entries(content)], 8)
        only = f", only: {listed}" if listed else ""
        if any(name.endswith("multiarray._reconstruct") for name in pickles.foreign):
            raise UserError(f"no tensors in the top level{only}, but {_ARRAYS}")
        raise UserError(
            f"no tensors in the top level{only}{_objects(pickles)}; save model.state_dict() alone"
        )
    return found


def _largest_dict(stored: dict[KeyPath, StoredTensor]) -> dict[KeyPath, str]:
    """Choose the tensors of the dict that holds the most of them, under its own keys."""
    parent = Counter(path[:-1] for path in stored).most_common(1)[0][0]
    return {path: path[-1] for path in stored if path[:-1] == parent}


def _entries(container: dict | list | tuple) -> list[tuple[str, Any]]:
    if isinstance(container, dict):
        return list(container.items())
    short_enough = len(container) <= _MAX_LIST
    return [(str(n), each) for n, each in enumerate(container)] if short_enough else []


def _objects(pickles: Interpreter) -> str:
    names = short_names(list(pickles.foreign), 3)
    return f" (objects of {names}, which are not run)" if names else ""


def _arrays(
    tensors: dict[str, StoredTensor], read_storage: Callable[[Storage], bytes], size: int
) -> dict[str, np.ndarray]:
    """Read the arrays one storage at a time, so that only one storage's raw bytes are in memory."""
    by_storage: dict[Storage, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage, []).append(name)
    arrays: dict[str, Any] = dict.fromkeys(tensors)
    # Views need no memory, but copies of one storage, or strides of 0, could use any amount.
    budget = 2 * size + (64 << 20)
    for storage, names in by_storage.items():
        raw = read_storage(storage)
        for name in names:
            array = _view(tensors[name], raw, short(name))
            wide = storage.dtype == BFLOAT16
            if wide or not array.flags.c_contiguous:
                budget -= array.nbytes * (2 if wide else 1)
                if budget < 0:
                    raise UserError(f"its tensors need far more memory than its size; {AGAIN}")
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
        raise UserError(f"tensor {name} exceeds its storage; {AGAIN}")
    # Unlike as_strided, this constructor checks the bounds against `raw` again.
    in_bytes = [step * dtype.itemsize for step in strides]
    return np.ndarray(shape, dtype, raw, offset * dtype.itemsize, in_bytes)
