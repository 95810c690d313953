"""What MindSpore itself says about each operator on Ascend, and the table of it in docs/ascend.md.

`python -m tests.ascend.operators` compiles the graphs and writes the table anew.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from tests.ascend.graphs import ROOT, Graph, compile_graphs

PAGE = ROOT / "docs/ascend.md"
TABLE = re.compile(r"(<!-- operators -->\n)(.*?)(<!-- /operators -->)", re.S)

# The graph's own words: MindSpore's compiler resolves them, no device sees a kernel of theirs.
STRUCTURAL = {
    "Return": "ends a graph",
    "MakeTuple": "groups values",
    "TupleGetItem": "takes a value out of a group",
    "Depend": "orders two calculations",
    "UpdateState": "orders side effects",
    "Load": "reads a parameter at a point in that order",
}

# Undocumented and in no table of the wheel: their adapters to Ascend's operators in MindSpore's
# source, mindspore/ccsrc/plugin/res_manager/ascend/op_adapter/op_declare (REG_ADPT_DESC).
ADAPTERS = {
    "BatchNormGrad": "nn_batch_norm_ops_declare.cc",
    "Conv2DBackpropFilter": "nn_calculation_ops_declare.cc",
    "Conv2DBackpropInput": "nn_calculation_ops_declare.cc",
    "LayerNormGrad": "nn_norm_ops_declare.cc",
    "TensorMove": "elewise_calculation_ops_declare.cc",
}

_PLATFORMS = re.compile(r"Supported Platforms:\s*\n\s*(.*)")
_REFERENCE = re.compile(r"\b((?:ops|mint)(?:\.\w+)*\.\w+)[`(]")


def evidence(primitive: str) -> str | None:
    """Why this primitive works on Ascend, or None where nothing says so."""
    documented = _documentation(primitive)
    if documented is not None:
        where, platforms = documented
        return f"documentation of `{where}`" if "Ascend" in platforms else None
    if primitive in _aclnn_kernels():
        return "aclnn kernel in `libmindspore_ops_ascend.so`"
    if primitive in _registered():
        return f"{_registered()[primitive]} kernel in `op_info.config`"
    if primitive in ADAPTERS:
        return f"adapter in MindSpore's `{ADAPTERS[primitive]}`"
    return None


def _documentation(primitive: str) -> tuple[str, str] | None:
    """Where a primitive's platforms are documented, in its class or the function that it names."""
    for name in ("operations", "auto_generate", "operations._grad_ops", "operations._inner_ops"):
        module = importlib.import_module(f"mindspore.ops.{name}")
        text = getattr(module, primitive).__doc__ if hasattr(module, primitive) else None
        found = _PLATFORMS.search(text or "")
        if found and found[1] == "Deprecated":
            continue
        if found:
            return f"ops.{primitive}", found[1]
        for function in _REFERENCE.findall(text or ""):
            found = _PLATFORMS.search(_resolve(function).__doc__ or "")
            if found:
                return function, found[1]
    return None


def _resolve(path: str) -> object:
    """A function of MindSpore by its name, such as ops.relu; None where there is none."""
    import mindspore

    return functools.reduce(lambda o, name: getattr(o, name, None), path.split("."), mindspore)


def _installed(path: str) -> Path:
    import mindspore

    return Path(mindspore.__file__).parent / path


@functools.cache
def _aclnn_kernels() -> frozenset[str]:
    """Names with an Ascend class in the plugin that every wheel carries, from its symbols."""
    symbol = re.compile(rb"N9mindspore6kernel\d+[a-z][a-z\d_]*?\d+([A-Z][A-Za-z\d]*?)AscendE")
    library = _installed("lib/plugin/libmindspore_ops_ascend.so").read_bytes()
    return frozenset(name.decode() for name in symbol.findall(library))


@functools.cache
def _registered() -> dict[str, str]:
    """Names in the wheel's register of kernels for Ascend's AI cores (AKG) and its AI CPUs."""
    kinds = {}
    for line in _installed("config/op_info.config").read_text().splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            kind = entry["imply_type"]
            if kind == "AiCPU" or (kind, entry.get("processor")) == ("AKG", "AiCore"):
                kinds[entry["op_name"]] = kind
    return kinds


def unsupported(primitives: Iterable[str]) -> list[str]:
    """Those of the primitives that nothing shows to work on Ascend."""
    return sorted(p for p in primitives if p not in STRUCTURAL and evidence(p) is None)


def table(graphs: dict[str, Graph]) -> str:
    """The audit as Markdown: a row for each primitive."""
    rows = ["| primitive | in | supported according to |", "|---|---|---|"]
    for primitive in sorted({p for graph in graphs.values() for p in graph.primitives}):
        users = [name for name, graph in graphs.items() if primitive in graph.primitives]
        where = "all" if len(users) == len(graphs) else ", ".join(users)
        why = STRUCTURAL.get(primitive)
        why = f"no kernel: {why}" if why else evidence(primitive) or "**nothing**"
        rows.append(f"| {primitive} | {where} | {why} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write the table into docs/ascend.md."""
    page = PAGE.read_text()
    text = table(compile_graphs())
    PAGE.write_text(TABLE.sub(lambda found: found[1] + text + found[3], page))


if __name__ == "__main__":
    main()
