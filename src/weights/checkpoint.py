"""Write MindSpore checkpoints and safetensors atomically, and check them when reading.

A `.ckpt` is a protobuf message (mindspore/ccsrc/utils/checkpoint.proto), optionally followed by
`crc_num` and a CRC-32 in ten bytes:

    Checkpoint { repeated Value value = 1 }    Value { string tag = 1; TensorProto tensor = 2 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

This module does not use `mindspore.load_checkpoint`, which trusts the file's dims (it fills missing
bytes with zeros, and 24 bytes can claim 4 GB), takes 30 s for 5 MB of tiny tensors, and needs twice
the file's size in memory. Tensors above 512 MB are stored as several values with the same tag.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
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
# Limits on the work that a malicious file can cause.
_MAX_FIELDS, _MAX_HEADER = 64, 4 << 20


def save_checkpoint(
    parameters: Mapping[str, Tensor], path: str | Path, **extra: int | float | str
) -> None:
    """Write a MindSpore file with a checksum, atomically.

    Args:
        parameters: by name.
        path: must end in .ckpt or .safetensors.
        extra: numbers or strings to save with them (.ckpt only).

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix[1:]
    if kind not in ("ckpt", "safetensors"):
        raise UserError(f"{path}: the name must end in .ckpt or .safetensors")
    entries = [{"name": name, "data": tensor} for name, tensor in parameters.items()]
    disabled = logging.root.manager.disable  # by the caller
    try:
        logging.disable(logging.CRITICAL)  # MindSpore prints a long log for each failure
        with replacing(path) as unfinished:
            ms.save_checkpoint(
                entries, str(unfinished), append_dict=extra or None, crc_check=True, format=kind
            )
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written: {reason}; give another path") from error
    finally:
        logging.disable(disabled)


def own_parameters(net: nn.Cell) -> dict[str, Parameter]:
    """Return a network's parameters by their names in it, also if it is a part of another cell.

    A cell prepends the name of the attribute that holds a network to the network's names.
    """
    pairs = [*net.parameters_and_names()]
    prefixes = {p.name.removesuffix(name) for name, p in pairs if p.name.endswith(name)}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return {parameter.name.removeprefix(prefix): parameter for _, parameter in pairs}


def save_weights(weights: nn.Cell | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a network's parameters, or a dict of tensors, to a .ckpt or .safetensors file.

    Raises:
        UserError: another suffix, or the file cannot be written.
    """
    if isinstance(weights, nn.Cell):
        weights = own_parameters(weights)
    save_checkpoint(weights, path)


def read_checkpoint(path: str | Path) -> Content:
    """Read every tensor of a .ckpt; saved numbers and strings become 0-d arrays.

    The arrays are read-only views of one copy of the file, not necessarily aligned.

    Raises:
        UserError: no such file, another format, or damaged.
    """
    return _read(path, _parse_checkpoint, "restore it from a copy or create it again")


def read_safetensors(path: str | Path) -> Content:
    """Read every tensor of a .safetensors file; verify MindSpore's checksum if it has one.

    Raises:
        UserError: no such file, another format, damaged, or an unsupported dtype.
    """
    return _read(path, _parse_safetensors, AGAIN)


def _read(path: str | Path, parse: Callable[[Path], Content], advice: str) -> Content:
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
        raise UserError(f"{path}: damaged, or not a {kind} file ({reason}); {advice}") from error
    if not content.tensors:
        raise UserError(f"{path}: contains no tensors; {advice}")
    return content


def _parse_checkpoint(path: Path) -> Content:
    data = memoryview(path.read_bytes())
    if bytes(data[-_CRC_BYTES:][: len(_CRC_MARK)]) == _CRC_MARK:
        checksum = int.from_bytes(data[len(_CRC_MARK) - _CRC_BYTES :], "big")
        data = data[:-_CRC_BYTES]
        if zlib.crc32(data) != checksum:
            raise ValueError("its checksum differs")
    slices: dict[str, tuple[str, list[int], list[memoryview]]] = {}
    for number, value in _fields(data, MAX_TENSORS):
        if number != 1 or isinstance(value, int):
            raise ValueError("not a list of tensors")
        tag, kind, dims, content = _parse_value(value)
        first_kind, first_dims, contents = slices.setdefault(tag, (kind, dims, []))
        if (first_kind, first_dims) != (kind, dims):
            raise ValueError(f"{short(tag)} occurs twice")
        contents.append(content)
    tensors = {
        tag: _array(tag, kind, dims, b"".join(contents) if len(contents) > 1 else contents[0])
        for tag, (kind, dims, contents) in slices.items()
    }
    widened = any(kind == "BFloat16" for kind, _, _ in slices.values())
    return Content(tensors, [WIDENED] if widened else [])


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Decode a protobuf integer; return it and the offset of its end."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("an integer of more than 64 bits")


def _fields(data: memoryview, limit: int) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of a protobuf message: number and value, an integer or bytes."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > limit:
            raise ValueError(f"more than {limit} fields")
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2:  # bytes; 0 is an integer; checkpoints contain no other wire types
            start, at = at, at + value
            if at > len(data):
                raise ValueError("cut short")
            value = data[start:at]
        elif key & 7:
            raise ValueError("an unknown wire type")
        yield key >> 3, value


def _parse_value(message: memoryview) -> tuple[str, str, list[int], memoryview]:
    """Return tag, type, dims and content of a Value message."""
    value = dict(_fields(message, _MAX_FIELDS))
    if not (isinstance(value.get(1), memoryview) and isinstance(value.get(2), memoryview)):
        raise ValueError("a value is not a tensor")
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
        raise UserError(f"{short(tag)} has unsupported type {short(kind)}; save float32")
    dtype = np.dtype(_CKPT_TYPES[kind])
    shape = () if dims == [0] and len(content) else tuple(dims)  # older files: [0] for a number
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{short(tag)} of shape {shape} has {len(content)} bytes")
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
    # MindSpore's checksum is wrong for scalars: it covers as many zero bytes as the scalar's value.
    verifiable = checksum is not None and all(entry["shape"] for _, entry in entries)
    if verifiable and _checksum(entries) != int(checksum):
        raise ValueError("its checksum differs")
    tensors, widened = {}, False
    while entries:  # pop, so that the bytes of each tensor are freed once it is widened
        name, entry = entries.pop()
        kind = entry["dtype"]
        if kind not in _SAFETENSORS_TYPES:
            raise UserError(f"{short(name)} has unsupported type {kind}; save float32")
        array = np.frombuffer(entry["data"], _SAFETENSORS_TYPES[kind]).reshape(entry["shape"])
        widened |= kind == "BF16"
        tensors[name] = widen(array) if kind == "BF16" else array
    return Content(dict(reversed(list(tensors.items()))), [WIDENED] if widened else [])


def _checksum(entries: list[tuple[str, dict]]) -> int:
    """Compute the CRC-32 of mindspore.save_checkpoint(format="safetensors", crc_check=True)."""
    crc = 0
    for name, entry in sorted(entries, key=lambda item: item[0]):
        crc = zlib.crc32(entry["data"], zlib.crc32(name.encode(), crc))
    return crc
