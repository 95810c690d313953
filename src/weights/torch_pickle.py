"""Interpret the pickles inside PyTorch's files without running any code from them.

A pickle is a program. Python's Unpickler is unsafe on an untrusted file even with a strict
`find_class`: BUILD modifies whatever that returns, one opcode can request a memo of 32 GB, and the
hash of a deeply nested tuple overflows C's stack. This module therefore interprets the opcodes
itself and keeps globals as names. It implements `collections.OrderedDict`, `torch.Size`, the
storage types and the functions that rebuild tensors and parameters. Any other object (Namespace,
NumPy scalars, a project's own classes) becomes a `Foreign`, an empty placeholder.
`pickle_globals.is_attack` decides which globals are rejected.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from src.errors import UserError
from src.weights.content import AGAIN, short
from src.weights.pickle_globals import is_attack

# NumPy has no bfloat16: its 16 bits are read as integers and widened later.
_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = ("<f8", "<f4", "<f2", "<u2", "<i8", "<i4", "<i2", "i1", "u1", "?")
_STORAGES = {f"torch.{kind}Storage": dtype for kind, dtype in zip(_KINDS, _DTYPES)}
# Read so that a message can name them: no network takes complex or quantized numbers or FLOAT8.
FLOAT8 = "V1"
_STORAGES |= {"torch.ComplexFloatStorage": "<c8", "torch.ComplexDoubleStorage": "<c16"}
_STORAGES |= {"torch.QInt8Storage": "i1", "torch.QUInt8Storage": "u1", "torch.QInt32Storage": "<i4"}
_UNTYPED = "torch.storage.UntypedStorage"  # bytes of _REBUILD_UNTYPED
BFLOAT16 = "<u2"
_REBUILD_UNTYPED = "torch._utils._rebuild_tensor_v3"  # the seventh argument is the type
_TENSORS = (
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_qtensor",
    _REBUILD_UNTYPED,
    "torch_npu.utils.storage._rebuild_npu_tensor",  # Ascend's; the last argument is a format
)
# Their first argument is the tensor; the third is for XLA and other devices without storages.
_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
)
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_ORDERED_DICT, _SIZE = "collections.OrderedDict", "torch.Size"
_GETATTR = ("builtins.getattr", "__builtin__.getattr")
_FUNCTIONS = {*_TENSORS, *_PARAMETERS, _SUBCLASS, _SIZE, *_GETATTR}
_MEANINGFUL = {*_STORAGES, *_FUNCTIONS, _ORDERED_DICT}

# Limits on the work that a malicious pickle can cause. CvT-W24's weights with their average and
# AdamW's state take 0.5 MB and 120,000 opcodes.
_MAX_OPCODES, _MAX_LINE, _MAX_DIMS, _MAX_REFERENCE = 400_000, 4096, 64, 8

REFUSED = (
    "only tensors and plain containers are read, and no code is run; if you trust the source, "
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
    """A tensor that has not been read yet: a view of a storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)


class _Global(str):
    """The name of a global in the pickle; the global itself is never imported."""

    module: str


class Foreign(dict):
    """Placeholder for an object of an unknown class; keeps only the items of a mapping.

    Attributes:
        kind: the class or function that made it, if known.
    """

    def __init__(self, kind: _Global | None = None) -> None:
        self.kind = kind


class Stream(io.BytesIO):
    """The bytes of pickles, with a limit on text lines: parsing a decimal takes quadratic time."""

    def readline(self, size: int = -1) -> bytes:
        return super().readline(_MAX_LINE)


