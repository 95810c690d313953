"""Reads PyTorch's checkpoint files without PyTorch; `torch_pickle` interprets what they contain.

The formats (PyTorch's note "Serialization semantics"; torch/serialization.py in its source):

- since 1.6, a zip of uncompressed records: `NAME/data.pkl`, a pickle in which a tensor is a call of
  `torch._utils._rebuild_tensor_v2` on a reference to a storage; `NAME/data/KEY`, the raw storages;
  `NAME/byteorder`, "little" (where it is missing, too);
- before, pickles one after the other: magic number, version 1001, the writer's C types, the object,
  the storage keys; then for each key an int64 count and the raw elements, little-endian.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.errors import UserError
from src.weights.content import AGAIN, WIDENED, Content, short, widen
from src.weights.torch_pickle import BFLOAT16, REFUSED, Storage, StoredTensor, unpickle

# Where training scripts put the weights; the plain ones go before the averaged ones.
_ENTRIES = ("state_dict", "model", "model_state", "model_state_dict", "module")
_ENTRIES += ("model_ema", "state_dict_ema")

_MAX_PICKLE = 16 << 20  # CvT-13's takes 0.1 MB
_MAGIC = 0x1950A86A20F9469CFC6C
_RESAVE = "in PyTorch 1.6 or later: torch.save(torch.load(FILE, map_location='cpu'), FILE)"

_Opened = tuple[Any, Callable[[Storage], bytes]]  # the unpickled content, what reads a storage


def read_torch_file(path: str | Path) -> Content:
    """Reads the tensors of a `.pth`, `.pt` or `.bin` file that torch.save wrote.

    A dict under a usual name ("state_dict", "model", ...) is unwrapped, and `module.` or
    `_orig_mod.` before all names is cut off; the notes say what was taken and what was left.

    Returns:
        Arrays that are C-contiguous, read-only, of the file's own type, but float32 (exact) for
        bfloat16. Tensors of one storage may share memory.

    Raises:
        UserError: no such file, damaged, another format, holds something that is neither tensor
            nor plain container, or no tensors; the message says which and what to do.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError("there is no such file")
        with path.open("rb") as file:
            size = path.stat().st_size
            content, read_storage = _open(file, size)
            tensors, notes = _state_dict(content)
            if any(tensor.storage.dtype == BFLOAT16 for tensor in tensors.values()):
                notes.append(WIDENED)
            return Content(_arrays(tensors, read_storage, size), notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # zipfile, pickletools, NumPy ... each has its own for damaged bytes
        reason = f"{type(error).__name__}: {short(error)}"
        raise UserError(f"{path}: cannot be read, perhaps damaged ({reason}); {AGAIN}") from error


def _open(file: BinaryIO, size: int) -> _Opened:
    head = file.read(512)
    file.seek(0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(file, size)
    if head.startswith(b"\x80"):
        return _open_legacy(file, size)
    if not head:
        raise UserError(f"the file is empty; {AGAIN}")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError("this is an HTML or XML page, not a checkpoint; download it again")
    if text.startswith(b"version https://git-lfs"):
        raise UserError("this is a Git LFS pointer, not the checkpoint; run: git lfs pull")
    if head[8:9] == b"{":
        raise UserError("this is a safetensors file; rename it to end in .safetensors")
    if head[257:262] == b"ustar":
        raise UserError(f"PyTorch's tar format from before 0.2; save it again {_RESAVE}")
    raise UserError(f"not a file that torch.save wrote, or its beginning is damaged; {AGAIN}")


def _open_zip(file: BinaryIO, size: int) -> _Opened:
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

    content = unpickle(io.BytesIO(archive.read(f"{root}data.pkl")), {})
    return content, read_storage


def _open_legacy(file: BinaryIO, size: int) -> _Opened:
    head = io.BytesIO(file.read(_MAX_PICKLE))
    storages: dict[str, Storage] = {}
    if unpickle(head, storages) != _MAGIC or unpickle(head, storages) != 1001:
        raise UserError("a pickle, but not one that torch.save wrote")
    unpickle(head, storages)  # the writer's C types: unused by PyTorch, too
    content, keys = unpickle(head, storages), unpickle(head, storages)

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


def _state_dict(content: Any) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors under the usual entries; notes on which were taken and what else lay there."""
    trail: list[str] = []
    left: list[Any] = []
    for _ in range(4):
        if not isinstance(content, dict):
            raise UserError("no dict in it; save model.state_dict() alone")
        entry = next((key for key in _ENTRIES if _is_nest(content.get(key))), None)
        if entry is None:
            break
        left += [key for key in content if key != entry]
        trail.append(entry)
        content = content[entry]
    tensors = {k: v for k, v in content.items() if type(v) is StoredTensor and type(k) is str}
    left += [key for key in content if key not in tensors]
    names = ", ".join(map(short, left[:8])) + (", ..." if len(left) > 8 else "")
    entry = " > ".join(trail) or "the top level"
    if not tensors:
        raise UserError(f"no tensors in {entry}, only: {names}; save model.state_dict() alone")
    notes = [f"taken from {entry}"] if trail else []
    if left:
        notes.append(f"left aside {names}")
    others = [key for key in left if key in _ENTRIES]
    if others:
        notes.append(f"{others[0]} may hold other weights: save it alone to load it")
    for prefix in ("module.", "_orig_mod.", "module."):  # DistributedDataParallel, torch.compile
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
            notes.append(f"{prefix} cut off all names")
    return tensors, notes


def _is_nest(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(v, (StoredTensor, dict)) for v in value.values()
    )


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
