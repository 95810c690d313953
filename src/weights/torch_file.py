"""Reads PyTorch's checkpoint files without PyTorch, and runs nothing that is in them.

The formats (PyTorch, "Serialization semantics"; torch/serialization.py in its source):

- since 1.6 a zip of uncompressed records: `NAME/data.pkl`, a pickle in which each tensor is a call of
  `torch._utils._rebuild_tensor_v2` on a reference to a storage; `NAME/data/KEY`, the storages' raw bytes;
  `NAME/byteorder` ("little" where it is missing);
- before, one pickle after the other: magic number, protocol 1001, facts about the machine, the object,
  the list of storage keys; then per storage an int64 count and the raw elements, little-endian.

A pickle is a program. Python's `pickle.Unpickler` is not safe on a stranger's file even with a strict
`find_class`: BUILD alters whatever `find_class` gave out, one opcode can ask for a memo of 32 GB, hashing
a deeply nested tuple overflows C's stack. So the few opcodes that dicts of tensors need (protocols 2 to 5)
are interpreted here: globals stay names, and those admitted are `collections.OrderedDict`, `torch.Size`,
`torch._utils._rebuild_tensor`, `_rebuild_tensor_v2` and `_rebuild_parameter`, and the storage types in
`_STORAGES`. All else is refused by name before any tensor is read.
"""

from __future__ import annotations

import io
import logging
import math
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.errors import UserError

_log = logging.getLogger(__name__)

