"""Write and check one MindRecord shard: a data file and MindSpore's index beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore.dataset as ds
from mindspore.mindrecord import FileWriter

from src.errors import UserError, shorten
from src.files import is_utf8, sha256_of

_REMEDY = "convert it again with tools.records, or copy it again"
_SCHEMA = {"image": {"type": "bytes"}, "file": {"type": "string"}, "label": {"type": "int32"}}


def require_utf8(folder: Path) -> None:
    """Check that a folder's name is UTF-8: MindSpore takes no other path.

    Raises:
        UserError: it is not.
    """
    if not is_utf8(folder):
        raise UserError(
            f"{folder}: MindRecord takes only paths in UTF-8; give a folder of another name"
        )


def choose_layout(largest: int, most: int) -> list[int]:
    """Return the bytes of a header and of a page, for all shards of a split.

    MindSpore opens only shards of equal layout together. Its default, 16 MiB for the header and 32
    for a page, would make every shard 48 MiB.

    Args:
        largest: bytes of the largest image of the split; a page must hold it.
        most: bytes of the images of its largest shard.

    Raises:
        UserError: an image is too large.
    """
    page = max(_power_of_two(largest + 4096), min(_power_of_two(most), 1 << 25))
    if page > 1 << 28:
        raise UserError(f"an image of {largest} bytes; MindRecord takes at most 256 MiB - 4 KiB")
    return [1 << 20 if most < 1 << 30 else 1 << 24, page]


def open_writer(path: Path, layout: Sequence[int], description: str) -> FileWriter:
    """Create the writer of one shard."""
    header, page = layout
    writer = FileWriter(str(path), shard_num=1, overwrite=True)
    writer.set_header_size(header)
    writer.set_page_size(page)
    writer.add_schema(_SCHEMA, description)
    writer.add_index(["label"])  # else MindSpore also indexes the names and keeps them in memory
    return writer


def _power_of_two(size: int) -> int:
    """Return the smallest power of two of at least `size` bytes and 64 KiB."""
    return max(1 << 16, 1 << (size - 1).bit_length())


def commit_shard(path: Path, folder: Path) -> dict[str, Any]:
    """Move a written shard into place, flushed to disk; return its sizes and checksums."""
    entry = {"head": header_sha256(path)}
    for file, prefix in ((database(path), "index_"), (path, "")):
        entry[f"{prefix}bytes"] = file.stat().st_size
        entry[f"{prefix}sha256"] = sha256_of(file)
        file.chmod(folder.stat().st_mode & 0o666)  # MindSpore lets only the owner read it
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        os.replace(file, folder / file.name)
    return entry


def check_shard(folder: Path, shard: dict[str, Any]) -> None:
    """Compare a shard's file sizes and header with the index.

    Raises:
        UserError: they differ, or a file is missing.
    """
    path = folder / shard["name"]
    for file, size in ((path, shard["bytes"]), (database(path), shard["index_bytes"])):
        if not file.is_file():
            raise UserError(f"{file}: the shard is missing; {_REMEDY}")
        if file.stat().st_size != size:
            raise UserError(
                f"{file}: {file.stat().st_size} bytes instead of {size}, cut off or from "
                f"another set; {_REMEDY}"
            )
    if header_sha256(path) != shard["head"]:
        raise UserError(f"{path}: from another set than the index beside it; {_REMEDY}")


def verify_shard(folder: Path, shard: dict[str, Any]) -> None:
    """Compare a shard's sizes, header and checksums with the index.

    Raises:
        UserError: they differ, or a file is missing.
    """
    check_shard(folder, shard)
    path = folder / shard["name"]
    for file, digest in ((path, shard["sha256"]), (database(path), shard["index_sha256"])):
        if sha256_of(file) != digest:
            raise UserError(f"{file}: damaged, its SHA-256 is not the index's; {_REMEDY}")


def require_readable(folder: Path, names: Sequence[str]) -> None:
    """Check that MindSpore opens the shards of a split together.

    Raises:
        UserError: it does not, for instance because their pages differ.
    """
    shards = ds.MindDataset([str(folder / name) for name in names], ["label"], shuffle=False)
    try:
        next(shards.create_tuple_iterator(num_epochs=1, output_numpy=True))
    except RuntimeError as error:
        raise UserError(f"{folder}: {why_unreadable(error)}") from error


def why_unreadable(error: RuntimeError) -> str:
    """Return MindSpore's reason for not opening shards, in a line, and what to do."""
    reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return f"MindSpore can't open the shards ({shorten(reason, 200)}); {_REMEDY}, with --force"


def database(path: Path) -> Path:
    """Return the path of MindSpore's index of a shard, a SQLite file."""
    return path.with_name(f"{path.name}.db")


def header_sha256(path: Path) -> str:
    """Return the SHA-256 of the first 64 KiB: MindRecord's header with its description."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(1 << 16)).hexdigest()
