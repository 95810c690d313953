"""PyTorch's files put together opcode by opcode, as an attacker would, and how they are refused."""

from __future__ import annotations

import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from src.errors import UserError
from src.weights.torch_file import read_torch_file

DATA = Path(__file__).parent / "data"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def num(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def nums(*values: int) -> bytes:
    return tup(*map(num, values))


def glob(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def mapping(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def storage(kind: str = "Float", key: str = "0", numel: int = 6) -> bytes:
    parts = text("storage"), glob("torch", f"{kind}Storage"), text(key), text("cpu"), num(numel)
    return tup(*parts) + b"Q"


def tensor(
    shape: tuple = (2, 3), strides: tuple = (3, 1), offset: int = 0, stored: bytes | None = None
) -> bytes:
    hooks = glob("collections", "OrderedDict") + b")R"
    parts = stored or storage(), num(offset), nums(*shape), nums(*strides), b"\x89", hooks
    return glob("torch._utils", "_rebuild_tensor_v2") + tup(*parts) + b"R"


SIX = np.arange(6, dtype="<f4").tobytes()
SOUND = mapping(w=tensor())


def write_zip(
    path: Path, body: bytes, compress: int = zipfile.ZIP_STORED, **records: bytes
) -> Path:
    """A file as torch.save writes it; `records` replace or add to a storage "0" of six floats."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + body + b".")
        for key, raw in {"data/0": SIX, **records}.items():
            archive.writestr(f"x/{key}", raw)
    return path


def write_legacy(path: Path, body: bytes, keys: tuple = ("0",), raw: bytes | None = None) -> Path:
    listed = b"](" + b"".join(map(text, keys)) + b"e"
    pickles = (num(0x1950A86A20F9469CFC6C), num(1001), mapping(little_endian=b"\x88"), body, listed)
    raw = struct.pack("<q", 6) + SIX if raw is None else raw
    path.write_bytes(b"".join(b"\x80\x02" + part + b"." for part in pickles) + raw)
    return path


def refuse(path: Path, pattern: str = "", seconds: float = 4.0) -> str:
    """The one line with which the file is refused; it must come soon and name the file."""
    start = time.process_time()
    with pytest.raises(UserError, match=pattern or None) as caught:
        read_torch_file(path)
    assert time.process_time() - start < seconds
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 700
    return message


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file."""
    return read_torch_file(path).tensors
