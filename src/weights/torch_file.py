"""Reads PyTorch's checkpoint files without PyTorch, and runs nothing that is in them.

The formats (PyTorch's note "Serialization semantics"; torch/serialization.py in its source):

- since 1.6, a zip of uncompressed records: `NAME/data.pkl`, a pickle in which a tensor is a call of
  `torch._utils._rebuild_tensor_v2` on a reference to a storage; `NAME/data/KEY`, the raw storages;
  `NAME/byteorder`, "little" (where it is missing, too);
- before, pickles one after the other: magic number, version 1001, the writer's C types, the object,
  the storage keys; then for each key an int64 count and the raw elements, little-endian.

A pickle is a program. Python's Unpickler is not safe on a stranger's file even with a strict
`find_class`: BUILD alters whatever that gave out, one opcode asks for a memo of 32 GB, the hash of
a deeply nested tuple overflows C's stack. So the few opcodes that a dict of tensors needs are
interpreted here. Globals stay names; those admitted are `collections.OrderedDict`, `torch.Size`,
`_rebuild_tensor_v2` and `_rebuild_parameter` of `torch._utils`, and the storage types below. All
else (functions, Namespace, NumPy scalars, devices, whole modules) is refused by name.
"""

from __future__ import annotations

import io
import logging
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from src.errors import UserError

_log = logging.getLogger(__name__)

# NumPy has no bfloat16: its 16 bits are read as integers and widened afterwards.
_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = ("<f8", "<f4", "<f2", "<u2", "<i8", "<i4", "<i2", "i1", "u1", "?")
_STORAGES = {f"torch.{kind}Storage": dtype for kind, dtype in zip(_KINDS, _DTYPES)}
_BFLOAT16 = "<u2"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_ORDERED_DICT, _SIZE = "collections.OrderedDict", "torch.Size"

# The opcodes that push their own argument, and those that push a constant.
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

# Where training scripts put the weights; the plain ones go before the averaged ones.
_ENTRIES = ("state_dict", "model", "model_state", "model_state_dict", "module")
_ENTRIES += ("model_ema", "state_dict_ema")

_MAX_PICKLE = 16 << 20  # CvT-13's takes 0.1 MB
_MAGIC = 0x1950A86A20F9469CFC6C
_AGAIN = "download or save it again"
_RESAVE = "in PyTorch 1.6 or later: torch.save(torch.load(FILE, map_location='cpu'), FILE)"
_REFUSED = (
    "only tensors and plain containers are read, and nothing is run; if you trust the source, "
    "save the weights alone with PyTorch: torch.save(model.state_dict(), FILE)"
)


class _Storage(NamedTuple):
    key: str
    dtype: str  # a value of _STORAGES
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * np.dtype(self.dtype).itemsize


