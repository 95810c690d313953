"""Check the header of an image file before Pillow opens it."""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from src.errors import UserError

READ = "JPEG, PNG, BMP, TIFF and WEBP are read"
MAX_PIXELS = 89_478_485  # beyond it Pillow warns
SERVED_PIXELS = 50_000_000  # for untrusted images: decoding one takes at most 350 MB
MAX_ASPECT = 100  # a narrower image would be resized to more pixels than MAX_PIXELS
# Each scan of a progressive JPEG is a pass over all pixels, even if its data are a few bytes.
_MAX_SCANNED = 12 * MAX_PIXELS
_USUAL_SCANS = 12
_SEGMENT = re.compile(rb"\xff[^\0\1\xd0-\xd8\xff]")  # a marker of a JPEG with a length, or its end
_SCAN, _END = 0xDA, 0xD9
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_WEBP_COPIES = 3  # pictures of 4 bytes per pixel that its decoder holds
_MAX_CHUNKS = 100_000  # of a PNG, or segments of a JPEG; Pillow needs 5 us for each
_MAX_METADATA = 1 << 20  # bytes in one of a PNG's chunks
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_ORIENTING = re.compile(rb"eXIf|[tzi][TE]Xt(Raw profile type exif|XML:com\.adobe\.xmp)\0")
_MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_OTHERS = {
    b"GIF8": "GIF",
    b"8BPS": "PSD",
    b"%PDF": "PDF",
    b"%!PS": "EPS",
    b"<svg": "SVG",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"v/1\1": "OPENEXR",
    b"DDS ": "DDS",
}


class Header(NamedTuple):
    """The result of `check_header`.

    Args:
        kind: one of JPEG, PNG, BMP, TIFF and WEBP.
        content: the file; a PNG without the metadata that Pillow refuses beyond a size.
        upright: True if the file is known to have no orientation.
    """

    kind: str
    content: bytes
    upright: bool = False


