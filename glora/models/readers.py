"""Modules that read the weight of a layer without calling it: an adapter there has no effect, until it is merged.

PyTorch's own are known by type. Others are found by their source: ``forward``, or a method that it calls, has an
expression such as ``F.linear(x, self.qkv.weight)``.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from torch import nn

from ..arguments import listed

# Functions that multiply by a weight, by the last part of their name.
_PRODUCTS = {"linear", "matmul", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "tensordot", "conv1d", "conv2d"}
# Attributes that read only the form of a weight.
_FORM = {"dtype", "device", "shape", "ndim"}


def read_by_torch(modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """The layers that a module of PyTorch's own reads, and which module does."""
    read: dict[nn.Module, str] = {}
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):
            read |= {module.linear1: "an nn.TransformerEncoderLayer", module.linear2: "an nn.TransformerEncoderLayer"}
        elif isinstance(module, nn.MultiheadAttention):
            read[module.out_proj] = "an nn.MultiheadAttention"
    return read


def read_by_others(modules: Iterable[nn.Module], always: bool) -> dict[nn.Module, str]:
    """The modules whose weight the source of another module reads, and the type of that other module.

    Args:
        always: True for modules that it only reads; False for modules that it also calls, in another branch.
    """
    read: dict[nn.Module, str] = {}
    for module in modules:
        for name, called in _weights_read(type(module)).items():  # type: ignore[arg-type]
            try:
                layer = module.get_submodule(name)
            except AttributeError:
                continue  # this instance has no such child
            if called is not always:
                read[layer] = type(module).__name__
    return read


@cache
def _weights_read(kind: type[nn.Module]) -> dict[str, bool]:
    """Children whose ``weight`` is a factor in ``forward`` or a method that it calls, by name. The value says whether
    the child may be called as well: more is done with it than reading an attribute."""
    if kind.__module__.startswith(("torch.", "glora.")):
        return {}
    read: set[str] = set()
    used: set[str] = set()
    methods, seen = ["forward"], set()
    while methods:
        method = methods.pop()
        if method in seen:
            continue
        seen.add(method)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, method))))
        except (AttributeError, OSError, SyntaxError, TypeError):  # a module, or without a source
            continue
        for node in ast.walk(tree):
            factors = _factors(node)
            read |= {name.removesuffix(".weight") for part in factors for name in _of_self(part) if ".weight" in name}
        names = list(_of_self(tree))
        methods += [name for name in names if "." not in name]
        used |= {name for name in names if name.rpartition(".")[2] not in ("weight", "bias")}
    return {name: any(name == other or name.startswith(f"{other}.") for other in used) for name in read}


def _factors(node: ast.AST) -> list[ast.expr]:
    """The factors of the product that ``node`` is, if it is one."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return [node.left, node.right]
    if isinstance(node, ast.Call):
        function = getattr(node.func, "attr", getattr(node.func, "id", None))
        return [*node.args, *(keyword.value for keyword in node.keywords)] if function in _PRODUCTS else []
    return []


def _of_self(tree: ast.AST) -> Iterator[str]:
    """The full dotted names after ``self.``, except those that read only the form of a tensor."""
    todo = [tree]
    while todo:
        node = todo.pop()
        names: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name) and inner.id == "self":
            if "weight" in names:  # after it: a method of the tensor, or its form
                names, beyond = names[: names.index("weight") + 1], names[names.index("weight") + 1 :]
                if beyond and beyond[-1] in _FORM:
                    continue
            yield ".".join(names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("to", "type_as", "view_as"):
            todo.append(node.func)  # its arguments give only a form
        else:
            todo.extend(ast.iter_child_nodes(node))


def warn_of_readers(model: nn.Module, names: Mapping[nn.Module, str]) -> None:
    """Warn of the adapted layers in ``names`` whose weight another module of ``model`` reads in some branch."""
    read = {**read_by_others(model.modules(), always=False), **read_by_others(model.modules(), always=True)}
    found: dict[str, list[str]] = {}
    for module, reader in read.items():
        if module in names:
            found.setdefault(reader, []).append(names[module])
    for reader, layers in found.items():
        warnings.warn(
            f"model: {reader} reads the weight of {listed(layers)} without a call, in some branch at least: there "
            "GLoRA has no effect before it is merged. glora.train names layers that did not run; exclude these",
            stacklevel=4,
        )