# NumPy has no bfloat16: read as its 16 bits, widened afterwards.
_STORAGES = {
    "torch.DoubleStorage": "f8", "torch.FloatStorage": "f4", "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": "bf16", "torch.LongStorage": "i8", "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2", "torch.CharStorage": "i1", "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}  # fmt: skip
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETER = "torch._utils._rebuild_parameter"
_CONTAINERS = ("collections.OrderedDict", "torch.Size")

_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
             "BINSTRING", "SHORT_BINSTRING"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARKED = {"TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"}

# Where training scripts put the weights, best first: plain weights before averaged ones.
_ENTRIES = ("state_dict", "model", "model_state", "model_state_dict", "module",
            "model_ema", "state_dict_ema", "ema")  # fmt: skip

_MAX_PICKLE = 16 << 20  # CvT-W24's takes 0.1 MB, a training checkpoint's with optimizer state 1 MB
_MAGIC = 0x1950A86A20F9469CFC6C
_RESAVE = "load it in PyTorch 1.6 or later and save its state dict again: torch.save(state_dict, NEW)"
# What zipfile, struct, pickletools and NumPy raise on bytes that make no sense.
_DAMAGE = (zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, LookupError, TypeError,
           ArithmeticError, RuntimeError, MemoryError)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: str
    numel: int

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else np.dtype(self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor that is still in its file: a window on a storage, counted in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asked for; never the thing of that name."""

    name: str


_ReadStorage = Callable[[_Storage], bytes]


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a `.pth`, `.pt` or `.bin` file that torch.save wrote.

    A dict under one of the usual names ("state_dict", "model", ...) is unwrapped and a `module.` or
    `_orig_mod.` before all names is cut off; the log says what was taken and what was left.

    Returns:
        Arrays by name, in the file's order: C-contiguous, read-only, in the file's own type; bfloat16,
        which NumPy lacks, comes as float32 (exact). Tensors that share a storage may share memory.

    Raises:
        UserError: no such file, damaged, another format, something in it that is neither tensor nor
            plain container, or no tensors; says which.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError("no such file")
        with path.open("rb") as file:
            size = path.stat().st_size
            content, read_storage, order = _open(file, size)
            tensors = _state_dict(content, path)
            arrays = _arrays(tensors, read_storage, order, size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {_short(error)}"
        raise UserError(f"{path}: damaged, or not a PyTorch file ({reason}); get it again") from error
    return _without_prefix(arrays, path)


def _open(file: BinaryIO, size: int) -> tuple[Any, _ReadStorage, str]:
    """The unpickled content, with `_Tensor` for tensors; how to read a storage; the byte order."""
    head = file.read(512)
    file.seek(0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(file, size)
    if head.startswith(b"\x80"):
        return _open_legacy(file, size)
    if not head:
        raise UserError("the file is empty; download or save it again")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError("this is an HTML or XML page, not a checkpoint; download the file again")
    if text.startswith(b"version https://git-lfs"):
        raise UserError("this is a Git LFS pointer, not the checkpoint; run: git lfs pull")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        raise UserError("this is a safetensors file; rename it to end in .safetensors")
    if head[257:262] == b"ustar":
        raise UserError(f"this is PyTorch's tar format from before 0.2; {_RESAVE}")
    raise UserError("not a file that torch.save wrote; was it downloaded whole, is it a checkpoint?")


def _open_zip(file: BinaryIO, size: int) -> tuple[Any, _ReadStorage, str]:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile:
        raise UserError("the archive's end is missing or damaged; download or save it again") from None
    records = {info.filename: info for info in archive.infolist()}
    for info in records.values():
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"compressed record {_short(info.filename)}; torch.save never compresses, "
                            f"someone packed this again; {_RESAVE}")  # fmt: skip
        # 0 is what torch.serialization.set_crc32_options(False) writes: no check wanted.
        info.CRC = info.CRC or None
    if sum(info.file_size for info in archive.infolist()) > size:
        raise UserError("the records claim more bytes than the file has; download or save it again")
    roots = [name[: -len("data.pkl")] for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError("a zip archive, but not one that torch.save wrote (no data.pkl)")
    root = roots[0]
    if f"{root}constants.pkl" in records:
        raise UserError("a TorchScript archive; save its state_dict() with torch.save instead")
    if records[f"{root}data.pkl"].file_size > _MAX_PICKLE:
        raise UserError(f"its data.pkl is larger than {_MAX_PICKLE >> 20} MB; {_RESAVE}")

    order = b"little"
    if f"{root}byteorder" in records:
        with archive.open(f"{root}byteorder") as record:
            order = record.read(16)
    if order not in (b"little", b"big"):
        raise UserError(f"unknown byte order {_short(order)}; {_RESAVE}")

    def read_storage(storage: _Storage) -> bytes:
        info = records.get(f"{root}data/{storage.key}")
        nbytes = storage.numel * storage.itemsize
        if info is None or info.file_size != nbytes:
            found = "is missing" if info is None else f"has {info.file_size} bytes"
            raise UserError(f"storage {_short(storage.key)} should have {nbytes} bytes but {found}; "
                            "download or save it again")  # fmt: skip
        return archive.read(info)

    content = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
    return content, read_storage, "<" if order == b"little" else ">"


def _open_legacy(file: BinaryIO, size: int) -> tuple[Any, _ReadStorage, str]:
    head = io.BytesIO(file.read(_MAX_PICKLE))
    unpickler = _Unpickler(head)
    if unpickler.load() != _MAGIC or unpickler.load() != 1001:
        raise UserError("a pickle, but not one that torch.save wrote")
    unpickler.load()  # the writer's sizes of C types
    content = unpickler.load()

    starts, position = {}, None
    for key in unpickler.load():
        storage = unpickler.storages.get(key) if type(key) is str else None
        if storage is None:
            raise UserError(f"lists a storage that no tensor uses; {_RESAVE}")
        position = head.tell() if position is None else position
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        starts[key] = position + 8
        position += 8 + storage.numel * storage.itemsize
        if count != storage.numel or position > size:
            raise UserError("the file is cut short or damaged; download or save it again")

    def read_storage(storage: _Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.numel * storage.itemsize)

    return content, read_storage, "<"


class _Unpickler:
    """Interprets pickles of plain containers and tensors; each `load()` reads one from the stream."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.storages: dict[str, _Storage] = {}

    def load(self) -> Any:
        stack: list = []
        marks: list[list] = []
        memo: dict[int, Any] = {}
        for opcode, arg, _ in pickletools.genops(self.stream):
            name = opcode.name
            if name in _LITERALS:
                stack.append(arg)
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if arg is None else arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "EMPTY_LIST":
                stack.append([])
            elif name == "MARK":
                marks.append(stack)
                stack = []
            elif name in _MARKED:
                items, stack = stack, marks.pop()
                _collect(name, items, stack)
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            elif name in ("APPEND", "SETITEM"):
                count = 1 if name == "APPEND" else 2
                items, stack[-count:] = stack[-count:], []
                _collect(f"{name}S", items, stack)
            elif name == "GLOBAL":
                stack.append(_admit(arg.replace(" ", ".", 1)))
            elif name == "STACK_GLOBAL":
                stack[-2:] = [_admit(f"{stack[-2]!s}.{stack[-1]!s}")]
            elif name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif name == "REDUCE":
                arguments = stack.pop()
                stack.append(_rebuild(stack.pop(), arguments))
            elif name == "BUILD" and type(stack[-2]) is OrderedDict:
                stack.pop()  # `_metadata`, the layers' format versions: no weights in it
            elif name == "STOP":
                return stack[-1]
            elif name not in ("PROTO", "FRAME"):
                asked = f" {_short(arg)}" if isinstance(arg, str) else ""
                raise UserError(f"the pickle uses {name}{asked}; {_ONLY_TENSORS}")
        raise UserError("its pickle does not end; download or save it again")

    def _storage(self, reference: Any) -> _Storage:
        """('storage', type, key, device, element count), in the old format with a view at the end."""
        if type(reference) is not tuple or len(reference) not in (5, 6) or reference[0] != "storage":
            raise UserError(f"the pickle refers to something that is no storage; {_ONLY_TENSORS}")
        kind, key, numel = reference[1], reference[2], reference[4]
        if type(kind) is not _Global or kind.name not in _STORAGES or type(key) is not str:
            raise UserError(f"a storage of an unknown type; {_ONLY_TENSORS}")
        if reference[5:] not in ((), (None,)):
            raise UserError(f"a storage that is a view of another, as before PyTorch 0.4; {_RESAVE}")
        new = _Storage(key, _STORAGES[kind.name], *_sizes((numel,)))
        storage = self.storages.setdefault(key, new)
        if (storage.dtype, storage.numel) != (new.dtype, new.numel):
            raise UserError(f"storage {_short(key)} is described in two ways; {_RESAVE}")
        return storage


_ONLY_TENSORS = (
    "only tensors and plain containers are read and nothing is run; if you trust the file's source, "
    "save the state dict alone with PyTorch: torch.save(model.state_dict(), NEW)"
)


def _admit(name: str) -> _Global:
    if name not in (*_STORAGES, *_TENSORS, _PARAMETER, *_CONTAINERS):
        raise UserError(f"the pickle asks for {_short(name)}; {_ONLY_TENSORS}")
    return _Global(name)


def _collect(name: str, items: list, stack: list) -> None:
    """Makes a container of `items`, or adds them to the one on top of the stack."""
    if name == "TUPLE":
        stack.append(tuple(items))
    elif name == "LIST":
        stack.append(items)
    elif name == "APPENDS" and type(stack[-1]) is list:
        stack[-1].extend(items)
    elif name in ("DICT", "SETITEMS"):
        if name == "DICT":
            stack.append({})
        for key, value in zip(items[::2], items[1::2]):
            _set(stack[-1], key, value)
    else:
        raise UserError(f"the pickle fills something that is no list; {_ONLY_TENSORS}")


def _set(container: Any, key: Any, value: Any) -> None:
    # No tuples, whose hash may recurse without end, nor integers so long that they can share hashes.
    plain = type(key) in (str, bool, float) or (type(key) is int and key.bit_length() < 64)
    if not isinstance(container, dict) or not plain:
        raise UserError(f"the pickle fills a dict in an unusual way; {_ONLY_TENSORS}")
    container[key] = value


def _rebuild(target: Any, arguments: Any) -> Any:
    """What a call of one of the admitted names would have made."""
    name = target.name if type(target) is _Global else ""
    count = len(arguments) if type(arguments) is tuple else -1
    if name in _TENSORS and count >= 4 and type(arguments[0]) is _Storage:
        storage, offset, shape, strides = arguments[:4]
        tensor = _Tensor(storage, *_sizes((offset,)), _sizes(shape), _sizes(strides))
        if len(tensor.shape) == len(tensor.strides) <= 32:  # NumPy's limit
            return tensor
    if name == _PARAMETER and count >= 1 and type(arguments[0]) is _Tensor:
        return arguments[0]
    if name == "torch.Size" and count == 1:
        return _sizes(arguments[0])
    if name == "collections.OrderedDict" and count in (0, 1):
        filled: OrderedDict = OrderedDict()
        for key, value in arguments[0] if count else ():  # Python 2 passes the pairs here
            _set(filled, key, value)
        return filled
    raise UserError(f"the pickle calls {name or 'something'} in an unusual way; {_ONLY_TENSORS}")


def _sizes(values: Any) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or not all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    ):
        raise UserError(f"a size, stride or offset that is no number from 0 up; {_RESAVE}")
    return tuple(values)


def _state_dict(content: Any, path: Path) -> dict[str, _Tensor]:
    """The tensors of the first dict with any under the usual names; the log says what was left."""
    found = _find(content, set(), depth=0)
    if found is None:
        held = type(content).__name__.lstrip("_").lower()
        if isinstance(content, dict):
            held += f" of {', '.join(_short(key) for key in list(content)[:8]) or 'nothing'}"
        raise UserError(f"no named tensors in it, but a {held}; a state dict is needed")
    trail, chosen = found
    left, level = [], content
    for key in trail:
        left += [other for other in level if other != key]
        level = level[key]
    tensors = {k: v for k, v in chosen.items() if type(v) is _Tensor and type(k) is str}
    left += [other for other in chosen if other not in tensors]
    if trail or left:
        rivals = any(other in _ENTRIES for other in left)
        listed = ", ".join(_short(key) for key in left[:8]) + (", ..." if len(left) > 8 else "")
        _log.log(
            logging.WARNING if rivals else logging.INFO,
            "%s: took %d tensors from %s; left: %s",
            path, len(tensors), " > ".join(trail) or "the top level", listed or "nothing",
        )  # fmt: skip
    return tensors


def _find(content: Any, seen: set[int], depth: int) -> tuple[tuple[str, ...], dict] | None:
    if not isinstance(content, dict) or id(content) in seen or depth > 3:
        return None
    seen.add(id(content))
    for key in _ENTRIES:
        found = _find(content.get(key), seen, depth + 1)
        if found:
            return (key, *found[0]), found[1]
    named = any(type(v) is _Tensor and type(k) is str for k, v in content.items())
    return ((), content) if named else None


def _arrays(
    tensors: dict[str, _Tensor], read_storage: _ReadStorage, order: str, size: int
) -> dict[str, np.ndarray]:
    by_storage: dict[_Storage, list[str]] = {}
    for name, tensor in tensors.items():
        by_storage.setdefault(tensor.storage, []).append(name)
    arrays: dict[str, Any] = dict.fromkeys(tensors)
    # Views cost nothing; copies could grow without bound: thousands of one storage, strides of 0.
    budget = 2 * size + (64 << 20)
    for storage, names in by_storage.items():
        raw = read_storage(storage)
        if len(raw) != storage.numel * storage.itemsize:
            raise UserError("the file is cut short or damaged; download or save it again")
        for name in names:
            array = _view(name, tensors[name], raw, order)
            widen = storage.dtype == "bf16"
            if widen or not (array.flags.c_contiguous and array.dtype.isnative):
                budget -= array.size * (4 if widen else array.itemsize)
                if budget < 0:
                    raise UserError(f"its tensors, {_short(name)} for one, would take far more memory "
                                    f"than the file; {_RESAVE}")  # fmt: skip
                native = np.uint32 if widen else array.dtype.newbyteorder("=")
                array = array.astype(native, order="C")
                array = np.left_shift(array, 16, out=array).view(np.float32) if widen else array
                array.flags.writeable = False
            arrays[name] = array
    return arrays


def _view(name: str, tensor: _Tensor, raw: bytes, order: str) -> np.ndarray:
    code = "u2" if tensor.storage.dtype == "bf16" else tensor.storage.dtype
    dtype = np.dtype(order + code)
    if 0 in tensor.shape:
        return np.ndarray(tensor.shape, dtype, b"")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides))
    if last >= tensor.storage.numel:
        raise UserError(f"tensor {_short(name)} reaches beyond its storage; download or save it again")
    if math.prod(tensor.shape) >= 1 << 40:
        raise UserError(f"tensor {_short(name)} claims 2**40 elements or more; {_RESAVE}")
    strides = [step * dtype.itemsize for step in tensor.strides]
    # This constructor checks the bounds once more, which as_strided does not.
    return np.ndarray(tensor.shape, dtype, raw, tensor.offset * dtype.itemsize, strides)


def _without_prefix(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """Without what DistributedDataParallel (`module.`) and torch.compile put before all names."""
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in arrays):
            _log.info("%s: cut %r off all names", path, prefix)
            arrays = {name[len(prefix) :]: array for name, array in arrays.items()}
    return arrays


def _short(text: object) -> str:
    """Fit for a message of one line, whatever a stranger's file named it."""
    printable = ascii(text)[1:-1] if isinstance(text, str) else ascii(str(text))[1:-1]
    return printable if len(printable) <= 80 else f"{printable[:77]}..."
