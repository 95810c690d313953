"""EXIF and XMP turn images as in Pillow, wherever a file has them."""

import io
import warnings

import numpy as np
import pytest
from mindspore.dataset import vision
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from src.data.images import decode, find_fault, make_decodable
from tests.data.images import JPEG, PIXELS, RGB, chunk, saved, tilted


def test_examine_tells_which_ones_exif_turns():
    assert find_fault(tilted("JPEG", 6)) == ("", True)
    assert find_fault(tilted("JPEG", 1)) == find_fault(JPEG) == ("", False)


def xmp(orientation=None):
    tag = f' tiff:Orientation="{orientation}"' if orientation else ""
    return f"<x:xmpmeta><rdf:Description{tag}/></x:xmpmeta>"


def png_chunks():
    """Return metadata chunks of a PNG by name; TURNED are those that turn the image."""
    upright, turned = tilted("PNG", 1), tilted("PNG", 6)
    exif = turned[turned.index(b"eXIf") + 4 :][: int.from_bytes(turned[33:37], "big")]
    no_exif = Image.Exif()
    no_exif[0x010E] = "title"
    profile = b"Raw profile type exif\0\nexif\n%8d\n%s\n"
    head = b"XML:com.adobe.xmp" + bytes(5)
    return {
        "eXIf": chunk(b"eXIf", no_exif.tobytes()[6:]),
        "eXIf TURNED": chunk(b"eXIf", exif),
        "eXIf upright": upright[33 : upright.index(b"IDAT") - 4],
        "XMP": chunk(b"iTXt", head + xmp().encode()),
        "XMP TURNED": chunk(b"iTXt", head + xmp(6).encode()),
        "profile TURNED": chunk(
            b"tEXt", profile % (len(exif) + 6, (b"Exif\0\0" + exif).hex().encode())
        ),
        "long XMP": chunk(b"iTXt", head + bytes(2_000_000)),
    }


@pytest.mark.parametrize(
    "front, behind",
    [
        (["XMP", "eXIf TURNED"], []),
        (["XMP"], ["eXIf TURNED"]),
        ([], ["XMP", "eXIf TURNED"]),
        (["eXIf", "XMP TURNED"], []),
        (["eXIf"], ["XMP TURNED"]),
        (["XMP", "profile TURNED"], []),
        (["long XMP", "eXIf TURNED", "XMP"], []),
        (["eXIf upright", "XMP TURNED"], []),
        (["XMP TURNED", "eXIf upright"], []),
    ],
)
def test_exif_and_xmp_turn_a_png_in_any_order(front, behind):
    """EXIF takes precedence over XMP, as in Pillow."""
    chunks, plain = png_chunks(), saved(RGB, "PNG")
    before, after = (b"".join(chunks[name] for name in names) for names in (front, behind))
    content = plain[:33] + before + plain[33:-12] + after + plain[-12:]
    turned = "eXIf upright" not in front
    upright = PIXELS[::-1].swapaxes(0, 1) if turned else PIXELS
    encoded = np.frombuffer(content, np.uint8)
    assert find_fault(content) == ("", turned)
    np.testing.assert_array_equal(decode(content), upright)
    np.testing.assert_array_equal(vision.Decode()(make_decodable(encoded)), upright)


def test_exif_beside_xmp_as_pillow_writes_them():
    exif = Image.Exif()
    exif[0x0112] = 6
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp())
    lossless = {"PNG": {"pnginfo": text}, "WEBP": {"lossless": True, "xmp": xmp().encode()}}
    for kind, options in lossless.items():
        content = saved(RGB, kind, exif=exif, **options)
        assert find_fault(content) == ("", True), kind
        np.testing.assert_array_equal(decode(content), PIXELS[::-1].swapaxes(0, 1))


def test_damaged_exif_does_not_make_an_image_broken():
    content = tilted("JPEG", 6)
    place = content.index(b"Exif\0\0") + 6
    content = content[:place] + b"\xff" * 8 + content[place + 8 :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert find_fault(content) == ("", False)
        upright = np.asarray(Image.open(io.BytesIO(JPEG)).convert("RGB"))
        np.testing.assert_array_equal(decode(np.frombuffer(content, np.uint8)), upright)
