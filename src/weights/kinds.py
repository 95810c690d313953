"""What kind of weight file a file is, by its content; what else it may be, in one line."""

from __future__ import annotations

import struct
from pathlib import Path

from src.errors import UserError
from src.weights.content import AGAIN

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
_RESAVE = "in PyTorch 1.6 or later: torch.save(torch.load(FILE, map_location='cpu'), FILE)"


def require_file(path: Path) -> int:
    """The size of a file that can hold the weights of a network.

    Raises:
        UserError: no file, or too large to be one.
    """
    if not path.is_file():
        raise UserError("there is no such file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(
            f"it has {size / 1e9:.0f} GB, and no weight file of these networks more than "
            f"{MAX_BYTES / 1e9:.0f}; {AGAIN}"
        )
    return size


def kind_of(path: Path) -> str:
    """One of the four kinds.

    Raises:
        UserError: no such file, or of another kind; the message names it where it is known.
    """
    size = require_file(path)
    with path.open("rb") as file:
        head = file.read(512)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= size - 8:  # first: the length may begin like any other kind
        return SAFETENSORS
    if head.startswith(b"PK\x03\x04"):
        return TORCH_ZIP
    if head.startswith(b"\x80"):
        return TORCH_LEGACY
    if _starts_with_value(head):
        return CHECKPOINT
    raise UserError(_other(head))


def _starts_with_value(head: bytes) -> bool:
    """Whether the first field is a Value (see checkpoint.py): key 1, its length, key 1 again."""
    if head[:1] != b"\x0a":
        return False
    end = next((at for at in range(1, 11) if head[at : at + 1] < b"\x80"), 11)
    return head[end + 1 : end + 2] == b"\x0a"


def _other(head: bytes) -> str:
    """What a file is that isn't read."""
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
        return f"PyTorch's tar format from before 0.2; save it again {_RESAVE}"
    for start, what in _OTHERS:
        if head.startswith(start):
            return f"this is {what}" if "compressed" not in what else what
    return (
        f"no weight file of MindSpore, PyTorch or safetensors, or its beginning is damaged; {AGAIN}"
    )
