"""Pickles that were made for PyTorch's reader, and pickles that were made against it."""

from __future__ import annotations

import collections.abc
import functools
import itertools
import os
import pickle
import platform
import struct
import subprocess
import time
from pathlib import Path
from typing import Optional

import pytest

from src.errors import UserError
from src.weights.torch_file import read_torch_file
from src.weights.torch_pickle import Interpreter, Stream
from tests.weights.torch_bytes import (
    DATA,
    SIX,
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


def test_numpy_arrays_among_the_tensors_are_named(tmp_path):
    """Left out, a head would be trained anew without a word."""
    state = tup(num(1), nums(2), text("f4"), b"\x89", text("bytes"))
    for package in ("numpy.core", "numpy._core"):
        array = glob(f"{package}.multiarray", "_reconstruct")
        array += tup(glob("numpy", "ndarray"), nums(0), text("b")) + b"R" + state + b"b"
        beside = mapping(**{"head.weight": tensor(), "head.bias": array})
        for body in (beside, mapping(model=beside)):
            refuse(
                write_zip(tmp_path / "x.pth", body), "head.bias: NumPy arrays, which are not read"
            )
        alone = write_zip(tmp_path / "x.pth", mapping(model=mapping(head=array)))
        refuse(alone, "only: model, but NumPy arrays, which are not read; save torch.from_numpy")
        extra = mapping(model=mapping(weight=tensor()), history=array)
        assert list(read(write_zip(tmp_path / "x.pth", extra))) == ["weight"]


def test_tensors_saved_on_other_devices(tmp_path):
    """torch_npu/utils/storage.py, and torch/_tensor.py for XLA."""
    hooks = glob("collections", "OrderedDict") + b")R"
    parts = storage(), num(0), nums(2, 3), nums(3, 1), b"\x89", hooks, num(2)
    npu = glob("torch_npu.utils.storage", "_rebuild_npu_tensor") + tup(*parts) + b"R"
    parameter = glob("torch._utils", "_rebuild_parameter") + tup(npu, b"\x88", hooks) + b"R"
    xla = glob("torch._utils", "_rebuild_device_tensor_from_cpu_tensor")
    xla += tup(tensor(), glob("torch", "float32"), text("xla:0"), b"\x89") + b"R"
    body = mapping(npu=npu, parameter=parameter, xla=xla)
    for write in (write_zip, write_legacy):
        found = read(write(tmp_path / "x.pth", body))
        assert list(found) == ["npu", "parameter", "xla"]
        for array in found.values():
            assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_tensor_that_stands_for_its_negative_is_refused(tmp_path):
    """As PyTorch writes `x.conj().imag`: the stored values have the other sign."""
    hooks = glob("collections", "OrderedDict") + b")R"
    parts = storage(), num(0), nums(2, 3), nums(3, 1), b"\x89", hooks, mapping(neg=b"\x88")
    tensor_ = glob("torch._utils", "_rebuild_tensor_v2") + tup(*parts) + b"R"
    with pytest.raises(UserError, match="_rebuild_tensor_v2 with attributes of the tensor"):
        read(write_zip(tmp_path / "x.pth", mapping(w=tensor_)))


def test_malicious_file_runs_nothing():
    before = MARKER.exists() and MARKER.stat().st_mtime_ns
    refuse(DATA / "malicious.pth", "the pickle requests posix.system; only tensors")
    assert (MARKER.exists() and MARKER.stat().st_mtime_ns) == before


ATTACKS = [
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.exec",
    "builtins.getattr", "builtins.__import__", "__builtin__.eval", "torch.load", "sys.exit",
    "runpy.run_path", "importlib.import_module", "pathlib.Path.unlink", "shutil.rmtree",
    "ctypes.CDLL", "types.CodeType", "operator.attrgetter", "pickle.loads", "_pickle.loads",
    "webbrowser.open", "socket.create_connection", "commands.getoutput", "codecs.open",
    "numpy.testing._private.utils.runstring", "numpy.load", "torch.hub.load", "pip.main",
    "cloudpickle.cloudpickle._make_function", "mine.tools.os.system", "torch.jit.load",
    "torch.storage._load_from_bytes", "pandas.eval", "functools.reduce", "argparse.FileType",
]  # fmt: skip


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_by_name(tmp_path, write, name):
    module, attribute = name.rsplit(".", 1)
    if name == "pathlib.Path.unlink":
        module, attribute = "pathlib", "Path.unlink"
    by_stack = text(module) + text(attribute) + b"\x93"
    for wanted in (glob(module, attribute), by_stack):
        body = mapping(w=tensor(), x=wanted + tup(text("touch " + str(MARKER))) + b"R")
        refuse(write(tmp_path / "x.pth", body), f"requests {name}; ")


OBJECTS = {
    "argparse.Namespace": b")\x81" + mapping(lr=num(1)) + b"b",
    "collections.defaultdict": tup(glob("builtins", "list")) + b"R" + text("k") + b"Ns",
    "numpy.core.multiarray.scalar": tup(glob("numpy", "dtype"), b"C\x02ab") + b"R",
    "numpy._core.multiarray._reconstruct": tup(glob("numpy", "ndarray"), nums(0), b"C\x01b")
    + b"R" + tup(num(1), nums(3), b"N", b"\x89", b"C\x03abc") + b"b",
    "numpy.float32": b"",
    "torch._utils._rebuild_sparse_tensor": tup(num(1)) + b"R",
    "torch.device": tup(text("cuda"), num(0)) + b"R",
    "torch.bfloat16": b"",
    "pathlib.PosixPath": tup(text("/etc"), text("passwd")) + b"R",
    "datetime.datetime": tup(b"C\x02ab") + b"R",
    "functools.partial": tup(glob("torch.nn", "LayerNorm")) + b"R" + tup(b"N", b"}") + b"b",
    "mine.train.Settings": b")}\x92" + mapping(lr=num(1)) + b"b",
    "__main__.History": b")\x81" + b"(" + num(1) + num(2) + num(3) + b"e",
    "enum.auto": b")R",
    "uuid.UUID": b")\x81}b",
    "omegaconf.dictconfig.DictConfig": b")\x81}b",
    "torch.storage.UntypedStorage": b"",
}  # fmt: skip


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_beside_the_weights_are_set_aside_and_named(tmp_path, write, name):
    module, attribute = name.rsplit(".", 1)
    body = mapping(epoch=num(1), x=glob(module, attribute) + OBJECTS[name], w=tensor())
    tensors, notes = read_torch_file(write(tmp_path / "x.pth", body))
    assert tensors["w"].tobytes() == SIX and len(tensors) == 1
    assert notes[0] == "skipped epoch, x" and notes[1].startswith("objects skipped without")
    assert name in notes[1]


def test_objects_of_older_protocols_are_set_aside(tmp_path):
    for body in (b"(imine\nSettings\n", b"(" + glob("mine", "Settings") + b"o"):
        arrays = read(write_zip(tmp_path / "x.pth", mapping(x=body, w=tensor())))
        assert list(arrays) == ["w"]


def test_tensors_of_other_kinds_are_set_aside(tmp_path):
    other = tensor(stored=storage("QUInt4x2", "9"))
    arrays = read(write_zip(tmp_path / "x.pth", mapping(x=other, w=tensor())))
    assert list(arrays) == ["w"]


def untyped(dtype: str, key: str = "0") -> bytes:
    parts = text("storage"), glob("torch.storage", "UntypedStorage"), text(key), text("cpu")
    parts = tup(*parts, num(24)) + b"Q", num(0), nums(2, 3), nums(3, 1), b"\x89", b"N"
    rebuild = glob("torch._utils", "_rebuild_tensor_v3")
    return rebuild + tup(*parts, glob("torch", dtype), b"}") + b"R"


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (tensor(stored=storage("ComplexFloat", numel=3), shape=(3,), strides=(1,)), "c8"),
        (tensor(stored=storage("QInt32")), "i4"),
        (untyped("float8_e4m3fn"), "V1"),
    ],
)
def test_types_that_no_network_takes_keep_their_name(tmp_path, stored, dtype):
    """A message names them; without, the tensor would be said to be missing."""
    arrays = read(write_zip(tmp_path / "x.pth", mapping(x=stored)))
    assert arrays["x"].dtype == dtype