class Interpreter:
    """Interprets consecutive pickles.

    Attributes:
        storages: the storages that the pickles refer to, by key.
        foreign: the names of skipped objects, in order.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self.foreign: dict[str, None] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[str, Any] = {}
        self._cost = 0

    def unpickle(self, stream: Stream) -> Any:
        """Interpret the stream's next pickle and return its value.

        Raises:
            UserError: it is damaged, an attack, or of another format.
        """
        self._stack, self._marks, self._memo, self._cost = [], [], {}, 0
        for opcode, arg, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self._stack[-1]
            self._charge(1)
            handle = _HANDLERS.get(opcode.name)
            if handle is None:
                text = f"{opcode.name} {short(arg)}" if isinstance(arg, str) else opcode.name
                raise UserError(f"the pickle uses the opcode {text}; {REFUSED}")
            handle(self, arg)
        raise UserError(f"its pickle does not end; {AGAIN}")

    def _charge(self, cost: int) -> None:
        """Count work in opcodes, among them what an opcode copies."""
        self._cost += cost
        if self._cost > _MAX_OPCODES:
            raise UserError(f"its pickle takes the work of {_MAX_OPCODES} opcodes; {REFUSED}")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def ignore(self, arg: Any) -> None:
        """Ignore the protocol's number or a frame's length."""

    def pop(self, arg: Any) -> None:
        # If nothing was pushed since the last mark, POP removes the mark.
        if self._stack:
            self._stack.pop()
        else:
            self._stack = self._marks.pop()

    def duplicate(self, arg: Any) -> None:
        self._stack.append(self._stack[-1])

    def mark(self, arg: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def items_since_mark(self, arg: Any = None) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def remember(self, arg: int | None) -> None:
        # The key is text because its hash is randomised: an attacker cannot cause collisions.
        self._memo[str(len(self._memo) if arg is None else arg)] = self._stack[-1]

    def recall(self, arg: int) -> None:
        self._stack.append(self._memo[str(arg)])

    def tuple_of(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def tuple_since_mark(self, arg: Any) -> None:
        items = self.items_since_mark()
        self._stack.append(tuple(items))

    def list_since_mark(self, arg: Any) -> None:
        items = self.items_since_mark()
        self._stack.append(items)

    def dict_since_mark(self, arg: Any) -> None:
        items = self.items_since_mark()
        self._stack.append({})
        _fill(self._stack[-1], items)

    def fill_since_mark(self, arg: Any) -> None:
        items = self.items_since_mark()
        _fill(self._stack[-1], items)

    def fill_one(self, arg: Any) -> None:
        item = self._stack.pop()
        _fill(self._stack[-1], [item])

    def fill_pair(self, arg: Any) -> None:
        pair, self._stack[-2:] = self._stack[-2:], []
        _fill(self._stack[-1], pair)

    def global_name(self, arg: str) -> None:
        self._stack.append(self._admit(*arg.split(" ", 1)))

    def global_from_stack(self, arg: Any) -> None:
        module, name = self._stack[-2:]
        if type(module) is not str or type(name) is not str:
            raise UserError(f"the pickle names a global by something other than text; {REFUSED}")
        self._stack[-2:] = [self._admit(module, name)]

    def instance_since_mark(self, arg: str | None) -> None:
        """Handle INST and OBJ: the class is the opcode's argument or the first item since MARK."""
        items = self.items_since_mark()
        self._stack.append(_instance(items[0] if arg is None else self._admit(*arg.split(" ", 1))))

    def instance(self, arg: Any) -> None:
        self._stack[-2:] = [_instance(self._stack[-2])]

    def instance_with_keywords(self, arg: Any) -> None:
        self._stack[-3:] = [_instance(self._stack[-3])]

    def storage(self, arg: Any) -> None:
        self._stack.append(_storage(self._stack.pop(), self.storages))

    def call(self, arg: Any) -> None:
        target, arguments = self._stack[-2:]
        if type(target) is _Global and target in _GETATTR:
            self._stack[-2:] = [self._attribute(target, arguments)]
            return
        if target == _ORDERED_DICT and type(arguments) is tuple and arguments:
            self._charge(len(arguments[0]) if type(arguments[0]) is list else 0)  # it is copied
        self._stack[-2:] = [_call(target, arguments)]

    def _attribute(self, target: _Global, arguments: Any) -> _Global:
        """Handle getattr, which names nested classes (protocols before 4) and methods (all).

        Returns:
            The attribute, judged as a global of that dotted name.
        """
        owner, name = arguments if type(arguments) is tuple and len(arguments) == 2 else (None, "")
        owner = owner.kind if type(owner) is Foreign else owner
        if type(owner) is not _Global or type(name) is not str or len(name) > _MAX_LINE:
            raise UserError(f"the pickle requests {target}; {REFUSED}")
        self._charge((len(owner) + len(name)) // 16)  # a few bytes of the pickle may repeat it
        return self._admit(owner.module, f"{owner[len(owner.module) + 1 :]}.{name}")

    def build(self, arg: Any) -> None:
        # Discards a state_dict's `_metadata` and the state of skipped objects: neither has weights.
        if type(self._stack[-2]) not in (OrderedDict, Foreign):
            raise UserError(f"the pickle sets the state of an object without state; {REFUSED}")
        self._stack.pop()

    def _admit(self, module: str, name: str) -> _Global:
        full = f"{module}.{name}"
        if full not in _MEANINGFUL:
            if len(full) > _MAX_LINE or is_attack(module, name):
                raise UserError(f"the pickle requests {short(full)}; {REFUSED}")
            self.foreign[full] = None
        known = _Global(full)
        known.module = module
        return known


_Handler = Callable[[Interpreter, Any], None]
_HANDLERS: dict[str, _Handler] = dict.fromkeys(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
        "BINBYTES", "SHORT_BINBYTES", "BYTEARRAY8",
    ),
    Interpreter.push,
)  # fmt: skip
_HANDLERS |= {
    "NONE": lambda self, _: self.push(None),
    "NEWTRUE": lambda self, _: self.push(True),
    "NEWFALSE": lambda self, _: self.push(False),
    "EMPTY_TUPLE": lambda self, _: self.push(()),
    "EMPTY_LIST": lambda self, _: self.push([]),
    "EMPTY_SET": lambda self, _: self.push([]),  # a list, so that no item is hashed
    "EMPTY_DICT": lambda self, _: self.push({}),
    "TUPLE1": lambda self, _: self.tuple_of(1),
    "TUPLE2": lambda self, _: self.tuple_of(2),
    "TUPLE3": lambda self, _: self.tuple_of(3),
    "TUPLE": Interpreter.tuple_since_mark,
    "LIST": Interpreter.list_since_mark,
    "FROZENSET": Interpreter.list_since_mark,
    "DICT": Interpreter.dict_since_mark,
    "APPEND": Interpreter.fill_one,
    "SETITEM": Interpreter.fill_pair,
    "MARK": Interpreter.mark,
    "POP": Interpreter.pop,
    "POP_MARK": Interpreter.items_since_mark,
    "DUP": Interpreter.duplicate,
    "GLOBAL": Interpreter.global_name,
    "STACK_GLOBAL": Interpreter.global_from_stack,
    "NEWOBJ": Interpreter.instance,
    "NEWOBJ_EX": Interpreter.instance_with_keywords,
    "BINPERSID": Interpreter.storage,
    "REDUCE": Interpreter.call,
    "BUILD": Interpreter.build,
}
_HANDLERS |= dict.fromkeys(("APPENDS", "ADDITEMS", "SETITEMS"), Interpreter.fill_since_mark)
_HANDLERS |= dict.fromkeys(("INST", "OBJ"), Interpreter.instance_since_mark)
_HANDLERS |= dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Interpreter.remember)
_HANDLERS |= dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Interpreter.recall)
_HANDLERS |= dict.fromkeys(("PROTO", "FRAME"), Interpreter.ignore)


