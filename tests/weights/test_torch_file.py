"""`data/kinds*.pth` were saved by PyTorch 2.13, `kinds.npz` holds what its torch.load returns."""

from __future__ import annotations

import io
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from src.errors import UserError
from src.weights.torch_file import read_torch_file
from tests.weights.torch_bytes import (
    DATA,
    SIX,
    SOUND,
    glob,
    mapping,
    num,
    read,
    refuse,
    storage,
    tensor,
    text,
    write_legacy,
    write_zip,
)

HUGE = 1 << 40


@pytest.mark.parametrize("name", ["kinds.pth", "kinds_legacy.pth", "kinds_wrapped_protocol4.pth"])
def test_reads_what_pytorch_wrote(name):
    arrays = {key.replace("module.", ""): array for key, array in read(DATA / name).items()}
    with np.load(DATA / "kinds.npz") as expected:
        assert list(arrays) == list(expected)
        for key, array in arrays.items():
            assert array.dtype == expected[key].dtype, key
            assert array.shape == expected[key].shape, key
            assert array.tobytes() == expected[key].tobytes(), key
            assert array.flags.c_contiguous and not array.flags.writeable, key
    assert arrays["bf16"].dtype == np.float32 and arrays["f16"].dtype == np.float16
    assert np.shares_memory(arrays["base"], arrays["tied"])
    assert "bfloat16 widened to float32" in read_torch_file(DATA / name).notes


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_hand_made_files_read(tmp_path, write):
    arrays = read(write(tmp_path / "x.pth", SOUND))
    np.testing.assert_array_equal(arrays["w"], np.arange(6, dtype=np.float32).reshape(2, 3))


def test_crc_not_written_is_not_compared(tmp_path):
    path = write_zip(tmp_path / "x.pth", SOUND)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            raw = raw.replace(struct.pack("<I", info.CRC), bytes(4))
    path.write_bytes(raw)
    assert read(path)["w"].sum() == 15


def test_only_chosen_tensors_are_read_and_the_rest_is_named(tmp_path):
    body = mapping(
        old=mapping(w=tensor()), net=mapping(w=tensor((3,), (1,)), b=tensor()), epoch=num(3)
    )
    asked = {}

    def choose(stored):
        asked.update({place: each.shape for place, each in stored.items()})
        return {("net", "w"): "weight"}

    tensors, notes = read_torch_file(write_zip(tmp_path / "x.pth", body), choose)
    assert asked == {("old", "w"): (2, 3), ("net", "w"): (3,), ("net", "b"): (2, 3)}
    assert {name: array.tolist() for name, array in tensors.items()} == {"weight": [0, 1, 2]}
    assert notes == ["skipped old, epoch"]


def test_tensors_in_lists_and_one_dict_in_two_places(tmp_path):
    shared = mapping(w=tensor()) + b"q\x01"
    body = b"](" + mapping(model=shared, again=b"h\x01") + num(3) + b"e"
    found = []
    read_torch_file(write_zip(tmp_path / "x.pth", body), lambda s: found.extend(s) or {})
    assert found == [("0", "model", "w")]


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        (tensor(), "contains no dict"),
        (mapping(epoch=num(1), name=text("x")), "no tensors in the top level, only: epoch, name"),
        (mapping(state_dict=mapping(a=mapping())), "no tensors in the top level, only: state_dict"),
        (b"}q\x00" + text("model") + b"h\x00s", "no tensors in the top level, only: model"),
        (
            mapping(model=glob("mymodels", "Net") + b")\x81" + mapping(w=tensor()) + b"b"),
            "only: model .objects of mymodels.Net, which are not run.; save model.state_dict",
        ),
    ],
    ids=["bare tensor", "numbers", "nested too deep", "holds itself", "whole model"],
)
def test_without_tensors(tmp_path, body, pattern):
    refuse(write_zip(tmp_path / "x.pth", body), pattern)


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2, 3), (3, 1), 1),
        ((7,), (1,), 0),
        ((2,), (6,), 0),
        ((1,), (1,), 6),
        ((1,), (1,), HUGE),
        ((1,), (1,), -1),
        ((2, 3), (3, -1), 2),
        ((-2, 3), (3, 1), 0),
        ((2, 3), (1,), 0),
        ((HUGE,), (0,), 0),
        ((HUGE, HUGE, HUGE), (0, 0, 0), 0),
        ((2, 2), (1 << 63, 1 << 63), 0),
        ((1 << 62,), (1,), 0),
        ((0, 1 << 70), (1, 1), 0),
        ((1,) * 70, (1,) * 70, 0),
    ],
)
def test_windows_beyond_the_storage_are_refused(tmp_path, shape, strides, offset):
    refuse(write_zip(tmp_path / "x.pth", mapping(w=tensor(shape, strides, offset))))


