"""Classify the globals in an untrusted pickle: objects to skip, or signs of an attack.

Neither kind is ever imported or called. The distinction informs the user: many checkpoints contain
an argparse.Namespace beside their weights, but one that contains os.system is an attack.

From the standard library, only a list of data types is accepted. From other packages every name is
accepted, because projects store their own classes, except those that load, run or open something.
"""

from __future__ import annotations

import builtins
import re
import sys
import sysconfig
from pathlib import Path


def _is_exception(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def _standard_library() -> frozenset[str]:
    names = getattr(sys, "stdlib_module_names", None)
    if names is None:  # Python 3.9
        folder = Path(sysconfig.get_path("stdlib"))
        files = [*folder.iterdir(), *folder.glob("lib-dynload/*")]
        names = {*sys.builtin_module_names, *(file.name.partition(".")[0] for file in files)}
        names -= {"site-packages", "__pycache__", "test"}
    python2 = {"__builtin__", "commands", "copy_reg", "imp", "popen2", "urllib2", "new"}
    return frozenset(names) | python2 | {"nt", "posix", "distutils", "asyncore", "pipes"}


_STANDARD_LIBRARY = _standard_library()
_DATA_MODULES = {"collections", "datetime", "decimal", "fractions", "pathlib", "uuid", "zoneinfo"}
_DATA_MODULES |= {"typing", "enum", "ipaddress", "_decimal", "_datetime", "_collections"}
_DATA_MODULES |= {"collections.abc", "_collections_abc", "itertools"}
_DATA_NAMES = {
    "argparse.Namespace", "optparse.Values", "types.SimpleNamespace", "time.struct_time",
    "_codecs.encode", "re._compile", "random.Random", "array.array",
    "array._array_reconstructor", "functools.partial", "_functools.partial",
    "inspect._empty", "logging.getLogger", "copyreg._reconstructor", "copyreg.__newobj__",
    "copyreg.__newobj_ex__", "copy_reg._reconstructor", "configparser.ConfigParser",
    "string.Template", "dataclasses._MISSING_TYPE", "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath", "pathlib._local.Path", "pathlib._local.PurePosixPath",
    "zoneinfo.ZoneInfo._unpickle", "platform.uname_result", "posix.uname_result",
    "nt.uname_result", "os.stat_result", "os.terminal_size", "subprocess.CompletedProcess",
    "commands.CompletedProcess", "types.GenericAlias", "types.UnionType", "types.NoneType",
    "_operator.getitem", "operator.getitem", "operator.itemgetter", "_io.BytesIO", "_io.StringIO",
    "signal.Signals", "http.HTTPStatus", "inspect.Parameter", "inspect._ParameterKind",
    "inspect.Signature",
}  # fmt: skip
_BUILTINS = {
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "long",
    "object", "range", "set", "slice", "str", "tuple", "unicode", "xrange", "NoneType",
    "Ellipsis", "NotImplemented", "type", "abs", "all", "any", "len", "max", "min", "round",
    "sorted", "sum",
}  # fmt: skip
_BUILTINS |= {name for name, kind in vars(builtins).items() if _is_exception(kind)}
_BUILTIN_MODULES = ("builtins", "__builtin__")
_RUNNING_MODULES = re.compile(
    r"(pip|setuptools|pkg_resources|dill|cloudpickle|joblib|IPython|cffi|requests|urllib3|"
    r"paramiko|fabric|pexpect|sh|execnet|"
    r"numpy\.(testing|f2py|distutils|ctypeslib|lib\.npyio|lib\.format)|"
    r"torch\.(hub|jit|package|ops|classes|_inductor|_dynamo|distributed\.rpc|"
    r"utils\.(cpp_extension|model_zoo|data\.datapipes))|torchvision\.datasets|mindspore\.hub)(\.|$)"
)
_RUNNING_NAMES = {
    "system", "popen", "popen2", "popen3", "popen4", "exec", "execfile", "eval", "literaleval",
    "compile", "getattr", "setattr", "delattr", "getattribute", "globals", "subclasses", "import",
    "importmodule", "loadmodule", "load", "loads", "loadlibrary", "open", "run", "runpath",
    "runmodule", "runcode", "runstring", "runpy", "call", "checkcall", "checkoutput", "spawn",
    "execv", "execve", "startfile", "unlink", "remove", "rmtree", "rmdir", "rename", "readpickle",
    "memmap", "fromfile", "readtext", "readbytes", "writetext", "writebytes", "attrgetter",
    "methodcaller", "makefunction", "makeskelfunction", "loadfrombytes", "urlopen",
    "urlretrieve", "download", "builtins",
}  # fmt: skip


def is_attack(module: str, name: str) -> bool:
    """Return whether only an attack would put this global into a checkpoint.

    Args:
        module: the global's module.
        name: its name in the module, possibly dotted.
    """
    full, root = f"{module}.{name}", module.partition(".")[0]
    if module in _BUILTIN_MODULES:
        return name not in _BUILTINS
    if root in _STANDARD_LIBRARY:
        return full not in _DATA_NAMES and (module not in _DATA_MODULES or "." in name)
    if _RUNNING_MODULES.match(full):
        return True
    return any(word.replace("_", "") in _RUNNING_NAMES for word in name.split("."))