def test_other_types_without_a_storage_are_set_aside(tmp_path):
    arrays = read(write_zip(tmp_path / "x.pth", mapping(x=untyped("uint16", "9"), w=tensor())))
    assert list(arrays) == ["w"]


def test_parameters_with_attributes_and_older_tensors_are_read(tmp_path):
    parameter = glob("torch._utils", "_rebuild_parameter_with_state")
    parameter += tup(tensor(), b"\x88", b"N", b"}") + b"R"
    old = glob("torch._utils", "_rebuild_tensor")
    old += tup(storage(), num(0), nums(6), nums(1)) + b"R"
    kind = glob("torch._tensor", "_rebuild_from_type_v2")
    parts = storage(), num(0), nums(2, 3), nums(3, 1), b"\x89", b"N"
    kind += tup(
        glob("torch._utils", "_rebuild_tensor_v2"), glob("mine", "Weight"), tup(*parts), b"}"
    )
    body = mapping(a=parameter, b=old, c=kind + b"R")
    arrays = read(write_zip(tmp_path / "x.pth", body))
    assert {name: array.shape for name, array in arrays.items()} == {
        "a": (2, 3),
        "b": (6,),
        "c": (2, 3),
    }


class Settings:
    class Optimizer:
        def step(self):
            """Stored with its object, as a scheduler stores its optimizer's."""


