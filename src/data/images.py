"""What is in the bytes of an image file: looked at, refused in words, turned into RGB pixels.

Pillow is the judge: on damaged JPEG headers `vision.Decode` can end the process or hang, and of
what Pillow decodes nothing did (docs/reliability.md has the figures).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from src.errors import UserError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
# Of Pillow's warning; decoding takes 360 MB there. As many in a row would be resized into more.
MAX_PIXELS = 89_478_485
MAX_ASPECT = 100
# vision.Decode gives Pillow's pixels of these; of CMYK only nearly, of some TIFFs other ones.
_STRAIGHT = {"JPEG": ("L", "RGB"), "MPO": ("L", "RGB"), "PNG": None}
_MAGIC = {"JPEG": b"\xff\xd8", "PNG": b"\x89PNG", "BMP": b"BM", "TIFF": (b"II*\0", b"MM\0*")}
_CUT_OFF = "cut off: the end of the JPEG is missing"
_ORIENTATION = 0x0112  # EXIF's tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(content: np.ndarray) -> np.ndarray:
    """The bytes of an image file, uint8 [bytes], to RGB pixels, uint8 [H, W, 3].

    Upright by the EXIF orientation; alpha is dropped, as torchvision does; of 16 bits the upper 8.

    Raises:
        UserError: it can't be read; says why.
    """
    try:
        return np.array(to_rgb(_open(content.tobytes())))
    except UserError as error:
        raise UserError(f"not a readable image ({error})") from error


def prepare(content: np.ndarray) -> np.ndarray:
    """The bytes of an image file as `vision.Decode` reads them right, uint8 [bytes].

    Only the header is looked at (0.1 ms), of a PNG also the checksums, and most files pass as they
    are. The others are decoded and become a BMP: CMYK, BMP and TIFF files, and those that EXIF
    turns.

    Raises:
        UserError: the header shows that it can't be read, or the end of a JPEG is missing.
    """
    image = _open(content.tobytes())
    modes = _STRAIGHT.get(image.format, ())
    if (modes is None or image.mode in modes) and _orientation(image) not in _UPRIGHT:
        return content
    bmp = io.BytesIO()
    to_rgb(image).save(bmp, "BMP")
    return np.frombuffer(bmp.getvalue(), np.uint8)


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


def is_cut_off(data: bytes) -> bool:
    """Whether a file is a JPEG without its end.

    On a JPEG cut off in its header or between the scans of a progressive one, MindSpore 2.8 hangs
    or ends the process with SIGFPE; cut off elsewhere, the missing part may be grey without a word.
    This check takes 10 us for 50 kB; the other formats fail as they should.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF:  # stray or fill bytes: libjpeg skips them too
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # without a length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker == 0xDA:  # compressed data follow, in which the end marker cannot occur
                return data.rfind(b"\xff\xd9", position) < 0
    return True


def _open(content: bytes) -> Image.Image:
    """The image behind a header that promises a reasonable one; its pixels are not read yet."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(f"too large to decode: {_in_short(error)}") from None
    except Exception as error:  # any of OSError, SyntaxError, ValueError, struct.error ...
        raise UserError(_strange(content)) from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"{width} x {height} pixels; at most {MAX_PIXELS} pixels are decoded, and sides of at "
            f"most {MAX_ASPECT} : 1"
        )
    if is_cut_off(content):
        raise UserError(_CUT_OFF)
    if image.format == "PNG":
        _verify(Image.open(io.BytesIO(content), formats=("PNG",)))
    return image


def _verify(image: Image.Image) -> None:
    """Compare a PNG's checksums, of which Pillow's decoder skips those of the pixels."""
    try:
        image.verify()
    except Exception as error:  # as in opening
        raise UserError(f"damaged or cut off: {_in_short(error)}") from error


def _strange(content: bytes) -> str:
    """Why a file is none of the formats."""
    if not content:
        return "empty, 0 bytes"
    if is_cut_off(content):
        return _CUT_OFF
    for name, magic in _MAGIC.items():
        if content.startswith(magic):
            return f"damaged at the beginning of its {name}"
    if content[4:8] == b"ftyp":  # HEIC, AVIF and videos, which Pillow may not know
        found = ascii(content[8:12].decode("latin-1"))[1:-1].upper()
    else:
        try:
            found = Image.open(io.BytesIO(content)).format
        except Exception:
            return "no image, or damaged at its beginning"
    return f"of the format {found}; JPEG, PNG, BMP and TIFF are read"


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as in opening
        raise UserError(f"damaged or cut off: {_in_short(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Decoded, upright, RGB."""
    _load(image)
    orientation = _orientation(image)  # after loading, by which Pillow turns TIFFs itself
    _refuse_unknown_range(image)
    if image.mode.startswith("I"):  # convert() would cut 16 bits off at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    image = image.convert("RGB")
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


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


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
