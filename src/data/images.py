"""Check image files and decode them to RGB pixels.

Pillow decides what an image is: on damaged JPEG headers `vision.Decode` can end the process or
hang; this never happened with files that Pillow decodes (docs/reliability.md has the numbers).
Pillow sees only files that pass `src.data.headers`: a known format of a reasonable size, without
metadata that Pillow refuses.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, features

from src.data.headers import (
    MAX_PIXELS,
    check_header,
    check_scans,
    check_size,
    count_kept_bytes,
    describe_unreadable,
    max_decoded_bytes,
    one_line,
)
from src.errors import UserError

# Formats and modes that vision.Decode decodes to Pillow's pixels. It does not for CMYK JPEGs and
# some TIFFs.
_DECODABLE = {"JPEG": ("L", "RGB"), "MPO": ("L", "RGB"), "PNG": None}
_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT = {  # views of [H, W, 3]
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
# TIFF's tags, and a value of one.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 258, 262, 278, 322, 323
_YCBCR = 6
_STRIP = 1 << 22  # pixels converted at a time
# Dropping alpha is what is wanted; the warning would not name the file.
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)


def decode(content: np.ndarray | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to RGB pixels, uint8 [H, W, 3].

    The result is upright according to EXIF. Alpha is dropped, as in torchvision; 16-bit values keep
    their upper 8 bits.

    Args:
        content: the whole file, bytes or uint8 [bytes].
        max_pixels: larger images are refused. Decoding may take `max_decoded_bytes` of memory,
            626 MB at the default; images that need more for theirs are refused, too.

    Raises:
        UserError: the file can't be read; the message says why.
    """
    try:
        return to_rgb(_open(bytes(content), max_pixels))
    except UserError as error:
        raise UserError(f"not a readable image ({error})") from error


def make_decodable(content: np.ndarray) -> np.ndarray:
    """Return an image file, uint8 [bytes], in a form that `vision.Decode` decodes correctly.

    Most files are returned unchanged. CMYK, BMP, TIFF and WEBP files, and those that EXIF turns,
    are decoded and become a BMP. Only the header is read (0.1 ms), and a PNG's checksums.

    Raises:
        UserError: the header shows that the file can't be read, or a JPEG's end is missing.
    """
    image = _open(content.tobytes())
    return content if _is_decodable(image) else _to_bmp(to_rgb(image))


def is_decodable(content: bytes) -> bool:
    """Return whether `make_decodable` leaves a file unchanged; raises UserError as it does."""
    return _is_decodable(_open(content))


def _is_decodable(image: Image.Image) -> bool:
    modes = _DECODABLE.get(image.format, ())
    return (modes is None or image.mode in modes) and _orientation(image) not in _UPRIGHT


def find_fault(content: bytes) -> tuple[str, bool]:
    """Read an image file to its end.

    A JPEG is decoded at an eighth of its size, which saves a third of the time.

    Returns:
        What is wrong with it ("" if nothing), and whether EXIF turns it.
    """
    try:
        image = _open(content)
        turned = _orientation(image) in _UPRIGHT
        if image.format in ("JPEG", "MPO"):
            image.draft("L", (1, 1))
        _load(image)
        _check_range(image)
    except UserError as error:
        return str(error), False
    return "", turned


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to upright RGB pixels without alpha, uint8 [H, W, 3].

    Raises:
        UserError: the image can't be decoded.
    """
    _load(image)
    orientation = _orientation(image)  # after loading, by which Pillow turns TIFFs itself
    _check_range(image)
    width, height = image.size
    upright = np.empty(
        (width, height, 3) if orientation in (5, 6, 7, 8) else (height, width, 3), np.uint8
    )
    # As stored: a view, to avoid a copy. Each orientation is its own inverse, except 6 and 8.
    pixels = _UPRIGHT.get({6: 8, 8: 6}.get(orientation, orientation), np.asarray)(upright)
    rows = max(_STRIP // width, 1)
    for top in range(0, height, rows):  # in strips, to avoid a second copy of the whole image
        bottom = min(top + rows, height)
        strip = image if rows >= height else image.crop((0, top, width, bottom))
        if strip.mode.startswith("I"):  # convert() would clip 16 bits at 255
            pixels[top:bottom] = (np.asarray(strip).astype(np.uint16) >> 8)[..., None]
        else:
            pixels[top:bottom] = np.asarray(strip.convert("RGB"))
    return upright


def load_thumbnail(content: bytes, edge: int) -> Image.Image:
    """Decode an image file as `decode` does, and shrink its longer side to `edge`.

    A large JPEG is decoded at a fraction of its size.

    Raises:
        UserError: the file can't be read.
    """
    image = _open(content)
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (2 * edge, 2 * edge))
    return ImageOps.contain(Image.fromarray(to_rgb(image)), (edge, edge))


def _to_bmp(pixels: np.ndarray) -> np.ndarray:
    """Write RGB pixels, uint8 [H, W, 3], as a BMP file, uint8 [bytes]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "BMP")
    return np.frombuffer(buffer.getbuffer(), np.uint8)


