"""Interprets the pickles inside PyTorch's files, and runs nothing that is in them.

A pickle is a program. Python's Unpickler is not safe on a stranger's file even with a strict
`find_class`: BUILD alters whatever that gave out, one opcode asks for a memo of 32 GB, the hash of
a deeply nested tuple overflows C's stack. So the few opcodes that a dict of tensors needs are
interpreted here. Globals stay names; those admitted are `collections.OrderedDict`, `torch.Size`,
`_rebuild_tensor_v2` and `_rebuild_parameter` of `torch._utils`, and the storage types below. All
else (functions, Namespace, NumPy scalars, devices, whole modules) is refused by name.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from src.errors import UserError
from src.weights.content import AGAIN, short

# NumPy has no bfloat16: its 16 bits are read as integers and widened later.
_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = ("<f8", "<f4", "<f2", "<u2", "<i8", "<i4", "<i2", "i1", "u1", "?")
_STORAGES = {f"torch.{kind}Storage": dtype for kind, dtype in zip(_KINDS, _DTYPES)}
BFLOAT16 = "<u2"
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_ORDERED_DICT, _SIZE = "collections.OrderedDict", "torch.Size"

# The opcodes that push their own argument, and those that push a constant.
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

REFUSED = (
    "only tensors and plain containers are read, and nothing is run; if you trust the source, "
    "save the weights alone with PyTorch: torch.save(model.state_dict(), FILE)"
)


class Storage(NamedTuple):
    key: str
    dtype: str  # a value of _STORAGES
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * np.dtype(self.dtype).itemsize


class StoredTensor(NamedTuple):
    """A tensor that is still in its file: a window on a storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(str):
    """A name that the pickle asked for, never the thing of that name."""


def unpickle(stream: BinaryIO, storages: dict[str, Storage]) -> Any:
    """Interprets the stream's next pickle; adds the storages it refers to."""
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for opcode, arg, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _LITERALS:
            stack.append(arg)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if arg is None else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            else:
                _fill(stack[-1], items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            items, stack[-count:] = stack[-count:], []
            _fill(stack[-1], items)
        elif name == "GLOBAL":
            stack.append(_admit(arg.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_admit(".".join(stack[-2:]))]
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        elif name == "REDUCE":
            stack[-2:] = [_call(stack[-2], stack[-1])]
        elif name == "BUILD" and type(stack[-2]) is OrderedDict:
            stack.pop()  # `_metadata`, the layers' format versions: no weights in it
        elif name == "STOP":
            return stack[-1]
        elif name not in ("PROTO", "FRAME"):
            asked = f"{name} {short(arg)}" if isinstance(arg, str) else name
            raise UserError(f"the pickle uses the opcode {asked}; {REFUSED}")
    raise UserError(f"its pickle does not end; {AGAIN}")


def _storage(reference: Any, storages: dict[str, Storage]) -> Storage:
    if type(reference) is not tuple or len(reference) < 5:
        reference = (None,) * 5
    tag, kind, key, _, numel, *part = reference
    # Before PyTorch 0.4 the sixth item could make the storage a part of another one.
    known = tag == "storage" and type(kind) is _Global and kind in _STORAGES and not any(part)
    if not known or type(key) is not str:
        raise UserError(f"the pickle refers to something that is no storage; {REFUSED}")
    new = Storage(key, _STORAGES[kind], *_sizes((numel,)))
    if storages.setdefault(key, new) != new:
        raise UserError(f"storage {short(key)} is described in two ways; {AGAIN}")
    return new


def _admit(name: str) -> _Global:
    if name not in _STORAGES and name not in (_TENSOR, _PARAMETER, _ORDERED_DICT, _SIZE):
        raise UserError(f"the pickle asks for {short(name)}; {REFUSED}")
    return _Global(name)


def _fill(container: Any, items: list[Any]) -> None:
    if type(container) is list:
        container.extend(items)
        return
    # No tuples, whose hash recurses, and no integers so long that a dict of them turns slow.
    plain = all(
        type(key) in (str, float) or (type(key) is int and key.bit_length() < 64)
        for key in items[::2]
    )
    if not plain or not isinstance(container, dict) or len(items) % 2:
        raise UserError(f"the pickle fills a container in an unusual way; {REFUSED}")
    container.update(zip(items[::2], items[1::2]))


def _call(target: Any, arguments: Any) -> Any:
    """What a call of an admitted name makes."""
    name = target if type(target) is _Global else "something"
    first = arguments[0] if type(arguments) is tuple and arguments else None
    if name == _ORDERED_DICT and arguments == ():
        return OrderedDict()
    if name == _SIZE:
        return _sizes(first)
    if name == _PARAMETER and type(first) is StoredTensor:
        return first
    if name == _TENSOR and type(first) is Storage:
        offset, shape, strides = arguments[1:4]
        tensor = StoredTensor(first, *_sizes((offset,)), _sizes(shape), _sizes(strides))
        if len(tensor.shape) == len(tensor.strides):
            return tensor
    raise UserError(f"the pickle calls {name} in an unusual way; {REFUSED}")


def _sizes(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or not all(type(value) is int and value >= 0 for value in values):
        raise UserError(f"a size, stride or offset that is no number from 0 up; {AGAIN}")
    return values