def test_windows_within_the_storage(tmp_path):
    body = mapping(
        corner=tensor((2, 2), (3, 2), 0),
        column=tensor((2,), (3,), 2),
        last=tensor((), (), 5),
        none=tensor((0, 3), (3, 1), 6),
        wide=tensor((2, 4), (1, 0), 3),
        no_storage=tensor((0,), (1,), 0, storage(key="1", numel=0)),
    )
    arrays = read(write_zip(tmp_path / "x.pth", body, **{"data/1": b""}))
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "corner": [[0, 2], [3, 5]],
        "column": [2, 5],
        "last": 5,
        "none": [],
        "wide": [[3] * 4, [4] * 4],
        "no_storage": [],
    }
    assert arrays["none"].shape == (0, 3) and arrays["last"].shape == ()


def test_many_copies_of_one_storage_are_refused(tmp_path):
    stored = storage("BFloat16", numel=1 << 18)
    body = mapping(**{f"w{i}": tensor((1 << 18,), (1,), 0, stored) for i in range(400)})
    path = write_zip(tmp_path / "x.pth", body, **{"data/0": bytes(2 << 18)})
    refuse(path, "far more memory")


ODD_RECORDS = {
    "storage too short": ({"data/0": SIX[:-1]}, "of 24 bytes has 23 bytes"),
    "storage too long": ({"data/0": SIX + SIX}, "of 24 bytes has 48 bytes"),
    "big-endian": ({"byteorder": b"big"}, "big-endian"),
    "TorchScript": ({"constants.pkl": b""}, "TorchScript"),
    "two pickles": ({"y/data.pkl": b""}, "not one that torch.save wrote"),
}


@pytest.mark.parametrize(("records", "pattern"), ODD_RECORDS.values(), ids=ODD_RECORDS.keys())
def test_odd_archives_are_refused(tmp_path, records, pattern):
    refuse(write_zip(tmp_path / "x.pth", SOUND, **records), pattern)


def test_missing_storages_are_refused(tmp_path):
    body = mapping(w=tensor(stored=storage(key="../../etc/passwd\n")))
    refuse(write_zip(tmp_path / "x.pth", body), r"../../etc/passwd\\n of 24 bytes is missing")
    refuse(write_legacy(tmp_path / "y.pth", SOUND, keys=()), "cannot be read")


def test_flipped_bit_in_a_storage_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.pth", SOUND)
    raw = bytearray(path.read_bytes())
    raw[raw.index(SIX) + 7] ^= 1
    path.write_bytes(raw)
    refuse(path, "CRC")


def test_zip_bombs_are_refused(tmp_path):
    deflated = write_zip(tmp_path / "x.pth", SOUND, zipfile.ZIP_DEFLATED, big=bytes(32 << 20))
    assert deflated.stat().st_size < 1 << 20
    refuse(deflated, "compressed records")

    forged = write_zip(tmp_path / "y.pth", SOUND)
    raw = bytearray(forged.read_bytes())
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 20 : entry + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    forged.write_bytes(raw)
    refuse(forged, "claim more bytes than the file has")

    refuse(write_zip(tmp_path / "z.pth", b"N0" * (3 << 20)), "data.pkl is larger than 4 MB")


