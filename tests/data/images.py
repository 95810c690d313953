"""Images for the tests of image operations, and torchvision's normalisation."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from src.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo(height, width, seed=0, grain=20):
    """Smooth colours with grain, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    smooth = np.asarray(colours.resize((width, height), Image.BICUBIC), np.int32)
    return (smooth + rng.integers(-grain, grain + 1, smooth.shape)).clip(0, 255).astype(np.uint8)


def file_of(image, kind="JPEG", mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def normalised(pixels):
    scaled = (np.asarray(pixels, np.float64) / 255 - MEAN) / STD
    return scaled.transpose(2, 0, 1)


PIXELS = photo(60, 80)
ALPHA = np.tile(np.arange(80, dtype=np.uint8) * 3, (60, 1))


def saved(image, kind, **keywords):
    buffer = io.BytesIO()
    image.save(buffer, kind, **keywords)
    return buffer.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, colour, rows, depth=16):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def rle_bmp(width, height):
    """A black BMP in as few bytes as its encoding allows."""
    rows = bytes(b for _ in range(height) for b in (0, 0)) + b"\0\1"
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    head = struct.pack("<2sIII", b"BM", 54 + 1024 + len(rows), 0, 54 + 1024)
    return head + info + bytes(1024) + rows


def behind_pixels(part):
    content = saved(RGB, "PNG")
    return content[:-12] + part + content[-12:]


TURNED = Image.Exif()
TURNED[0x0112] = 6
RGB = Image.fromarray(PIXELS)
CMYK = Image.fromarray(np.dstack([PIXELS, ALPHA]), "CMYK")
JPEG = saved(RGB, "JPEG")


def assert_matches(text, words):
    with pytest.raises(UserError, match=words):
        raise UserError(text)


def tilted(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(RGB, kind, exif=exif)
