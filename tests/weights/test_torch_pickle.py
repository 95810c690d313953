"""Pickles that were made for PyTorch's reader, and pickles that were made against it."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from tests.weights.torch_bytes import (
    DATA,
    glob,
    mapping,
    num,
    nums,
    read,
    refuse,
    storage,
    tensor,
    text,
    tup,
    write_legacy,
    write_zip,
)

MARKER = Path("/tmp/pickle_code_ran")


def test_parameter_size_and_metadata(tmp_path):
    parameter = glob("torch._utils", "_rebuild_parameter") + tup(tensor(), b"\x88", b"N") + b"R"
    ordered = glob("collections", "OrderedDict") + b")R" + text("w") + parameter + b"s"
    size = text("size") + glob("torch", "Size") + tup(nums(2, 3)) + b"R" + b"s"
    body = ordered + size + mapping(_metadata=mapping(version=num(1))) + b"b"
    assert list(read(write_zip(tmp_path / "x.pth", body))) == ["w"]


def test_malicious_file_runs_nothing():
    before = MARKER.exists() and MARKER.stat().st_mtime_ns
    refuse(DATA / "malicious.pth", "the pickle asks for posix.system; only tensors")
    assert (MARKER.exists() and MARKER.stat().st_mtime_ns) == before


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "argparse.Namespace", "torch.load", "collections.defaultdict",
     "numpy.core.multiarray.scalar", "torch._utils._rebuild_sparse_tensor", "functools.partial"],
)  # fmt: skip
def test_other_globals_are_refused_by_name(tmp_path, write, name):
    module, attribute = name.rsplit(".", 1)
    by_stack = text(module) + text(attribute) + b"\x93"
    for wanted in (glob(module, attribute), by_stack):
        body = mapping(w=tensor(), x=wanted + tup(text("touch " + str(MARKER))) + b"R")
        refuse(write(tmp_path / "x.pth", body), f"asks for {name}; ")


ODD_PICKLES = {
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(" + glob("torch", "Size") + b"o",
    "NEWOBJ": glob("torch", "Size") + b")\x81",
    "EXT1": b"\x82\x01",
    "PERSID": b"Pstorage\n",
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 2) + b"ab",
    "BUILD on a global": glob("collections", "OrderedDict") + b"}b",
    "BUILD on a storage": storage() + b"}b",
    "call of a string": text("torch.Size") + tup(nums(1)) + b"R",
    "call of a storage type": glob("torch", "FloatStorage") + tup(num(9)) + b"R",
    "OrderedDict of something": glob("collections", "OrderedDict") + tup(b"}") + b"R",
    "global named by lists": b"]]\x93",
    "parameter of a number": glob("torch._utils", "_rebuild_parameter") + tup(num(1)) + b"R",
    "tensor of a number": glob("torch._utils", "_rebuild_tensor_v2") + tup(num(1)) + b"R",
    "reference is text": text("storage") + b"Q",
    "reference is empty": b")Q",
    "reference is a module": tup(*[text("module")] * 5) + b"Q",
    "key is a path's tuple": tup(text("storage"), glob("torch", "FloatStorage"), b")", b"N", num(6))
    + b"Q",
    "storage type is text": tup(*map(text, ("storage", "torch.FloatStorage", "0", "cpu", "6")))
    + b"Q",
    "storage in two types": storage() + storage("Long"),
    "storage count is text": tup(text("storage"), glob("torch", "FloatStorage"), *[text("0")] * 3)
    + b"Q",
    "append to a number": num(1) + num(2) + b"a",
    "key is a tuple": b"}" + b")" + b"N" + b"s",
    "key nested without end": b"}" + b")" + b"\x85" * 300_000 + b"N" + b"s",
    "key of 100 bytes": b"}" + num(1 << 800) + b"N" + b"s",
    "memo never filled": b"h\x07",
    "empty stack": b"R",
    "mark missing": b"t",
    "text that is not UTF-8": b"X\x02\x00\x00\x00\xff\xfe",
    "claims 2**62 bytes": b"\x8d" + struct.pack("<Q", 1 << 62) + b"ab",
    "unknown opcode": b"\xff",
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("body", ODD_PICKLES.values(), ids=ODD_PICKLES.keys())
def test_odd_pickles_are_refused(tmp_path, write, body):
    refuse(write(tmp_path / "x.pth", mapping(w=tensor(), x=body)))


HARMLESS_BOMBS = {
    "memo index 2**31 - 1": b"Nr\xff\xff\xff\x7f",
    "lists in lists": b"]" * 100_000 + b"a" * 99_999,
    # Each list holds the one before twice: 2**200 leaves for who walks through them.
    "billion laughs": tup(b"]q\x01", *[b"](h\x01h\x01eq\x01"] * 200),
}


@pytest.mark.parametrize("body", HARMLESS_BOMBS.values(), ids=HARMLESS_BOMBS.keys())
def test_bombs_in_what_is_left_aside_cost_nothing(tmp_path, body):
    start = time.process_time()
    arrays = read(write_zip(tmp_path / "x.pth", mapping(x=body, w=tensor())))
    assert list(arrays) == ["w"] and time.process_time() - start < 2
