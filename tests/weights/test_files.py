"""Folders, shards and their index; kinds of files by their content; sizes."""

from __future__ import annotations

import json
import os
import time

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import save_file

from src.errors import UserError
from src.files import sha256_of
from src.weights import save_weights, unchanged, weight_files
from src.weights.files import read_content
from tests.weights.torch_bytes import SOUND, mapping, tensor, write_zip

ONE = np.ones((2, 3), np.float32)


def read(path) -> dict[str, np.ndarray]:
    return read_content(path, lambda found: {place: place[-1] for place in found}).tensors


def refuse(path, pattern: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=pattern) as caught:
        read(path)
    assert time.process_time() - start < 1 and "\n" not in str(caught.value)


def index(folder, shard_of, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": shard_of}))
    return folder / name


def test_torch_shards_with_an_index(tmp_path):
    write_zip(tmp_path / "pytorch_model-00001-of-00002.bin", mapping(a=tensor()))
    write_zip(tmp_path / "pytorch_model-00002-of-00002.bin", mapping(b=tensor()))
    shards = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    file = index(tmp_path, shards, "pytorch_model.bin.index.json")
    assert read(tmp_path).keys() == read(file).keys() == {"a", "b"}
    files = weight_files(tmp_path)
    assert [each.name for each in files] == [file.name, *shards.values()]
    assert sha256_of(*files) != sha256_of(*files[1:])


def test_a_file_that_is_replaced_while_it_is_read_is_refused(tmp_path):
    """Its checksum would be of other weights."""
    for number in range(2):
        save_weights({"w": Tensor(ONE * number)}, tmp_path / f"{number}.ckpt")
    with unchanged(tmp_path / "0.ckpt") as files:
        assert files == [tmp_path / "0.ckpt"]
    with pytest.raises(UserError, match="0.ckpt: was replaced while"), unchanged(files[0]):
        (tmp_path / "1.ckpt").replace(files[0])


def test_a_fold_of_a_cross_validation_is_no_shard(tmp_path):
    save_file({"w": ONE}, tmp_path / "cvt-fold-1-of-5.safetensors")
    assert read(tmp_path / "cvt-fold-1-of-5.safetensors").keys() == {"w"}
    save_file({"w": ONE}, tmp_path / "model-00001-of-00005.safetensors")
    refuse(tmp_path / "model-00001-of-00005.safetensors", "one of 5 shards")


def test_of_a_folder_the_only_weight_file_or_index_is_taken(tmp_path):
    save_file({"w": ONE}, tmp_path / "weights.fp32.safetensors")
    (tmp_path / "config.json").write_text("{}")
    write_zip(tmp_path / "training_args.bin", SOUND)
    assert read(tmp_path).keys() == {"w"}
    save_file({"w": ONE}, tmp_path / "other.safetensors")
    refuse(tmp_path, "one weight file, found other.safetensors, weights.fp32.safetensors; give")
    save_file({"x": ONE}, tmp_path / "model.safetensors")
    assert read(tmp_path).keys() == {"x"}
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "must contain one weight file, found none")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..", "", "a\\b", "sub/x", 3, None]
)
def test_an_index_names_files_of_its_folder_only(tmp_path, name):
    (tmp_path / "in").mkdir()
    save_file({"w": ONE}, tmp_path / "x.safetensors")
    refuse(index(tmp_path / "in", {"w": name}), "which is not a file of its folder")


def test_shards_that_do_not_belong_together(tmp_path):
    save_file({"a": ONE}, tmp_path / "1.safetensors")
    save_file({"a": ONE, "b": ONE}, tmp_path / "2.safetensors")
    refuse(
        index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}), "a is also in another shard"
    )
    refuse(
        index(tmp_path, {"a": "1.safetensors", "c": "1.safetensors"}),
        "its index lists tensors in no shard: c; down",
    )
    refuse(index(tmp_path, {"a": "3.safetensors"}), "shard 3.safetensors is missing")


@pytest.mark.parametrize("raw", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, "\xff"])
def test_other_json_is_no_index(tmp_path, raw):
    (tmp_path / "x.index.json").write_text(raw, encoding="latin-1")
    refuse(tmp_path / "x.index.json", "x.index.json: ")


@pytest.mark.parametrize("mode", ["AES-GCM", "AES-CBC", "SM4-CBC"])
def test_an_encrypted_checkpoint_is_named(tmp_path, mode):
    entries = [{"name": "w", "data": Tensor(ONE)}]
    ms.save_checkpoint(entries, str(tmp_path / "x.ckpt"), enc_key=b"0" * 16, enc_mode=mode)
    refuse(tmp_path / "x.ckpt", "an encrypted MindSpore checkpoint; decrypt it")


@pytest.mark.parametrize("head", [b"", b"\x0a\x10\x0a\x01w", b"PK\x03\x04", b"\x80\x02"])
@pytest.mark.parametrize("name", ["x.ckpt", "x.pth", "x.safetensors"])
def test_a_sparse_terabyte_is_refused_by_its_size(tmp_path, name, head):
    (tmp_path / name).write_bytes(head)
    os.truncate(tmp_path / name, 1 << 40)
    refuse(tmp_path / name, "has 1100 GB, but weight files")


OTHERS = {
    "graph": (b"\x08\x07\x12\x07pytorch", "a graph .ONNX or MINDIR., not weights"),
    "hdf5": (b"\x89HDF\r\n", "an HDF5 file"),
    "gzip": (b"\x1f\x8b\x08", "compressed by gzip; unpack"),
    "text": (b"hello", "not a MindSpore, PyTorch or safetensors file"),
    "zeros": (bytes(100), "not a MindSpore, PyTorch or safetensors file"),
    "empty": (b"", "the file is empty"),
}


@pytest.mark.parametrize(("raw", "pattern"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_named(tmp_path, raw, pattern):
    (tmp_path / "x.ckpt").write_bytes(raw)
    refuse(tmp_path / "x.ckpt", pattern)
    with pytest.raises(UserError, match=pattern):
        weight_files(tmp_path / "x.ckpt")


def test_too_many_tensors_of_safetensors(tmp_path):
    save_file({str(n): np.zeros(0, np.float32) for n in range(20_001)}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", "more than 20000 tensors")


def test_every_kind_by_its_content(tmp_path):
    save_weights({"w": Tensor(ONE)}, tmp_path / "a.ckpt")
    save_file({"w": ONE}, tmp_path / "b.ckpt")
    write_zip(tmp_path / "c.ckpt", SOUND)
    for name in ("a.ckpt", "b.ckpt", "c.ckpt"):
        assert read(tmp_path / name)["w"].shape == (2, 3)


@pytest.mark.parametrize("length", [0x80, 0x10A, 0x450])
def test_safetensors_whose_length_begins_like_another_kind(tmp_path, length):
    header = b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'.ljust(length)
    raw = length.to_bytes(8, "little") + header + bytes(24)
    (tmp_path / "x.ckpt").write_bytes(raw)
    assert read(tmp_path / "x.ckpt")["w"].shape == (6,)
