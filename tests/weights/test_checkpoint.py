"""Files as MindSpore writes them, and files damaged or forged byte by byte."""

from __future__ import annotations

import logging
import struct
import time
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors import SafetensorError

from src.errors import UserError
from src.weights import save_checkpoint, save_weights
from src.weights.checkpoint import read_checkpoint, read_safetensors

READERS = {".ckpt": read_checkpoint, ".safetensors": read_safetensors}
NOISE = np.random.default_rng(0).bytes(1 << 20)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kinds = ("f4", "f2", "f8", "i4", "i8", "u1", "?")
    values = {f"as {kind}": (rng.random((2, 3)) * 9).astype(kind) for kind in kinds}
    return {**values, "scalar": np.array(7, np.int32), "long name" * 20: rng.random((70, 5))}


def equal(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def refuse(path: Path, pattern: str = "", seconds: float = 1.0) -> None:
    """It must be refused soon, in one line that names the file, and without much memory."""
    start = time.process_time()
    with pytest.raises(UserError, match=pattern or None) as caught:
        READERS[path.suffix](path)
    assert time.process_time() - start < seconds
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500
    tracemalloc.start()
    with pytest.raises(UserError):
        READERS[path.suffix](path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * path.stat().st_size + (8 << 20)


def varint(value: int) -> bytes:
    low, value = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(value) if value else bytes([low])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def value(dims: tuple, content: bytes, kind: str = "Float32", tag: str = "w") -> bytes:
    shape = b"".join(field(1, dim) for dim in dims)
    tensor = shape + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, tag.encode()) + field(2, tensor))


@pytest.mark.parametrize("checksum", [True, False], ids=["checksum", "plain"])
@pytest.mark.parametrize("suffix", READERS)
def test_reads_what_mindspore_wrote(tmp_path, suffix, checksum):
    path = tmp_path / f"x{suffix}"
    entries = [{"name": name, "data": Tensor(array)} for name, array in arrays().items()]
    ms.save_checkpoint(entries, str(path), crc_check=checksum, format=suffix[1:])
    equal(READERS[suffix](path).tensors, arrays())


@pytest.mark.parametrize("suffix", READERS)
def test_reads_what_we_wrote(tmp_path, suffix):
    path = tmp_path / f"new/folder/x{suffix}"
    save_checkpoint({name: Tensor(array) for name, array in arrays().items()}, path)
    equal(READERS[suffix](path).tensors, arrays())
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_numbers_and_strings_beside_the_tensors(tmp_path):
    extra = {"best_top1": 12.5, "epoch": 3, "note": "añ", "done": True}
    save_checkpoint({"w": Tensor([1.0])}, tmp_path / "x.ckpt", **extra)
    found = read_checkpoint(tmp_path / "x.ckpt").tensors
    assert {name: found[name].item() for name in extra} == extra


def test_bfloat16_is_widened_exactly(tmp_path):
    bits = np.arange(0, 1 << 16, 7, dtype="<u2")
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    header = b'{"w":{"dtype":"BF16","shape":[%d],"data_offsets":[0,%d]}}' % (bits.size, bits.nbytes)
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bits.tobytes())
    (tmp_path / "x.ckpt").write_bytes(value((bits.size,), bits.tobytes(), "BFloat16"))
    for file in (path, tmp_path / "x.ckpt"):
        tensors, notes = READERS[file.suffix](file)
        assert tensors["w"].tobytes() == expected.tobytes() and tensors["w"].dtype == np.float32
        assert notes == ["bfloat16 widened to float32"]


