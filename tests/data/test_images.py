"""Images of every kind, through the loader's pipelines, against Pillow's pixels or a formula."""

import functools
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from mindspore.dataset import vision
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from src.data import (
    FileSource,
    Preprocessing,
    create_eval_loader,
    create_train_loader,
    create_train_operations,
)
from src.data.headers import is_truncated_jpeg
from src.data.images import decode, find_fault, make_decodable
from src.errors import UserError
from tests.conftest import ROOT
from tests.data.images import (
    ALPHA,
    CMYK,
    JPEG,
    MEAN,
    PIXELS,
    RGB,
    STD,
    assert_matches,
    behind_pixels,
    chunk,
    file_of,
    photo,
    png,
    rle_bmp,
    saved,
    tilted,
)

DEEP = np.random.default_rng(1).integers(0, 65536, (60, 80, 4), np.uint16)


def png16(colour, channels):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP[..., :channels])
    return png(80, 60, colour, rows)


def webp(width, height):
    """A WEBP whose header promises a size."""
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    whole = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sizes + saved(RGB, "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(whole) + 4) + b"WEBP" + whole


def ycck():
    """A CMYK JPEG declared to be YCCK, as Photoshop writes them; other colours, equally valid."""
    content = bytearray(saved(CMYK, "JPEG"))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


@functools.cache
def much_text():
    """More text than Pillow takes: one of 2 MB compressed, and 70 MB in all."""
    text = PngInfo()
    text.add_text("Comment", "a" * 2_000_000, zip=True)
    text.add_itxt("XML:com.adobe.xmp", "b" * 2_000_000)
    text.add_itxt("History", "c" * 70_000_000)
    return saved(RGB, "PNG", pnginfo=text)


LONG_TEXT = b"Comment\0\0" + zlib.compress(bytes(2_000_000))
RGBA = Image.fromarray(np.dstack([PIXELS, ALPHA]))
PALETTE = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
GREY16 = Image.fromarray(DEEP[..., 0])
AS_PILLOW = {
    **{f"{kind} {mode}": saved(RGB.convert(mode), kind)
       for kind in ("JPEG", "PNG", "BMP", "TIFF") for mode in ("RGB", "L")},
    **{f"{kind} {mode}": saved(RGB.convert(mode), kind)
       for kind in ("PNG", "BMP", "TIFF") for mode in ("1", "P")},
    "progressive JPEG": saved(RGB, "JPEG", progressive=True),
    "JPEG CMYK": saved(CMYK, "JPEG"),
    "JPEG YCCK": ycck(),
    "TIFF CMYK": saved(CMYK, "TIFF"),
    "PNG palette, transparent": saved(PALETTE, "PNG", transparency=3),
    "PNG RGB, transparent": saved(RGB, "PNG", transparency=(0, 0, 0)),
    "PNG RGBA": saved(RGBA, "PNG"),
    "PNG LA": saved(RGBA.convert("LA"), "PNG"),
    "TIFF RGBA": saved(RGBA, "TIFF"),
    "BMP RGBA": saved(RGBA, "BMP"),
    "TIFF LAB": saved(RGB.convert("LAB"), "TIFF"),
    "TIFF LZW": saved(RGB, "TIFF", compression="tiff_lzw"),
    "WEBP RGB": saved(RGB, "WEBP"),
    "WEBP RGBA, lossless": saved(RGBA, "WEBP", lossless=True),
    "WEBP, animated": saved(RGB, "WEBP", save_all=True, append_images=[CMYK.convert("RGB")]),
    "PNG with much text behind its pixels": behind_pixels(chunk(b"zTXt", LONG_TEXT)),
    "PNG with a large colour profile": saved(RGB, "PNG", icc_profile=bytes(3_000_000)),
    "JPEG 1x1": saved(Image.new("RGB", (1, 1), (9, 100, 7)), "JPEG"),
    "PNG 1x1": saved(Image.new("L", (1, 1), 7), "PNG"),
    "JPEG 20000 wide": saved(RGB.resize((20000, 200)), "JPEG"),
    "PNG 20000 wide": saved(RGB.resize((20000, 200)), "PNG"),
}  # fmt: skip
KNOWN_PIXELS = {  # where Pillow's convert() is not the truth
    "PNG 16-bit grey": (png16(0, 1), DEEP[..., [0, 0, 0]] >> 8),
    "PNG 16-bit grey and alpha": (png16(4, 2), DEEP[..., [0, 0, 0]] >> 8),
    "PNG 16-bit RGB": (png16(2, 3), DEEP[..., :3] >> 8),
    "PNG 16-bit RGBA": (png16(6, 4), DEEP[..., :3] >> 8),
    "TIFF 16-bit grey": (saved(GREY16, "TIFF"), DEEP[..., [0, 0, 0]] >> 8),
    **{
        f"{kind} turned {orientation}": (tilted(kind, orientation), upright)
        for kind in ("PNG", "TIFF")
        for orientation, upright in {
            1: PIXELS,
            2: PIXELS[:, ::-1],
            3: PIXELS[::-1, ::-1],
            4: PIXELS[::-1],
            5: PIXELS.swapaxes(0, 1),
            6: PIXELS[::-1].swapaxes(0, 1),
            7: PIXELS[::-1, ::-1].swapaxes(0, 1),
            8: PIXELS[:, ::-1].swapaxes(0, 1),
        }.items()
    },
}


def pillow(content):
    if b"zTXt" in content or b"iCCP" in content:  # which Pillow refuses
        return PIXELS
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


READABLE = {name: (content, pillow(content)) for name, content in AS_PILLOW.items()}
READABLE.update(KNOWN_PIXELS)
READABLE["JPEG turned 6"] = (
    tilted("JPEG", 6),
    pillow(saved(RGB, "JPEG"))[::-1].swapaxes(0, 1),
)
READABLE["PNG with much text"] = (much_text, PIXELS)  # made at its first use: 72 MB for each worker


def readable(name):
    """An image file and its pixels."""
    content, pixels = READABLE[name]
    return content() if callable(content) else content, pixels


@pytest.mark.parametrize("name", READABLE)
def test_every_readable_kind_has_the_right_pixels(name, tmp_path):
    content, pixels = readable(name)
    assert find_fault(content)[0] == ""
    encoded = np.frombuffer(content, np.uint8)
    np.testing.assert_array_equal(decode(encoded), pixels)
    np.testing.assert_array_equal(vision.Decode()(make_decodable(encoded)), pixels)


def test_every_readable_kind_goes_through_both_pipelines(tmp_path):
    source = source_of(tmp_path, {name: readable(name)[0] for name in READABLE})
    preprocessing = Preprocessing((32, 32), 36, MEAN, STD)
    evaluated = create_eval_loader(source, preprocessing.operations(True), 8)
    seen = np.concatenate([images for images, _ in evaluated.iterate(output_numpy=True)])
    for image, (content, pixels) in zip(seen, map(readable, READABLE)):
        np.testing.assert_array_equal(image, preprocessing(np.ascontiguousarray(pixels, np.uint8)))
        np.testing.assert_array_equal(image, preprocessing(content))
    for crop in ("random_resized", "pad"):
        operations = create_train_operations((32, 32), MEAN, encoded=True, crop=crop)
        batches = create_train_loader(source, operations, len(source), seed=1, epoch=0)
        ((images, labels),) = batches.iterate(output_numpy=True)
        assert images.shape == (len(source), 32, 32, 3) and len(set(labels)) == len(READABLE)


def test_training_crops_upright_images(tmp_path):
    """Upright blue is above and red below; as stored, beside each other."""
    halves = np.zeros((40, 40, 3), np.uint8)
    halves[:, :20], halves[:, 20:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 8
    content = saved(Image.fromarray(halves), "PNG", exif=exif)
    source = source_of(tmp_path, {"turned": content})
    whole = create_train_operations(
        (40, 40), (0, 0, 0), encoded=True, scale=(1, 1), ratio=(1, 1), hflip=0
    )
    ((images, _),) = create_train_loader(source, whole, 1, seed=0, epoch=0).iterate(
        output_numpy=True
    )
    assert images[0, :18, :, 2].min() > 230 and images[0, 22:, :, 0].min() > 230


def source_of(folder, contents):
    paths = []
    for number, content in enumerate(contents.values()):
        paths.append(str(folder / f"{number}.jpg"))  # the wrong extension, for most
        Path(paths[-1]).write_bytes(content)
    return FileSource(paths, np.arange(len(paths)), list(contents), "kinds")


BROKEN = {
    "empty": (b"", "empty, 0 bytes"),
    "text": (b"<html>404</html>", "not an image, or damaged at the start"),
    "cut JPEG": (JPEG[:-100], "cut off: the end of the JPEG is missing"),
    "JPEG cut in its header": (JPEG[:90], "cut off: the end"),
    "damaged header": (JPEG[:158] + b"\xff" * 9 + JPEG[167:], "damaged"),
    "PNG header": (b"\x89PNG" + bytes(200), "a PNG that is damaged at the start"),
    "cut PNG": (saved(RGB, "PNG")[:-2000], "damaged or cut off"),
    "cut BMP": (saved(RGB, "BMP")[:-2000], "damaged or cut off"),
    "cut TIFF": (saved(RGB, "TIFF", compression="tiff_lzw")[:-2000], "damaged|cut off"),
    "PNG with a flipped bit": (
        bytes(b ^ (i == 3000) for i, b in enumerate(saved(RGB, "PNG"))),
        "damaged or cut off",
    ),
    "GIF": (saved(RGB, "GIF"), "its format is GIF; JPEG, PNG, BMP, TIFF and WEBP are read"),
    "SVG": (b"<svg></svg>", "its format is SVG;"),
    "cut WEBP": (saved(RGB, "WEBP")[:-200], "damaged"),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(30), "no image: RIFF 'WAVE'"),
    "WEBP of 8000 x 8000": (webp(8000, 8000), "8000 x 8000 pixels; at most 29826161"),
    "BMP, run-length encoded": (rle_bmp(9400, 9400), "run-length encoded BMP"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(100), "its format is HEIC;"),
    "float": (saved(Image.new("F", (9, 9)), "TIFF"), "32-bit values"),
    "20000 x 20000": (png(20000, 20000, 2, b"", 8), "20000 x 20000 pixels; at most 89478485"),
    "10000 x 10000": (png(10000, 10000, 2, b"", 8), "10000 x 10000 pixels; at most 89478485"),
    "20000 x 3": (saved(RGB.resize((20000, 3)), "PNG"), "20000 x 3 pixels; .* 100 : 1"),
    "BMP bomb": (
        saved(RGB, "BMP")[:18] + struct.pack("<ii", 99999, 99999) + saved(RGB, "BMP")[26:],
        "too large to decode: .*9999800001 pixels",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_broken_kind_is_refused_in_words_and_with_its_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MindSpore may copy an image that it can't decode to here
    content, words = BROKEN[name]
    assert_matches(find_fault(content)[0], words)
    with pytest.raises(UserError, match=words):
        decode(np.frombuffer(content, np.uint8))
    source = source_of(tmp_path, {"good": JPEG, name: content})
    evaluation = Preprocessing((32, 32), 36, MEAN, STD).operations(True)
    training = create_train_operations((32, 32), MEAN, encoded=True)
    for batches in (
        create_eval_loader(source, evaluation, 1),
        create_train_loader(source, training, 1, seed=0, epoch=0),
    ):
        with pytest.raises(UserError, match=f"1.jpg: .*({words})"):
            list(batches)


def test_only_the_formats_that_are_read_reach_a_plug_in(monkeypatch):
    tried = []
    open_image = Image.open

    def spy(file, formats=None):
        tried.append(formats)
        return open_image(file, formats=formats)

    monkeypatch.setattr(Image, "open", spy)
    for content, _ in (*map(readable, READABLE), *BROKEN.values()):
        find_fault(content)
    assert {len(formats) for formats in tried} == {1}
    assert {name for formats in tried for name in formats} == {"JPEG", "PNG", "BMP", "TIFF", "WEBP"}


def test_a_bitmap_of_any_width_is_read_back():
    for width in range(1, 9):
        pixels = PIXELS[:, :width]
        np.testing.assert_array_equal(vision.Decode()(make_decodable(np.frombuffer(
            saved(Image.fromarray(pixels), "TIFF"), np.uint8))), pixels)  # fmt: skip


FUZZ = """
import io, json, sys
import numpy as np
from mindspore.dataset import vision
from PIL import Image
from src.data.images import decode, find_fault, make_decodable
from src.errors import UserError
from tests.data.test_images import damaged
counts = dict(broken=0, equal=0, near=0, other=0)
for content in damaged():
    fault, _ = find_fault(content)
    encoded = np.frombuffer(content, np.uint8)
    try:
        expected = decode(encoded)
    except UserError:
        assert fault, "decode() refuses what find_fault() takes for whole"
        counts["broken"] += 1
        continue
    assert not fault, fault
    size = expected.shape[:2]
    ready = make_decodable(encoded)
    crop = vision.RandomCropDecodeResize(size, (1, 1), (size[1] / size[0],) * 2)
    assert crop(ready).shape == expected.shape
    seen = vision.Decode()(ready)
    assert seen.shape == expected.shape
    differ = (seen != expected).any(axis=2).mean()
    counts["equal" if differ == 0 else "near" if differ < 0.5 else "other"] += 1
print(json.dumps(counts))
"""


def damaged():
    """200 JPEGs with one to three wrong bytes in the header, 100 cut off anywhere."""
    rng = np.random.default_rng(5)
    whole = [
        saved(RGB.convert(mode), "JPEG", progressive=progressive)
        for mode in ("RGB", "L", "CMYK")
        for progressive in (False, True)
    ]
    for number in range(200):
        content = bytearray(whole[number % len(whole)])
        end = content.index(b"\xff\xda") + 12
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(2, end)] ^= int(rng.integers(1, 256))
        yield bytes(content)
    for number in range(100):
        content = whole[number % len(whole)]
        yield content[: rng.integers(len(content))]


def test_damaged_jpegs_neither_crash_nor_hang(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOG_v": "4"}
    done = subprocess.run(
        [sys.executable, "-c", FUZZ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert sum(counts.values()) == 300 and counts["broken"] >= 150
    # Wrong values in the tables of quantisation and codes are valid JPEG, and MindSpore's and
    # Pillow's copies of libjpeg overflow differently on them.
    assert counts["near"] + counts["other"] <= 0.15 * (300 - counts["broken"]), counts


def test_most_files_pass_as_they_are():
    for content in (JPEG, saved(RGBA, "PNG"), saved(RGB.convert("L"), "JPEG")):
        encoded = np.frombuffer(content, np.uint8)
        assert make_decodable(encoded) is encoded


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"\xff\xda\xff\xd9" * 20}])
def test_a_cut_off_jpeg_is_seen_at_any_length(options):
    buffer = io.BytesIO()
    Image.fromarray(photo(20, 30)).save(buffer, "JPEG", **options)
    content = buffer.getvalue()
    assert all(is_truncated_jpeg(content[:length]) for length in range(2, len(content)))
    assert not is_truncated_jpeg(content)
    assert not is_truncated_jpeg(content + bytes(9))  # padded
    assert not is_truncated_jpeg(content[:2] + b"\xff" * 3 + content[2:])


def test_other_formats_are_left_to_the_decoder():
    for kind in ("PNG", "BMP", "TIFF"):
        assert not is_truncated_jpeg(file_of(photo(20, 30), kind)[:200])


def test_a_colour_space_that_pillow_does_not_convert(monkeypatch):
    """Pillow 9 does not convert CIELAB."""
    content = io.BytesIO()
    Image.new("LAB", (4, 4)).save(content, "TIFF")
    convert = Image.Image.convert

    def old(self, mode=None, *arguments, **options):
        if self.mode == "LAB":
            raise ValueError("conversion from LAB to RGB not supported")
        return convert(self, mode, *arguments, **options)

    monkeypatch.setattr(Image.Image, "convert", old)
    with pytest.raises(UserError, match="colour space LAB; save it as RGB"):
        decode(content.getvalue())
    assert "colour space LAB" in find_fault(content.getvalue())[0]


def test_pillows_warning_does_not_appear_without_the_files_name(tmp_path):
    image = Image.new("P", (4, 4))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128]))
    script = (
        "import sys; from pathlib import Path; from src.data.images import decode\n"
        "decode(Path(sys.argv[1]).read_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "p.png"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not done.stderr