def test_an_archive_of_a_million_records_is_refused_before_their_list_is_read(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(write_zip(path, SOUND).read_bytes())
    raw = bytearray(path.read_bytes())
    end = raw.rindex(b"PK\x05\x06")
    raw[end + 12 : end + 16] = struct.pack("<I", 5 << 20)
    path.write_bytes(bytes(5 << 20).join((raw[:end], raw[end:])))
    refuse(path, "its directory claims 5242880 bytes")


@pytest.mark.parametrize(
    ("keys", "raw"),
    [
        (("0",), b""),
        (("0",), struct.pack("<q", 6) + SIX[:-1]),
        (("0",), struct.pack("<q", 7) + SIX),
        (("0",), struct.pack("<q", -1) + SIX),
        (("1",), struct.pack("<q", 6) + SIX),
        (("0", "0"), struct.pack("<q", 6) + SIX),
    ],
)
def test_odd_legacy_storages_are_refused(tmp_path, keys, raw):
    refuse(write_legacy(tmp_path / "x.pth", SOUND, keys, raw))


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    return stream.getvalue()


OTHER_FILES = {
    "empty": (b"", "the file is empty; download"),
    "page": (b"\r\n <!DOCTYPE html><html>404</html>", "this is an HTML or XML page"),
    "xml": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "HTML or XML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run: git lfs pull"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "this is a safetensors file, not one"),
    "tar": (tar_bytes(), "tar format .* torch.save\\(torch.load"),
    "zip of something": (b"PK\x05\x06" + bytes(18), "not a MindSpore, PyTorch or"),
    "pickle of something": (b"\x80\x02K\x01.", "not one that torch.save wrote"),
    "pickle without end": (b"\x80\x02", "exhausted"),
    "noise": (np.random.default_rng(0).bytes(1 << 20), "not a MindSpore, PyTorch or"),
    "zip of noise": (
        b"PK\x03\x04" + np.random.default_rng(1).bytes(1 << 20),
        "end of the archive is missing",
    ),
    "pickle of noise": (b"\x80" + np.random.default_rng(2).bytes(1 << 20), ""),
}


@pytest.mark.parametrize(("raw", "pattern"), OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_other_files_are_refused(tmp_path, raw, pattern):
    path = tmp_path / "x.pth"
    path.write_bytes(raw)
    refuse(path, pattern)


def test_no_file(tmp_path):
    refuse(tmp_path / "nowhere.pth", "there is no such file")
    refuse(tmp_path, "there is no such file")


def repacked(path: Path, change: dict[str, bytes]) -> bytes:
    """With sound checksums around the changed records, so that the damage gets to the reader."""
    stream = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(stream, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change.get(info.filename) or old.read(info))
    return stream.getvalue()


@pytest.mark.parametrize("target", ["kinds.pth", "kinds_legacy.pth", "kinds/data.pkl"])
def test_damage_never_ends_in_another_error(tmp_path, target):
    rng = np.random.default_rng(7)
    inside = target.endswith(".pkl")
    source = DATA / ("kinds.pth" if inside else target)
    with zipfile.ZipFile(DATA / "kinds.pth") as archive:
        sound = archive.read(target) if inside else source.read_bytes()
    path = tmp_path / "x.pth"
    refused, slowest = 0, 0.0
    for attempt in range(300):
        raw = bytearray(sound)
        if attempt % 3 == 0:
            del raw[int(rng.integers(len(raw))) :]
        else:
            for position in rng.integers(len(raw), size=attempt % 3):
                raw[position] ^= int(rng.integers(1, 256))
        path.write_bytes(repacked(source, {target: bytes(raw)}) if inside else raw)
        start = time.process_time()
        try:
            arrays = read(path)
            assert all(type(array) is np.ndarray for array in arrays.values())
        except UserError:
            refused += 1
        slowest = max(slowest, time.process_time() - start)
    assert refused >= 100 and slowest < 1


@pytest.mark.parametrize("write", ["zip", "legacy"])
def test_memory_and_time_are_in_proportion(tmp_path, write):
    raw = np.arange(4 << 20, dtype="<f4").tobytes()
    stored = storage(numel=4 << 20)
    body = mapping(w=tensor((2048, 2048), (2048, 1), 0, stored))
    path = tmp_path / "x.pth"
    if write == "zip":
        write_zip(path, body, **{"data/0": raw})
    else:
        write_legacy(path, body, raw=struct.pack("<q", 4 << 20) + raw)
    del raw
    tracemalloc.start()
    start = time.process_time()
    read(path)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2 and peak < 2.5 * path.stat().st_size