def test_slices_of_one_tensor_are_joined(tmp_path):
    whole = np.arange(6, dtype="<f4")
    halves = [value((2, 3), part.tobytes()) for part in np.split(whole, 2)]
    (tmp_path / "x.ckpt").write_bytes(b"".join(halves))
    np.testing.assert_array_equal(read_checkpoint(tmp_path / "x.ckpt").tensors["w"].ravel(), whole)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "x.ckpt"
    save_weights({"w": Tensor(np.ones((2, 3), np.float32)), "b": Tensor([1.0])}, path)
    sound = path.read_bytes()
    for position in range(8 * len(sound)):
        raw = bytearray(sound)
        raw[position // 8] ^= 1 << position % 8
        path.write_bytes(raw)
        with pytest.raises(UserError, match="x.ckpt: "):
            read_checkpoint(path)


def test_flipped_bits_in_the_weights_of_our_safetensors_are_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights({"w": Tensor(np.ones((2, 3), np.float32))}, path)
    sound = path.read_bytes()
    for position in range(8 * (len(sound) - 24), 8 * len(sound)):
        raw = bytearray(sound)
        raw[position // 8] ^= 1 << position % 8
        path.write_bytes(raw)
        refuse(path, "its checksum differs")


@pytest.mark.parametrize("suffix", READERS)
def test_a_cut_file_never_gives_half_a_tensor(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    save_weights({name: Tensor(array) for name, array in arrays().items()}, path)
    sound, refused = path.read_bytes(), 0
    for length in range(0, len(sound), 11):
        path.write_bytes(sound[:length])
        try:
            found = READERS[suffix](path).tensors
            equal(found, {name: arrays()[name] for name in found})
        except UserError:
            refused += 1
    assert refused > 0.9 * len(sound) // 11


OTHER_FILES = {
    "empty": b"",
    "noise": NOISE,
    "zeros": bytes(1 << 20),
    "page": b"<!DOCTYPE html><html>404</html>",
    "pickle": b"\x80\x02}q\x00.",
    "zip": b"PK\x03\x04" + NOISE,
}


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("raw", OTHER_FILES.values(), ids=OTHER_FILES)
def test_other_files_are_refused(tmp_path, suffix, raw):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(raw)
    refuse(path)


def test_no_file(tmp_path):
    for suffix, reader in READERS.items():
        for path in (tmp_path / f"nowhere{suffix}", tmp_path):
            with pytest.raises(UserError, match="there is no such file"):
                reader(path)


FORGED = {
    "claims 4 TB": (value((1 << 40,), bytes(24)), "has 24 bytes"),
    "claims more than 64 bits": (value((1 << 62, 1 << 62), bytes(24)), "has 24 bytes"),
    "negative": (value(((1 << 64) - 2, (1 << 64) - 3), bytes(24)), "has 24 bytes"),
    "one byte short": (value((6,), bytes(23)), "has 23 bytes"),
    "too long": (value((2,), bytes(24)), "has 24 bytes"),
    "unknown type": (value((6,), bytes(24), "Float99"), "unsupported type Float99"),
    "odd string": (value((0,), b"abc\xff", "str"), "damaged"),
    "tag is no text": (field(1, field(1, b"\xff") + field(2, b"")), "damaged"),
    "twice": (value((1,), bytes(4)) + value((2,), bytes(8)), "occurs twice"),
    "no tensor in a value": (field(1, field(1, b"w")), "a value is not a tensor"),
    "map tensor": (field(1, field(1, b"w") + field(3, b"")), "a value is not a tensor"),
    "tensor without content": (field(1, field(1, b"w") + field(2, field(2, b"Float32"))), ""),
    "tensor is a number": (field(1, field(1, b"w") + field(2, 7)), "a value is not a tensor"),
    "other message": (field(2, b"w"), "not a list of tensors"),
    "dims are text": (field(1, field(1, b"w") + field(2, field(1, b"3"))), "damaged"),
    "too many dims": (value((1,) * 60, bytes(4)), "damaged"),
    "length without end": (b"\x0a" + b"\xff" * 10, "integer of more than 64 bits"),
    "a million empty values": (field(1, b"") * (1 << 20), "a value is not a tensor"),
    "too many tensors": (value((1,), bytes(4)) * (1 << 18), "more than 20000 fields"),
    "a value of a million fields": (field(1, field(1, b"") * (1 << 20)), "more than 64 fields"),
}


@pytest.mark.parametrize(("raw", "pattern"), FORGED.values(), ids=FORGED)
def test_forged_checkpoints_are_refused(tmp_path, raw, pattern):
    (tmp_path / "x.ckpt").write_bytes(raw)
    refuse(tmp_path / "x.ckpt", pattern)


FORGED_HEADERS = {
    "claims 4 TB": (b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,24]}}', ""),
    "beyond the end": (b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[96,120]}}', ""),
    "unknown type": (b'{"w":{"dtype":"F99","shape":[6],"data_offsets":[0,24]}}', ""),
    "type not read": (b'{"w":{"dtype":"F8_E4M3","shape":[24],"data_offsets":[0,24]}}', "F8_E4M3"),
    "no tensors": (b"{}", ""),
    "nested": (b"[" * 100_000, ""),
    "blanks": (b" " * (17 << 20), "header is too large"),
    "odd checksum": (
        b'{"__metadata__":{"crc_num":"x"},"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        "",
    ),
}


@pytest.mark.parametrize(("header", "pattern"), FORGED_HEADERS.values(), ids=FORGED_HEADERS)
def test_forged_safetensors_are_refused(tmp_path, header, pattern):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    refuse(path, pattern)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """safetensors has an exception of its own for it."""
    full = Mock(side_effect=SafetensorError("I/O error: No space left on device"))
    monkeypatch.setattr("mindspore.train.serialization.save_file", full)
    with pytest.raises(UserError, match="x.safetensors: cannot be written: .*No space left"):
        save_weights({"w": Tensor([1.0])}, tmp_path / "x.safetensors")
    assert full.called and not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_refused(tmp_path, capfd):
    (tmp_path / "file").touch()
    (tmp_path / "folder.ckpt").mkdir()
    for name, pattern in (
        ("x.pth", "must end in .ckpt or .safetensors"),
        ("file/x.ckpt", "cannot be written"),
        ("folder.ckpt", "cannot be written"),
    ):
        with pytest.raises(UserError, match=pattern):
            save_weights({"w": Tensor([1.0])}, tmp_path / name)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.ckpt"]
    assert "Failed" not in capfd.readouterr().err


def test_saving_leaves_the_callers_level_of_logging(tmp_path):
    logging.disable(logging.INFO)
    try:
        save_weights({"w": Tensor([1.0])}, tmp_path / "x.ckpt")
        with pytest.raises(UserError):
            save_weights({"w": Tensor([1.0])}, tmp_path / "x.ckpt/y.ckpt")
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)
