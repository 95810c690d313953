"""Detect the format of a weight file from its content, and name other formats in errors."""

from __future__ import annotations

import struct
from pathlib import Path

from src.errors import UserError
from src.weights.content import AGAIN, RESAVE

# CvT-W24's training state with a moving average takes 4.4 GB.
MAX_BYTES, MAX_TENSORS = 8 << 30, 20_000

TORCH_ZIP, TORCH_LEGACY, SAFETENSORS, CHECKPOINT = "zip", "pickle", "safetensors", "checkpoint"

_ENCRYPTED = tuple(struct.pack("<I", 0x7F3A5ED8 + mode) for mode in range(3))  # GCM, CBC, SM4
_OTHERS = (
    (b"\x89HDF", "an HDF5 file, as Keras writes it"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"BZh", "compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed by xz; unpack it first"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file"),
    (b"\x08", "a graph (ONNX or MINDIR), not weights; give infer.py the graph"),
)


def require_file(path: Path) -> int:
    """Check that a file exists and is no larger than any weight file; return its size in bytes.

    Raises:
        UserError: no such file, or too large.
    """
    if not path.is_file():
        raise UserError("there is no such file; check the path")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(
            f"has {size / 1e9:.0f} GB, but weight files of these networks have at most "
            f"{MAX_BYTES / 1e9:.0f}; {AGAIN}"
        )
    return size


def kind_of(path: Path) -> str:
    """Return TORCH_ZIP, TORCH_LEGACY, SAFETENSORS or CHECKPOINT.

    Raises:
        UserError: no such file, or another format; the message names it if it is known.
    """
    size = require_file(path)
    with path.open("rb") as file:
        head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    # First, because the length's bytes may equal the first bytes of any other format.
    if head[8:9] == b"{" and length <= size - 8:
        return SAFETENSORS
    if head.startswith(b"PK\x03\x04"):
        return TORCH_ZIP
    if head.startswith(b"\x80"):
        return TORCH_LEGACY
    if _starts_with_value(head):
        return CHECKPOINT
    raise UserError(_describe_unsupported(head))


def _starts_with_value(head: bytes) -> bool:
    """Return whether the first field is a Value (checkpoint.py): key 1, a length, key 1 again."""
    if head[:1] != b"\x0a":
        return False
    end = next((at for at in range(1, 11) if head[at : at + 1] < b"\x80"), 11)
    return head[end + 1 : end + 2] == b"\x0a"


def _describe_unsupported(head: bytes) -> str:
    """Return an error message for a file of another format."""
    if not head:
        return f"the file is empty; {AGAIN}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "this is an HTML or XML page, not a checkpoint; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the checkpoint; run: git lfs pull"
    if head.startswith(_ENCRYPTED):
        return (
            "an encrypted MindSpore checkpoint; decrypt it with its key: ms.save_checkpoint("
            "ms.load_checkpoint(FILE, dec_key=KEY, dec_mode=MODE), NEW_FILE)"
        )
    if head[257:262] == b"ustar":
        return f"PyTorch's tar format from before 0.2; save it again {RESAVE}"
    for start, what in _OTHERS:
        if head.startswith(start):
            return f"this is {what}" if "compressed" not in what else what
    return f"not a MindSpore, PyTorch or safetensors file, or damaged at the start; {AGAIN}"