def _storage(reference: Any, storages: dict[str, Storage]) -> Storage | Foreign:
    if type(reference) is not tuple or not 5 <= len(reference) <= _MAX_REFERENCE:
        reference = (None,) * 5
    tag, kind, key, _, numel, *part = reference
    # Before PyTorch 0.4, a sixth item could make the storage a view of another one.
    known = tag == "storage" and type(kind) is _Global and not any(part)
    if not known or type(key) is not str or kind in (*_FUNCTIONS, _ORDERED_DICT):
        raise UserError(f"the pickle refers to something other than a storage; {REFUSED}")
    dtype = FLOAT8 if kind == _UNTYPED else _STORAGES.get(kind)
    if dtype is None:
        return Foreign()
    new = Storage(key, dtype, *_sizes((numel,)))
    if storages.setdefault(key, new) != new:
        raise UserError(f"storage {short(key)} is described in two ways; {AGAIN}")
    return new


def _fill(container: Any, items: list[Any]) -> None:
    if type(container) is list:
        container.extend(items)
        return
    if not isinstance(container, dict):
        raise UserError(f"the pickle fills a container in an unusual way; {REFUSED}")
    if type(container) is Foreign and len(items) % 2:
        return  # items of a list or set of an unknown class
    if len(items) % 2:
        raise UserError(f"the pickle fills a container in an unusual way; {REFUSED}")
    container.update(zip(map(_key, items[::2]), items[1::2]))