def check_header(content: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Recognise the format by the first bytes, and refuse files that would be costly to open.

    Raises:
        UserError: the file is of another format, truncated, a PNG with a wrong checksum, a large
            WEBP or a run-length encoded BMP.
    """
    kind = _find_format(content)
    if kind is None:
        raise UserError(describe_unreadable(content))
    if kind == "JPEG" and is_truncated_jpeg(content):
        raise UserError("cut off: the end of the JPEG is missing")
    run_length = (b"\1\0\0\0", b"\2\0\0\0")
    if kind == "BMP" and content[14:18] > b"\x0c\0\0\0" and content[30:34] in run_length:
        # Pillow decodes these in Python: 39 kB can take 12 seconds.
        raise UserError("a run-length encoded BMP, which is not read; save it as PNG")
    if kind == "PNG":
        return _check_png(content, max_pixels)
    size = _webp_size(content) if kind == "WEBP" else None
    if size:
        check_size(*size, min(max_pixels, MAX_PIXELS // _WEBP_COPIES))
    return Header(kind, content)


def _find_format(content: bytes) -> str | None:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC.items() if content.startswith(magic)), None)


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image that is empty, too large or too narrow.

    Raises:
        UserError: names the size and the limits.
    """
    narrow = max(width, height) > MAX_ASPECT * min(width, height)
    if not 1 <= width * height <= max_pixels or narrow:
        raise UserError(
            f"{width} x {height} pixels; at most {max_pixels} pixels are decoded, and sides of at "
            f"most {MAX_ASPECT} : 1"
        )


def max_decoded_bytes(max_pixels: int) -> int:
    """Return how much memory decoding an image may take under a limit of pixels.

    Pillow's four bytes and the result's three for each; below `SERVED_PIXELS` up to ten, so that a
    progressive JPEG, whose coefficients take six, may have nearly as many pixels as others.
    """
    return min(10 * max_pixels, 7 * max(max_pixels, SERVED_PIXELS))


def check_scans(content: bytes, width: int, height: int) -> None:
    """Refuse a progressive JPEG whose many scans of many pixels would block a server.

    Raises:
        UserError: names the number of scans.
    """
    parts = itertools.islice(_segments(content, _find_scan(content)[2]), _MAX_CHUNKS)
    markers = [marker for _, marker, _ in parts]
    scans = 1 + markers.count(_SCAN)
    many = scans > _USUAL_SCANS and scans * width * height > _MAX_SCANNED
    if many or len(markers) == _MAX_CHUNKS:
        raise UserError(
            f"a JPEG of {width} x {height} pixels in {scans} scans or too many parts; re-save it "
            "as a baseline JPEG"
        )


def count_kept_bytes(content: bytes, width: int, height: int) -> int:
    """Return the bytes of a JPEG's coefficients, which libjpeg keeps if there are several scans."""
    frame, scan, _ = _find_scan(content)
    colours = content[frame + 9 : frame + 10]
    if content[frame + 1] in _SEQUENTIAL and content[scan + 4 : scan + 5] >= colours:
        return 0
    factors = [
        (each >> 4, each & 15) for each in content[frame + 11 : frame + 11 + 3 * colours[0] : 3]
    ]
    most = max(x for x, _ in factors) * max(y for _, y in factors)
    return 2 * width * height * sum(x * y for x, y in factors) // max(most, 1)


def is_truncated_jpeg(data: bytes) -> bool:
    """Return whether a file is a JPEG without its end.

    MindSpore 2.8 hangs or dies of SIGFPE on a JPEG that is truncated in its header or between the
    scans of a progressive one; elsewhere it may decode the missing part as grey without an error.
    The check takes 10 us for 50 kB. Other formats need none.

    Raises:
        UserError: its header has too many parts.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    start = _find_scan(data)[2]  # in the compressed data the end marker cannot occur
    return start < 0 or data.rfind(b"\xff\xd9", start) < 0


def _find_scan(data: bytes) -> tuple[int, int, int]:
    """Return the offsets of a JPEG's frame, first scan and compressed data; -1 if missing.

    Raises:
        UserError: Pillow, whose Python takes a turn for each segment and stray byte, would be slow.
    """
    frame, position, turns = -1, 2, 0
    for start, marker, end in _segments(data, position):
        turns += 1 + start - position
        if turns > _MAX_CHUNKS:
            raise UserError(f"damaged: over {_MAX_CHUNKS} segments or stray bytes before its data")
        if marker in _FRAMES:
            frame = start
        elif marker == _SCAN:
            return frame, start, end
        position = end
    return -1, -1, -1


def _segments(data: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """Yield the start, marker and end of a JPEG's segments up to the end of the image.

    Compressed data, stray bytes and markers without a length are skipped, as by libjpeg.
    """
    while (found := _SEGMENT.search(data, position)) and found.end() + 2 <= len(data):
        start, marker = found.start(), data[found.end() - 1]
        if marker == _END:
            return
        position = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        yield start, marker, position


def describe_unreadable(content: bytes) -> str:
    """Return why a file is not an image of a known format."""
    if not content:
        return "empty, 0 bytes"
    kind = _find_format(content)
    if kind is not None:
        return f"a {kind} that is damaged at the start"
    if content[:4] == b"RIFF":
        return f"damaged or no image: RIFF {ascii(content[8:12].decode('latin-1'))}"
    found = next((name for magic, name in _OTHERS.items() if content.startswith(magic)), None)
    if content[4:8] == b"ftyp":  # HEIC, AVIF and videos
        found = ascii(content[8:12].decode("latin-1"))[1:-1].upper()
    if found is None:
        return "not an image, or damaged at the start"
    return f"its format is {found}; {READ}"


def one_line(error: Exception) -> str:
    """Return an exception's text as part of one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _check_png(content: bytes, max_pixels: int) -> Header:
    """Verify a PNG's checksums, as Pillow skips those of the pixels, and drop its metadata.

    Pillow refuses a PNG with much text or a large colour profile as damaged. The chunks of the
    pixels and of the orientation are kept.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(describe_unreadable(content))
    if content[12:16] == b"IHDR":
        check_size(*struct.unpack(">II", content[16:24].ljust(8, b"\0")), max_pixels)
    view = memoryview(content)
    kept, orienting, at, count = [(0, 8)], {}, 8, 0
    kind = b""
    while kind != b"IEND":
        length, kind = int.from_bytes(view[at : at + 4], "big"), bytes(view[at + 4 : at + 8])
        end, count = at + 12 + length, count + 1
        if end > len(content) or count > _MAX_CHUNKS:
            what = "its end is missing" if end > len(content) else f"over {_MAX_CHUNKS} chunks"
            raise UserError(f"damaged or cut off: {what}")
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise UserError(f"damaged or cut off: wrong checksum in chunk {ascii(kind)[1:]}")
        if kind in _PIXEL_CHUNKS:
            kept.append((at, end))
        elif length <= _MAX_METADATA and (found := _ORIENTING.match(content, at + 4)):
            orienting[found[1]] = at, end  # like Pillow, use the last one of each kind
        at = end
    # In front of the pixels, because Pillow may look for EXIF without reading on behind them.
    kept[2:2] = orienting.values()
    if orienting or sum(end - start for start, end in kept) < len(content):
        content = b"".join(view[start:end] for start, end in kept)
    return Header("PNG", content, not orienting)


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Return a WEBP's (width, height) from its header; None if that is damaged."""
    kind, data = content[12:16], content[20:30]
    if len(data) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return None