class _Tensor(NamedTuple):
    """A tensor that is still in its file: a window on a storage, counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(str):
    """A name that the pickle asked for, never the thing of that name."""


_Opened = tuple[Any, Callable[[_Storage], bytes]]  # the unpickled content, what reads a storage


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a `.pth`, `.pt` or `.bin` file that torch.save wrote.

    A dict under a usual name ("state_dict", "model", ...) is unwrapped, and `module.` or
    `_orig_mod.` before all names is cut off; the log says what was taken and what was left.

    Returns:
        Arrays by name in the file's order: C-contiguous, read-only, of the file's own type, but
        float32 (exact) for bfloat16, which NumPy lacks. Tensors of one storage may share memory.

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
            return _arrays(_state_dict(content, path), read_storage, size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # zipfile, pickletools, NumPy ... each has its own for damaged bytes
        reason = f"{type(error).__name__}: {_short(error)}"
        raise UserError(f"{path}: cannot be read, perhaps damaged ({reason}); {_AGAIN}") from error


def _open(file: BinaryIO, size: int) -> _Opened:
    head = file.read(512)
    file.seek(0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(file, size)
    if head.startswith(b"\x80"):
        return _open_legacy(file, size)
    if not head:
        raise UserError(f"the file is empty; {_AGAIN}")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError("this is an HTML or XML page, not a checkpoint; download it again")
    if text.startswith(b"version https://git-lfs"):
        raise UserError("this is a Git LFS pointer, not the checkpoint; run: git lfs pull")
    if head[8:9] == b"{":
        raise UserError("this is a safetensors file; rename it to end in .safetensors")
    if head[257:262] == b"ustar":
        raise UserError(f"PyTorch's tar format from before 0.2; save it again {_RESAVE}")
    raise UserError(f"not a file that torch.save wrote, or its beginning is damaged; {_AGAIN}")


def _open_zip(file: BinaryIO, size: int) -> _Opened:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise UserError(f"the archive's end is missing or damaged; {_AGAIN}") from None
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
        raise UserError(f"its records claim more bytes than the file has; {_AGAIN}")
    for info in records.values():
        # 0 is what torch.serialization.set_crc32_options(False) leaves: nothing to compare with.
        info.CRC = info.CRC or None
    if records[f"{root}data.pkl"].file_size > _MAX_PICKLE:
        raise UserError(f"its data.pkl is larger than {_MAX_PICKLE >> 20} MB; {_REFUSED}")
    if f"{root}byteorder" in records and archive.read(f"{root}byteorder") != b"little":
        raise UserError(f"a big-endian file; save it again on this machine {_RESAVE}")

    def read_storage(storage: _Storage) -> bytes:
        info = records.get(f"{root}data/{storage.key}")
        if info is None or info.file_size != storage.nbytes:
            found = "is missing" if info is None else f"has {info.file_size} bytes"
            name = _short(storage.key)
            raise UserError(f"storage {name} of {storage.nbytes} bytes {found}; {_AGAIN}")
        return archive.read(info)

    content = _unpickle(io.BytesIO(archive.read(f"{root}data.pkl")), {})
    return content, read_storage


def _open_legacy(file: BinaryIO, size: int) -> _Opened:
    head = io.BytesIO(file.read(_MAX_PICKLE))
    storages: dict[str, _Storage] = {}
    if _unpickle(head, storages) != _MAGIC or _unpickle(head, storages) != 1001:
        raise UserError("a pickle, but not one that torch.save wrote")
    _unpickle(head, storages)  # the writer's C types: unused by PyTorch, too
    content, keys = _unpickle(head, storages), _unpickle(head, storages)

    starts, position = {}, head.tell()
    for key in keys:
        storage = storages.get(key) if type(key) is str else None
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        if storage is None or count != storage.numel or position + 8 + storage.nbytes > size:
            raise UserError(f"the storages do not fit their list: cut short or damaged; {_AGAIN}")
        starts[key] = position + 8
        position += 8 + storage.nbytes

    def read_storage(storage: _Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.nbytes)

    return content, read_storage


def _unpickle(stream: BinaryIO, storages: dict[str, _Storage]) -> Any:
    """Interprets the stream's next pickle; adds the storages it refers to."""
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for opcode, arg, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _LITERALS:
            stack.append(arg)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            else:
                _fill(stack[-1], items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            items, stack[-count:] = stack[-count:], []
            _fill(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_admit(arg.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_admit(".".join(stack[-2:]))]
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        elif name == "REDUCE":
            stack[-2:] = [_call(stack[-2], stack[-1])]
        elif name == "BUILD" and type(stack[-2]) is OrderedDict:
            stack.pop()  # `_metadata`, the layers' format versions: no weights in it
        elif name == "STOP":
            return stack[-1]
        elif name not in ("PROTO", "FRAME"):
            asked = f"{name} {_short(arg)}" if isinstance(arg, str) else name
            raise UserError(f"the pickle uses the opcode {asked}; {_REFUSED}")
    raise UserError(f"its pickle does not end; {_AGAIN}")


def _storage(reference: Any, storages: dict[str, _Storage]) -> _Storage:
    if type(reference) is not tuple or len(reference) < 5:
        reference = (None,) * 5
    tag, kind, key, _, numel, *part = reference
    # Before PyTorch 0.4 the sixth item could make the storage a part of another one.
    known = tag == "storage" and type(kind) is _Global and kind in _STORAGES and not any(part)
    if not known or type(key) is not str:
        raise UserError(f"the pickle refers to something that is no storage; {_REFUSED}")
    new = _Storage(key, _STORAGES[kind], *_sizes((numel,)))
    if storages.setdefault(key, new) != new:
        raise UserError(f"storage {_short(key)} is described in two ways; {_AGAIN}")
    return new


def _admit(name: str) -> _Global:
    if name not in _STORAGES and name not in (_TENSOR, _PARAMETER, _ORDERED_DICT, _SIZE):
        raise UserError(f"the pickle asks for {_short(name)}; {_REFUSED}")
    return _Global(name)


def _fill(container: Any, items: list[Any]) -> None:
    if type(container) is list:
        container.extend(items)
        return
    # No tuples, whose hash recurses, and no integers so long that a dict of them turns slow.
    plain = all(
        type(key) in (str, float) or (type(key) is int and key.bit_length() < 64)
        for key in items[::2]
    )
    if not plain or not isinstance(container, dict) or len(items) % 2:
        raise UserError(f"the pickle fills a container in an unusual way; {_REFUSED}")
    container.update(zip(items[::2], items[1::2]))


def _call(target: Any, arguments: Any) -> Any:
    """What a call of an admitted name makes."""
    name = target if type(target) is _Global else "something"
    first = arguments[0] if type(arguments) is tuple and arguments else None
    if name == _ORDERED_DICT and arguments == ():
        return OrderedDict()
    if name == _SIZE:
        return _sizes(first)
    if name == _PARAMETER and type(first) is _Tensor:
        return first
    if name == _TENSOR and type(first) is _Storage:
        offset, shape, strides = arguments[1:4]
        tensor = _Tensor(first, *_sizes((offset,)), _sizes(shape), _sizes(strides))
        if len(tensor.shape) == len(tensor.strides):
            return tensor
    raise UserError(f"the pickle calls {name} in an unusual way; {_REFUSED}")


def _sizes(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or not all(type(value) is int and value >= 0 for value in values):
        raise UserError(f"a size, stride or offset that is no number from 0 up; {_AGAIN}")
    return values


def _state_dict(content: Any, path: Path) -> dict[str, _Tensor]:
    """The tensors under the usual entries; logs which were taken and what else lay there."""
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
    tensors = {k: v for k, v in content.items() if type(v) is _Tensor and type(k) is str}
    left += [key for key in content if key not in tensors]
    names = ", ".join(map(_short, left[:8])) + (", ..." if len(left) > 8 else "")
    entry = " > ".join(trail) or "the top level"
    if not tensors:
        raise UserError(f"no tensors in {entry}, only: {names}; save model.state_dict() alone")
    if trail or left:
        level = logging.WARNING if any(key in _ENTRIES for key in left) else logging.INFO
        text = "%s: took %d tensors from %s; left: %s"
        _log.log(level, text, path, len(tensors), entry, names or "nothing")
    for prefix in ("module.", "_orig_mod.", "module."):  # DistributedDataParallel, torch.compile
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
            _log.info("%s: cut %r off all names", path, prefix)
    return tensors


def _is_nest(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, (_Tensor, dict)) for v in value.values())


def _arrays(
    tensors: dict[str, _Tensor], read_storage: Callable[[_Storage], bytes], size: int
) -> dict[str, np.ndarray]:
    """One storage after the other, so that no raw bytes lie beside all the copies of them."""
    by_storage: dict[_Storage, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage, []).append(name)
    arrays: dict[str, Any] = dict.fromkeys(tensors)
    # Views cost nothing, but copies of one storage, or strides of 0, could grow without bound.
    budget = 2 * size + (64 << 20)
    for storage, names in by_storage.items():
        raw = read_storage(storage)
        for name in names:
            array = _view(tensors[name], raw, _short(name))
            widen = storage.dtype == _BFLOAT16
            if widen or not array.flags.c_contiguous:
                budget -= array.nbytes * (2 if widen else 1)
                if budget < 0:
                    raise UserError(f"its tensors would take far more memory than it; {_AGAIN}")
                array = array.astype(np.uint32 if widen else array.dtype, order="C")
                if widen:
                    array = np.left_shift(array, np.uint32(16), out=array).view(np.float32)
            array.flags.writeable = False
            arrays[name] = array
    return arrays


def _view(tensor: _Tensor, raw: bytes, name: str) -> np.ndarray:
    storage, offset, shape, strides = tensor
    dtype = np.dtype(storage.dtype)
    if 0 in shape:
        return np.ndarray(shape, dtype)
    if offset + sum((n - 1) * step for n, step in zip(shape, strides)) >= storage.numel:
        raise UserError(f"tensor {name} reaches beyond its storage; {_AGAIN}")
    # This constructor checks the bounds against `raw` once more, as as_strided does not.
    in_bytes = [step * dtype.itemsize for step in strides]
    return np.ndarray(shape, dtype, raw, offset * dtype.itemsize, in_bytes)


def _short(text: object) -> str:
    """Fit for a message of one line, whatever a stranger's file named it."""
    printable = ascii(str(text))[1:-1]
    return printable if len(printable) <= 80 else f"{printable[:77]}..."