def _key(key: Any) -> str:
    """Return a dict key as text, because hashing tuples can recurse and integers can collide."""
    if type(key) is str:
        return key
    plain = key is None or type(key) in (bool, float) or type(key) is int and abs(key) < 1 << 63
    return str(key) if plain else f"<{type(key).__name__.strip('_').lower()}>"


def _instance(kind: Any) -> Any:
    """Return an instance of a class that the pickle names."""
    if type(kind) is not _Global or kind in _FUNCTIONS or kind in _STORAGES:
        raise UserError(f"the pickle instantiates something other than a class; {REFUSED}")
    return OrderedDict() if kind == _ORDERED_DICT else Foreign(kind)


def _call(target: Any, arguments: Any) -> Any:
    """Return the result of calling an admitted global."""
    name = target if type(target) is _Global else "something"
    first = arguments[0] if type(arguments) is tuple and arguments else None
    if name == _ORDERED_DICT and arguments == ():
        return OrderedDict()
    if name == _ORDERED_DICT and type(first) is list and len(arguments) == 1:  # Python 2
        return OrderedDict((_key(key), value) for key, value in first)
    if name == _SIZE:
        return _sizes(first)
    if name in _PARAMETERS and type(first) in (StoredTensor, Foreign):
        return first
    if name == _SUBCLASS and type(first) is _Global and len(arguments) > 2:
        return _call(first, arguments[2]) if first in _TENSORS else Foreign()
    if name == _REBUILD_UNTYPED and len(arguments) > 6:
        if not str(arguments[6]).startswith("torch.float8_"):
            return Foreign()
        arguments = arguments[:6]
    if name in _TENSORS and type(first) is Foreign:
        return first
    if name in _TENSORS and type(first) is Storage:
        offset, shape, strides = arguments[1:4]
        if any(type(each) is dict and each for each in arguments[6:]):  # such as {"neg": True}
            raise UserError(f"the pickle calls {name} with attributes of the tensor; {REFUSED}")
        tensor = StoredTensor(first, *_sizes((offset,)), _sizes(shape), _sizes(strides))
        if len(tensor.shape) == len(tensor.strides):
            return tensor
    if type(target) is _Global and name not in _MEANINGFUL:
        return Foreign(target)
    raise UserError(f"the pickle calls {name} in an unusual way; {REFUSED}")


def _sizes(values: Any) -> tuple[int, ...]:
    if (
        type(values) is not tuple
        or len(values) > _MAX_DIMS
        or not all(type(value) is int and value >= 0 for value in values)
    ):
        raise UserError(f"a size, stride or offset is not a whole number from 0 up; {AGAIN}")
    return values
