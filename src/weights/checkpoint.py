"""MindSpore's checkpoints and safetensors: written whole or not at all, checked when read.

A `.ckpt` is a protobuf message (mindspore/ccsrc/utils/checkpoint.proto), at its end perhaps
`crc_num` and ten bytes of a CRC-32:

    Checkpoint { repeated Value value = 1 }    Value { string tag = 1; TensorProto tensor = 2 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

It is read here and not by `mindspore.load_checkpoint`, which believes a file's dims (what the file
lacks becomes zeros, and 24 bytes can claim 4 GB), takes half a minute for 5 MB of tiny tensors, and
holds twice the file in memory. Values of one tag are the slices of a tensor of more than 512 MB.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from safetensors import SafetensorError, deserialize

from src.errors import UserError
from src.files import replacing
from src.weights.content import AGAIN, WIDENED, Content, short, widen
from src.weights.kinds import MAX_TENSORS, require_file

_CRC_MARK, _CRC_BYTES = b"crc_num", 17
_CKPT_TYPES = {"Bool": "?", "Int8": "i1", "UInt8": "u1", "BFloat16": "<u2"}
_CKPT_TYPES |= {f"Float{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)}
_CKPT_TYPES |= {f"Int{bits}": f"<i{bits // 8}" for bits in (16, 32, 64)}
_CKPT_TYPES |= {f"UInt{bits}": f"<u{bits // 8}" for bits in (16, 32, 64)}
_SAFETENSORS_TYPES = {"BOOL": "?", "I8": "i1", "U8": "u1", "BF16": "<u2"}
_SAFETENSORS_TYPES |= {f"{k.upper()}{n}": f"<{k}{n // 8}" for k in "fiu" for n in (16, 32, 64)}
# Bounds on the work that a hostile file can ask for.
_MAX_FIELDS, _MAX_HEADER = 64, 4 << 20


def save_checkpoint(
    parameters: Mapping[str, Tensor], path: str | Path, **extra: int | float | str
) -> None:
    """Write an ordinary MindSpore file with a checksum, aside first, then in one move.

    A reader sees the old file or the new one, whole, whatever interrupts the writing.

    Args:
        parameters: by name.
        path: ends in .ckpt or .safetensors.
        extra: numbers or strings to save beside them (.ckpt only).

    Raises:
        UserError: the file can't be written.
    """
    path = Path(path)
    kind = path.suffix[1:]
    if kind not in ("ckpt", "safetensors"):
        raise UserError(f"{path}: the name must end in .ckpt or .safetensors")
    entries = [{"name": name, "data": tensor} for name, tensor in parameters.items()]
    try:
        logging.disable(logging.CRITICAL)  # MindSpore tells of a failure on the console, at length
        with replacing(path) as unfinished:
            ms.save_checkpoint(
                entries, str(unfinished), append_dict=extra or None, crc_check=True, format=kind
            )
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: can't be written: {' '.join(str(error).split())}") from error
    finally:
        logging.disable(logging.NOTSET)


def save_weights(weights: nn.Cell | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a network's parameters, or a dict of them, to a .ckpt or .safetensors file.

    Raises:
        UserError: another suffix, or the file can't be written.
    """
    if isinstance(weights, nn.Cell):
        weights = {parameter.name: parameter for parameter in weights.get_parameters()}
    save_checkpoint(weights, path)


def read_checkpoint(path: str | Path) -> Content:
    """Every tensor of a .ckpt; numbers and strings saved beside them come as 0-d arrays.

    The arrays are read-only windows on one copy of the file, not necessarily aligned.

    Raises:
        UserError: no such file, no checkpoint, or a damaged one.
    """
    return _read(path, _parse_checkpoint, "restore or remake it")


def read_safetensors(path: str | Path) -> Content:
    """Every tensor of a .safetensors file; a checksum by MindSpore is compared.

    Raises:
        UserError: no such file, another format, damaged, or of types that aren't read.
    """
    return _read(path, _parse_safetensors, AGAIN)


