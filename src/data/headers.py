"""What the bytes of an image file promise, looked at before Pillow's plug-ins see them."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from src.errors import UserError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
READ = "JPEG, PNG, BMP, TIFF and WEBP are read"
MAX_PIXELS = 89_478_485  # of Pillow's warning; as many in a row would be resized into more
SERVED_PIXELS = 50_000_000  # of a stranger's image; decoding takes 7 bytes a pixel, 367 MB measured
MAX_ASPECT = 100
# Each scan of a progressive JPEG costs a pass over all pixels, even if its data are a few bytes.
_MAX_SCANNED = 12 * MAX_PIXELS
_USUAL_SCANS = 12
_WEBP_SHARE = 3  # of the pixels: its decoder holds three pictures of 4 bytes a pixel
_MAX_CHUNKS = 100_000  # of a PNG; Pillow takes 5 us for each
_MAX_METADATA = 1 << 20  # bytes in one of a PNG's chunks
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_ORIENTING_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
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
_CUT_OFF = "cut off: the end of the JPEG is missing"


class Header(NamedTuple):
    """What is known of a file before it is opened.

    Args:
        kind: one of `FORMATS`.
        content: the file, of a PNG without the metadata that Pillow refuses beyond a size.
        upright: whether it holds nothing by which it could be turned; False where that is unknown.
    """

    kind: str
    content: bytes
    upright: bool = False


def check_header(content: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Tell the format by the first bytes, and refuse what would cost too much to open.

    Raises:
        UserError: none of the formats, cut off, a PNG's checksum is wrong, a large WEBP, a
            run-length encoded BMP.
    """
    kind = next((name for magic, name in _MAGIC.items() if content.startswith(magic)), None)
    if kind == "JPEG" and is_cut_off(content):
        raise UserError(_CUT_OFF)
    if (
        kind == "BMP"
        and content[14:18] > b"\x0c\0\0\0"
        and content[30:34]
        in (
            b"\1\0\0\0",
            b"\2\0\0\0",
        )
    ):
        # Pillow decodes it in Python: 39 kB of it can take 12 seconds.
        raise UserError("a run-length encoded BMP, which is not read; save it as PNG")
    if kind == "PNG":
        return _look_through_png(content, max_pixels)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        kind = "WEBP"
        size = _webp_size(content)
        if size:
            check_size(*size, max_pixels // _WEBP_SHARE)
    if kind is None:
        raise UserError(strange(content))
    return Header(kind, content)


def check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse an image that is too large or too narrow.

    Raises:
        UserError: says the size and the limits.
    """
    if width * height > max_pixels or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"{width} x {height} pixels; at most {max_pixels} pixels are decoded, and sides of at "
            f"most {MAX_ASPECT} : 1"
        )


def check_scans(content: bytes, width: int, height: int) -> None:
    """Refuse a progressive JPEG with so many passes over so many pixels that it blocks a server.

    Raises:
        UserError: says how many.
    """
    start = _data_start(content)
    end = content.find(b"\xff\xd9", start)
    scans = 1 + content.count(b"\xff\xda", start, end)
    if scans > _USUAL_SCANS and scans * width * height > _MAX_SCANNED:
        raise UserError(f"a JPEG of {width} x {height} pixels in {scans} scans; save it anew")


def is_cut_off(data: bytes) -> bool:
    """Whether a file is a JPEG without its end.

    On a JPEG cut off in its header or between the scans of a progressive one, MindSpore 2.8 hangs
    or ends the process with SIGFPE; cut off elsewhere, the missing part may be grey without a word.
    This check takes 10 us for 50 kB; the other formats fail as they should.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    start = _data_start(data)  # in the compressed data the end marker cannot occur
    return start < 0 or data.rfind(b"\xff\xd9", start) < 0


def _data_start(data: bytes) -> int:
    """Where a JPEG's first compressed data begin; -1 if its header does not end."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:  # stray or fill bytes: libjpeg skips them too
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # without a length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker == 0xDA:
                return position
    return -1


def strange(content: bytes) -> str:
    """Why a file is none of the formats."""
    if not content:
        return "empty, 0 bytes"
    for magic, name in _MAGIC.items():
        if content.startswith(magic):
            return f"damaged at the beginning of its {name}"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "damaged at the beginning of its WEBP"
    if content[:4] == b"RIFF":
        return f"damaged or no image: RIFF {ascii(content[8:12].decode('latin-1'))}"
    found = next((name for magic, name in _OTHERS.items() if content.startswith(magic)), None)
    if content[4:8] == b"ftyp":  # HEIC, AVIF and videos
        found = ascii(content[8:12].decode("latin-1"))[1:-1].upper()
    if found is None:
        return "no image, or damaged at its beginning"
    return f"of the format {found}; {READ}"


def in_short(error: Exception) -> str:
    """An exception's text as part of a line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _look_through_png(content: bytes, max_pixels: int) -> Header:
    """Compare a PNG's checksums, of which Pillow skips those of the pixels, and drop metadata.

    Pillow calls a PNG with much text or a large colour profile damaged. Kept is what makes pixels,
    and what may tell the orientation.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(strange(content))
    if content[12:16] == b"IHDR":
        check_size(*struct.unpack(">II", content[16:24].ljust(8, b"\0")), max_pixels)
    view = memoryview(content)
    kept, upright, at, count = [(0, 8)], True, 8, 0
    kind = b""
    while kind != b"IEND":
        length, kind = int.from_bytes(view[at : at + 4], "big"), bytes(view[at + 4 : at + 8])
        end, count = at + 12 + length, count + 1
        if end > len(content) or count > _MAX_CHUNKS:
            what = "its end is missing" if end > len(content) else f"over {_MAX_CHUNKS} chunks"
            raise UserError(f"damaged or cut off: {what}")
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise UserError(f"damaged or cut off: a wrong checksum in its part {ascii(kind)[1:]}")
        orienting = kind == b"eXIf" or bytes(view[at + 8 : at + 30]).startswith(_ORIENTING_TEXTS)
        if kind in _PIXEL_CHUNKS or (orienting and upright and length <= _MAX_METADATA):
            if kept[-1][1] == at:
                kept[-1] = kept[-1][0], end
            else:
                kept.append((at, end))
            upright &= kind in _PIXEL_CHUNKS
        at = end
    if kept != [(0, len(content))]:
        content = b"".join(view[start:end] for start, end in kept)
    return Header("PNG", content, upright)


def _webp_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a WEBP by its header; None if that is damaged."""
    kind, data = content[12:16], content[20:30]
    if len(data) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[4:7], "little"), 1 + int.from_bytes(data[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return (
            int.from_bytes(data[6:8], "little") & 0x3FFF,
            int.from_bytes(data[8:10], "little") & 0x3FFF,
        )
    return None