def _open(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Check an image file's header and open it without decoding its pixels."""
    header = check_header(content, max_pixels)
    try:
        image = Image.open(io.BytesIO(header.content), formats=(header.kind,))
    except Image.DecompressionBombError as error:
        raise UserError(f"too large to decode: {one_line(error)}") from None
    except Exception as error:  # any of OSError, SyntaxError, ValueError, struct.error ...
        if header.kind == "WEBP" and not features.check("webp"):
            raise UserError("a WEBP, which this build of Pillow lacks; save it as PNG") from None
        raise UserError(describe_unreadable(content)) from error
    check_size(*image.size, max_pixels)
    if header.kind == "JPEG":
        check_scans(content, *image.size)
    _check_memory(image, content, max_decoded_bytes(max_pixels))
    if header.upright:  # else Pillow would decode a PNG to look for EXIF behind its pixels
        image.info.setdefault("exif", b"")
    return image


def _check_memory(image: Image.Image, content: bytes, limit: int) -> None:
    """Refuse an image that takes more than `limit` bytes to decode.

    Raises:
        UserError: names the size and the limit.
    """
    pixels = image.width * image.height
    picture = pixels * {"1": 1, "L": 1, "P": 1}.get(image.mode, 4)
    working = 0
    if image.format in ("JPEG", "MPO"):
        working = count_kept_bytes(content, *image.size)
    elif image.format == "TIFF":
        try:
            working = _tiff_bytes(image)
        except (TypeError, ValueError, IndexError) as error:  # a tag of another type, or no data
            raise UserError(f"damaged: {one_line(error)}") from None
    needed = picture + max(working, 3 * pixels)
    if needed > limit:
        raise UserError(
            f"{image.width} x {image.height} pixels that take {needed >> 20} MiB to decode, more "
            f"than {limit >> 20} MiB; save it smaller, or as PNG"
        )


def _tiff_bytes(image: Image.Image) -> int:
    """Return the bytes of the strip or tile that libtiff holds, or of Pillow's turned copy."""
    tags = image.tag_v2
    turned = 4 * image.width * image.height if tags.get(_ORIENTATION, 1) != 1 else 0
    if image.tile[0][0] != "libtiff":
        return turned
    rows = min(tags.get(_ROWS_PER_STRIP, image.height), image.height)
    width, height = tags.get(_TILE_WIDTH, image.width), tags.get(_TILE_LENGTH, rows)
    bits = sum(tags.get(_BITS_PER_SAMPLE, (8,)))
    if tags.get(_PHOTOMETRIC) == _YCBCR:  # libtiff converts it to 32 bits
        bits += 32
    return max(turned, width * height * bits // 8)


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # any, as in _open
        raise UserError(f"damaged or cut off: {one_line(error)}") from error


def _check_range(image: Image.Image) -> None:
    """Refuse 32-bit values, whose range is unknown. Pillow < 10.3 opens 16-bit PNGs as mode I.

    Older Pillows do not convert every colour space either.
    """
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise UserError("has 32-bit values of unknown range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        try:
            Image.new(image.mode, (1, 1)).convert("RGB")
        except ValueError:
            raise UserError(f"has the colour space {image.mode}; save it as RGB") from None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 is upright, and so is an image with damaged EXIF."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