def _read(path: str | Path, parse, advice: str) -> Content:
    path = Path(path)
    try:
        require_file(path)
        content = parse(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that can be read") from None
    except (ValueError, IndexError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = short(error) or type(error).__name__
        kind = path.suffix[1:]
        raise UserError(f"{path}: damaged, or no {kind} file ({reason}); {advice}") from error
    if not content.tensors:
        raise UserError(f"{path}: no tensors in it; {advice}")
    return content


def _parse_checkpoint(path: Path) -> Content:
    data = memoryview(path.read_bytes())
    if bytes(data[-_CRC_BYTES:][: len(_CRC_MARK)]) == _CRC_MARK:
        checksum = int.from_bytes(data[len(_CRC_MARK) - _CRC_BYTES :], "big")
        data = data[:-_CRC_BYTES]
        if zlib.crc32(data) != checksum:
            raise ValueError("its checksum differs")
    pieces: dict[str, tuple[str, list[int], list[memoryview]]] = {}
    for number, value in _fields(data, MAX_TENSORS):
        if number != 1 or isinstance(value, int):
            raise ValueError("no list of tensors")
        tag, kind, dims, content = _value(value)
        known, shape, contents = pieces.setdefault(tag, (kind, dims, []))
        if (known, shape) != (kind, dims):
            raise ValueError(f"{short(tag)} comes twice")
        contents.append(content)
    tensors = {
        tag: _array(tag, kind, dims, b"".join(contents) if len(contents) > 1 else contents[0])
        for tag, (kind, dims, contents) in pieces.items()
    }
    widened = any(kind == "BFloat16" for kind, _, _ in pieces.values())
    return Content(tensors, [WIDENED] if widened else [])


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A protobuf integer, and where it ends."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("an integer without end")


def _fields(data: memoryview, limit: int) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: number and value, an integer or bytes."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > limit:
            raise ValueError(f"more than {limit} fields")
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2:  # bytes; 0 is an integer, and a checkpoint has no other types
            start, at = at, at + value
            if at > len(data):
                raise ValueError("cut short")
            value = data[start:at]
        elif key & 7:
            raise ValueError("no checkpoint's fields")
        yield key >> 3, value


def _value(message: memoryview) -> tuple[str, str, list[int], memoryview]:
    """Tag, type, dims and content of a Value."""
    value = dict(_fields(message, _MAX_FIELDS))
    if not (isinstance(value.get(1), memoryview) and isinstance(value.get(2), memoryview)):
        raise ValueError("a value that is no tensor")
    dims: list[int] = []
    rest: dict[int, int | memoryview] = {}
    for number, field in _fields(value[2], _MAX_FIELDS):
        if number == 1:
            dims.append(field)
        else:
            rest[number] = field
    return str(value[1], "utf-8"), str(rest[2], "utf-8"), dims, rest[3]


def _array(tag: str, kind: str, dims: list[int], content: bytes | memoryview) -> np.ndarray:
    if kind == "str":
        return np.asarray(str(content, "utf-32-le"))
    if kind not in _CKPT_TYPES:
        raise UserError(f"{short(tag)} is of type {short(kind)}, which is not read; save float32")
    dtype = np.dtype(_CKPT_TYPES[kind])
    shape = () if dims == [0] and len(content) else tuple(dims)  # [0]: a number's, in older files
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{short(tag)} of {shape} has {len(content)} bytes")
    array = np.frombuffer(content, dtype).reshape(shape)
    return widen(array) if kind == "BFloat16" else array


def _parse_safetensors(path: Path) -> Content:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if length > _MAX_HEADER:
        raise ValueError("its header is too large")
    header = json.loads(raw[8 : 8 + length])
    if len(header) > MAX_TENSORS:
        raise ValueError(f"more than {MAX_TENSORS} tensors")
    entries = deserialize(raw)  # checks that the header and the bytes agree
    metadata = header.get("__metadata__") or {}
    checksum = metadata.get("crc_num")
    del raw
    # Of a scalar, MindSpore sums up as many zeros as its value, so such a sum proves nothing.
    provable = checksum is not None and all(entry["shape"] for _, entry in entries)
    if provable and _checksum(entries) != int(checksum):
        raise ValueError("its checksum differs")
    tensors, widened = {}, False
    while entries:  # from the end, so that no raw bytes lie beside all the widened ones
        name, entry = entries.pop()
        kind = entry["dtype"]
        if kind not in _SAFETENSORS_TYPES:
            raise UserError(f"{short(name)} is of type {kind}, which is not read; save float32")
        array = np.frombuffer(entry["data"], _SAFETENSORS_TYPES[kind]).reshape(entry["shape"])
        widened |= kind == "BF16"
        tensors[name] = widen(array) if kind == "BF16" else array
    return Content(dict(reversed(list(tensors.items()))), [WIDENED] if widened else [])


def _checksum(entries: list[tuple[str, dict]]) -> int:
    """As mindspore.save_checkpoint(format="safetensors", crc_check=True) computes it."""
    number = 0
    for name, entry in sorted(entries, key=lambda item: item[0]):
        number = zlib.crc32(entry["data"], zlib.crc32(name.encode(), number))
    return number