HONEST = {
    "nested class": Settings.Optimizer(),
    "bound method": Settings.Optimizer().step,
    "host": platform.uname(),
    "type": Optional[int],
    "type of None": type(None),
    "program's result": subprocess.CompletedProcess(["git"], 0),
    "counter": itertools.count(3),
    "abstract class": collections.abc.Mapping,
    "file's state": os.stat("/"),
    "exception": ValueError("x"),
    "builtin function": functools.partial(max, 0),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("value", HONEST.values(), ids=HONEST.keys())
def test_python_objects_are_no_attack(value, protocol):
    content = pickle.dumps({"epoch": 3, "x": value}, protocol)
    assert Interpreter().unpickle(Stream(content))["epoch"] == 3


GETATTR = glob("__builtin__", "getattr")
HIDDEN_ATTACKS = {
    "pathlib.Path.unlink": glob("pathlib", "Path") + text("unlink"),
    "builtins.object.__subclasses__": glob("builtins", "object") + text("__subclasses__"),
    "mine.Settings.__init__.__globals__": glob("mine", "Settings") + text("__init__.__globals__"),
    "pathlib.PosixPath.unlink": glob("pathlib", "PosixPath")
    + tup(text("/"))
    + b"R"
    + text("unlink"),
    "__builtin__.getattr": b"]" + text("append"),
}


@pytest.mark.parametrize("name", HIDDEN_ATTACKS)
def test_what_getattr_gets_is_judged_as_if_it_was_named(tmp_path, name):
    body = GETATTR + HIDDEN_ATTACKS[name] + b"\x86R"
    refuse(write_zip(tmp_path / "x.pth", mapping(w=tensor(), x=body)), f"requests {name}; ")


def test_attributes_are_set_aside(tmp_path):
    nested = GETATTR + GETATTR + glob("mine", "A") + text("B") + b"\x86R" + text("C") + b"\x86R"
    zone = GETATTR + glob("zoneinfo", "ZoneInfo") + text("_unpickle") + b"\x86R"
    zone += text("Asia/Shanghai") + num(1) + b"\x86R"
    body = mapping(w=tensor(), x=nested, zone=zone)
    tensors, notes = read_torch_file(write_zip(tmp_path / "x.pth", body))
    assert list(tensors) == ["w"]
    assert "mine.A.B.C" in notes[1] and "zoneinfo.ZoneInfo._unpickle" in notes[1]


ODD_PICKLES = {
    "NEWOBJ of getattr": GETATTR + b")\x81",
    "getattr without arguments": GETATTR + b")R",
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
    "key is a tuple": b"}" + b")" + b"N" + b"s",
    "key nested without end": b"}" + b")" + b"\x85" * 300_000 + b"N" + b"s",
    "key of 100 bytes": b"}" + num(1 << 800) + b"N" + b"s",
    "keys that collide": b"}(" + b"".join(num((i << 40) + 7) + b"N" for i in range(40_000)) + b"u",
    "set of tuples": b"\x8f(" + tup(b")" * 20_000) * 5 + b"\x90",
    "memo index 2**31 - 1": b"Nr\xff\xff\xff\x7f",
    "lists in lists": b"]" * 100_000 + b"a" * 99_999,
    # Each list holds the one before twice: 2**200 leaves for who walks through them.
    "billion laughs": tup(b"]q\x01", *[b"](h\x01h\x01eq\x01"] * 200),
}


LONG = tup(*[b"K\x01"] * 10_000) + b"q\x05"
BOMBS = {
    "sizes of a long tuple": LONG + (glob("torch", "Size") + b"h\x05\x85R") * 5_000,
    "references of a long tuple": LONG + b"h\x05Q" * 20_000,
    "copies of a long list": b"]q\x05("
    + tup(text("a"), b"N") * 20_000
    + b"e"
    + (glob("collections", "OrderedDict") + b"h\x05\x85R0") * 2_000,
    "long names": text("a" * 4_000)
    + b"q\x05"
    + b"".join(GETATTR + glob("m", f"A{i}") + b"h\x05\x86R0" for i in range(20_000)),
    "opcodes": b"N0" * 300_000,
    "decimal": b"L" + b"9" * 1_000_000 + b"L\n",
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_refused_soon(tmp_path, body):
    refuse(write_zip(tmp_path / "x.pth", mapping(x=body, w=tensor())), seconds=1.5)


@pytest.mark.parametrize("body", HARMLESS_BOMBS.values(), ids=HARMLESS_BOMBS.keys())
def test_bombs_in_what_is_left_aside_cost_nothing(tmp_path, body):
    start = time.process_time()
    arrays = read(write_zip(tmp_path / "x.pth", mapping(x=body, w=tensor())))
    assert list(arrays) == ["w"] and time.process_time() - start < 2


def test_objects_that_pytorch_saved_beside_the_weights():
    """Namespace, NumPy's and torch's values, a date, sets, a class of the script's, a partial."""
    tensors, notes = read_torch_file(DATA / "objects.pth", lambda found: {("net", "module.w"): "w"})
    assert tensors["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert "args, best, device, dtype, rng, when" in notes[0]
    assert "argparse.Namespace, pathlib.PurePosixPath" in notes[1]
