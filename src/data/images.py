"""What is in the bytes of an image file: looked at, refused in words, turned into RGB pixels.

Pillow is the judge: on damaged JPEG headers `vision.Decode` can end the process or hang, and of
what Pillow decodes nothing did (docs/reliability.md has the figures). Pillow sees only what
`src.data.headers` let through: one format, a reasonable size, no metadata that it refuses.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageOps, features

from src.data.headers import (
    MAX_PIXELS,
    check_header,
    check_scans,
    check_size,
    in_short,
    strange,
)
from src.errors import UserError

# vision.Decode gives Pillow's pixels of these; of CMYK only nearly, of some TIFFs other ones.
_STRAIGHT = {"JPEG": ("L", "RGB"), "MPO": ("L", "RGB"), "PNG": None}
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
_STRIP = 1 << 22  # pixels that are converted at once


def decode(content: np.ndarray | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The bytes of an image file, uint8 [bytes], to RGB pixels, uint8 [H, W, 3].

    Upright by the EXIF orientation; alpha is dropped, as torchvision does; of 16 bits the upper 8.

    Args:
        content: the whole file.
        max_pixels: refuse larger images by their header. Decoding takes 7 bytes a pixel at most,
            626 MB at the default.

    Raises:
        UserError: it can't be read; says why.
    """
    try:
        return to_pixels(_open(bytes(content), max_pixels))
    except UserError as error:
        raise UserError(f"not a readable image ({error})") from error


def prepare(content: np.ndarray) -> np.ndarray:
    """The bytes of an image file as `vision.Decode` reads them right, uint8 [bytes].

    Only the header is looked at (0.1 ms), of a PNG also the checksums, and most files pass as they
    are. The others are decoded and become a BMP: CMYK, BMP, TIFF and WEBP files, and those that
    EXIF turns.

    Raises:
        UserError: the header shows that it can't be read, or the end of a JPEG is missing.
    """
    image = _open(content.tobytes())
    return content if _is_straight(image) else _to_bmp(to_pixels(image))


def is_ready(content: bytes) -> bool:
    """Whether `prepare` leaves a file as it is. Raises UserError as `prepare` does."""
    return _is_straight(_open(content))


def _is_straight(image: Image.Image) -> bool:
    modes = _STRAIGHT.get(image.format, ())
    return (modes is None or image.mode in modes) and _orientation(image) not in _UPRIGHT


def examine(content: bytes) -> tuple[str, bool]:
    """What is wrong with an image file ("" if it is whole), and whether EXIF turns it.

    Reads all of it, a JPEG's frequencies at an eighth of its size, which saves a third of the time.
    """
    try:
        image = _open(content)
        turned = _orientation(image) in _UPRIGHT
        if image.format in ("JPEG", "MPO"):
            image.draft("L", (1, 1))
        _load(image)
        _refuse_unknown_range(image)
    except UserError as error:
        return str(error), False
    return "", turned


def to_pixels(image: Image.Image) -> np.ndarray:
    """An image of Pillow's to RGB pixels, uint8 [H, W, 3]: decoded, upright, without alpha.

    Raises:
        UserError: it can't be decoded.
    """
    _load(image)
    orientation = _orientation(image)  # after loading, by which Pillow turns TIFFs itself
    _refuse_unknown_range(image)
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(_STRIP // width, 1)
    for top in range(0, height, rows):  # so that no second whole image is needed in between
        bottom = min(top + rows, height)
        strip = image if rows >= height else image.crop((0, top, width, bottom))
        if strip.mode.startswith("I"):  # convert() would cut 16 bits off at 255
            pixels[top:bottom] = (np.asarray(strip).astype(np.uint16) >> 8)[..., None]
        else:
            pixels[top:bottom] = np.asarray(strip.convert("RGB"))
    if orientation in _UPRIGHT:
        return np.ascontiguousarray(_UPRIGHT[orientation](pixels))
    return pixels


def thumbnail(content: bytes, edge: int) -> Image.Image:
    """An upright RGB picture whose longer side is `edge`, decoded as in `decode`.

    A large JPEG is decoded at a fraction of its size.

    Raises:
        UserError: it can't be read.
    """
    image = _open(content)
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (2 * edge, 2 * edge))
    return ImageOps.contain(Image.fromarray(to_pixels(image)), (edge, edge))


def _to_bmp(pixels: np.ndarray) -> np.ndarray:
    """RGB pixels, uint8 [H, W, 3], as a BMP file, uint8 [bytes]."""
    height, width = pixels.shape[:2]
    row = -(-3 * width // 4) * 4  # bytes
    file = np.zeros(54 + height * row, np.uint8)
    # Its size, 0, where the pixels begin; of the second header its size, the image's (a negative
    # height means from the top), planes, bits a pixel.
    header = struct.pack("<2sIIIIiiHH", b"BM", len(file), 0, 54, 40, width, -height, 1, 24)
    file[: len(header)] = np.frombuffer(header, np.uint8)
    file[54:].reshape(height, row)[:, : 3 * width].reshape(height, width, 3)[:] = pixels[..., ::-1]
    return file


def _open(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image behind a header that promises a reasonable one; its pixels are not read yet."""
    header = check_header(content, max_pixels)
    try:
        image = Image.open(io.BytesIO(header.content), formats=(header.kind,))
    except Image.DecompressionBombError as error:
        raise UserError(f"too large to decode: {in_short(error)}") from None
    except Exception as error:  # any of OSError, SyntaxError, ValueError, struct.error ...
        if header.kind == "WEBP" and not features.check("webp"):
            raise UserError("a WEBP, which this build of Pillow lacks; save it as PNG") from None
        raise UserError(strange(content)) from error
    check_size(*image.size, max_pixels)
    if header.kind == "JPEG":
        check_scans(content, *image.size)
    if header.upright:  # else Pillow would decode a PNG to look for EXIF behind its pixels
        image.info.setdefault("exif", b"")
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as in opening
        raise UserError(f"damaged or cut off: {in_short(error)}") from error


def _refuse_unknown_range(image: Image.Image) -> None:
    # Pillow before 10.3 has the 16 bits of a PNG in mode I too.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise UserError("has 32-bit values, whose range no one knows; save it with 8 or 16 bits")


def _orientation(image: Image.Image) -> int:
    """1 is upright; so is an image whose EXIF block is damaged."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
