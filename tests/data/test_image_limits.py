"""What hostile images may cost, and the limits of size."""

import inspect
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from src.data import Preprocessing
from src.data.headers import MAX_PIXELS, SERVED_PIXELS, check_header
from src.data.images import decode
from src.deploy import Predictor
from src.errors import UserError
from tests.conftest import ROOT
from tests.data.images import (
    CMYK,
    JPEG,
    MEAN,
    STD,
    TURNED,
    assert_matches,
    behind_pixels,
    chunk,
    png,
    rle_bmp,
    saved,
)


def bomb():
    """100 MB of zeros in 100 kB: 33 million pixels that are there, and 10 GB that are not."""
    rows = zlib.compress(bytes(100_000_000), 9)
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)


HOSTILE = {
    "bomb": (bomb, "60000 x 60000 pixels", 50_000),
    "1-bit PNG": (
        lambda: png(9400, 9400, 0, bytes(1176 * 9400), 1), r"\(9400, 9400, 3\)", 420_000,
    ),
    "JPEG in 200 scans": (lambda: scans(8000, 200), "8000 x 8000 pixels in 2.. scans", 420_000),
    "JPEG in 200 scans behind an end in a comment": (
        lambda: scans(8000, 200, b"\xff\xfe\0\4\xff\xd9"), "in 2.. scans", 420_000,
    ),
    "JPEG of stray bytes": (lambda: b"\xff\xd8" + bytes(10_000_000), "the end of", 50_000),
    "JPEG of stray bytes before its data": (
        lambda: JPEG[:2] + bytes(10_000_000) + JPEG[2:], "over 100000 segments", 50_000,
    ),
    "JPEG of comments": (
        lambda: JPEG[:2] + b"\xff\xfe\0\2" * 2_000_000 + JPEG[2:], "over 100000", 50_000,
    ),
    "progressive JPEG, CMYK": (
        lambda: enlarged(saved(CMYK, "JPEG", progressive=True), 7500),
        "7500 x 7500 pixels that take 643 MiB to decode, more than 597", 50_000,
    ),
    "JPEG, one colour a scan": (
        lambda: enlarged(one_colour_a_scan(saved(CMYK, "JPEG")), 8000), "732 MiB", 50_000,
    ),
    "TIFF, 16-bit RGBA in one strip": (lambda: tiff16(8000), "732 MiB", 50_000),
    "TIFF, a small image in a large tile": (lambda: tiff16(9000, 64), "617 MiB", 50_000),
    "JPEG that EXIF turns": (
        lambda: saved(Image.new("RGB", (7000, 7000)), "JPEG", exif=TURNED), "7000, 3", 430_000,
    ),
    "run-length encoded BMP": (lambda: rle_bmp(9400, 9400), "run-length encoded", 420_000),
    "PNG of 200000 parts": (
        lambda: behind_pixels(chunk(b"tIME", b"") * 200_000), "over 100000", 420_000,
    ),
}  # fmt: skip


def scans(side, count, comment=b""):
    """A progressive JPEG whose last scan comes so often again."""
    content = saved(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    scan = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + comment + scan * count + b"\xff\xd9"


def enlarged(content, side):
    """A JPEG that promises to be a square of this side."""
    place = re.search(rb"\xff[\xc0-\xc2]\0", content).start() + 5
    return content[:place] + struct.pack(">HH", side, side) + content[place + 4 :]


def one_colour_a_scan(content):
    """A JPEG that is not progressive, but has to be kept until the last of its scans."""
    scan = content.index(b"\xff\xda")
    return content[:scan] + b"\xff\xda\0\x08\1C\0\0\x3f\0" + content[scan + 16 :]


def tiff16(side, shown=None):
    """A 16-bit RGBA TIFF of one compressed strip, or of one tile of which a part is shown."""
    data = zlib.compress(bytes(8 * 64 * 64))
    part = {273: 8, 278: side, 279: len(data)}
    if shown:
        part = {322: side, 323: side, 324: 8, 325: len(data)}
    tags = {256: shown or side, 257: shown or side, 258: 8 + len(data), 259: 8, 262: 2, 277: 4}
    tags = sorted({**tags, 338: 2, **part}.items())
    entries = [struct.pack("<HHII", tag, 3 if tag == 258 else 4, 4 if tag == 258 else 1, value)
               for tag, value in tags]  # fmt: skip
    table = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    start = struct.pack("<I", 16 + len(data))
    return b"II*\0" + start + data + struct.pack("<4H", *[16] * 4) + table


COST = """
import os, resource, sys, time
from src.data.images import decode, find_fault
for path in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    content, start = open(path, "rb").read(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = find_fault(content)[0] if path.endswith("bomb") else decode(content).shape
    except ValueError as error:
        result = error
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(result, time.process_time() - start, grown, sep="|", flush=True)
    os._exit(0)
"""


def test_a_small_file_costs_neither_much_time_nor_memory(tmp_path):
    """Each in a fork of one process, for its own peak of memory.

    Pillow's 1-bit image is a byte a pixel, the result three: 353 MB.
    """
    for name, (make, *_) in HOSTILE.items():
        (tmp_path / name).write_bytes(make())
    command = [sys.executable, "-c", COST, *(str(tmp_path / name) for name in HOSTILE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(HOSTILE)
    for (_, words, limit), line in zip(HOSTILE.values(), lines):
        text, seconds, kilobytes = line.split("|")
        assert_matches(text, words)
        # 1 s on an idle machine; processor time doubles while the other core is busy.
        assert float(seconds) < 4 and int(kilobytes) < limit, words


def test_a_predictor_takes_fewer_pixels_than_a_data_set():
    """An image of a stranger's must not take 500 MB."""
    default = inspect.signature(Predictor).parameters["max_pixels"].default
    assert 7 * default < 400e6 and default < MAX_PIXELS


def test_a_progressive_photograph_fits_a_servers_limit():
    """24 million pixels at 25 allowed; its coefficients take six bytes for each."""
    image = Image.new("RGB", (6000, 4000))
    content = saved(image, "JPEG", progressive=True, subsampling=0)
    assert decode(content, 25_000_000).shape == (4000, 6000, 3)


def test_a_lower_limit_of_pixels():
    content = np.frombuffer(JPEG, np.uint8)
    assert decode(content, 4800).shape == (60, 80, 3)
    with pytest.raises(UserError, match="80 x 60 pixels; at most 4799 pixels"):
        decode(content, 4799)
    with pytest.raises(UserError, match="at most 4799 pixels"):
        Preprocessing((32, 32), 36, MEAN, STD)(JPEG, 4799)


def test_webp_has_the_limit_of_the_others_up_to_its_own():
    """Its decoder holds three copies, so that 29.8 million pixels are its most."""

    def header(width, height):
        size = struct.pack("<I", 10) + b"\0\0\0\0" + bytes(
            (edge - 1) >> shift & 255 for edge in (width, height) for shift in (0, 8, 16)
        )  # fmt: skip
        return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + size

    for limit in (MAX_PIXELS, SERVED_PIXELS, 25_000_000):
        check_header(header(5000, 5000), limit)
    with pytest.raises(UserError, match="5001 x 5000 pixels; at most 25000000"):
        check_header(header(5001, 5000), 25_000_000)
    with pytest.raises(UserError, match="6000 x 5000 pixels; at most 29826161"):
        check_header(header(6000, 5000), SERVED_PIXELS)
