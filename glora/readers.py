"""Modules that read the weight of a layer without calling it: an adapter there has no effect, until it is merged.

PyTorch's own are known by type. Of others the source tells: a ``forward``, or a method that it calls, with an
expression such as ``F.linear(x, self.qkv.weight)``.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache

from torch import nn

from .modules import listed

# ``self.<name>.weight``, where more is asked for than the form of it.
_READ = re.compile(
    r"(?<!isinstance\()(?<!hasattr\()\bself\.(\w+(?:\.\w+)*)\.weight\b"
    r"(?!\.(?:dtype|device|shape|size|ndim|dim|numel|requires_grad|is_\w+|element_size)\b)(?!\s+is\b)(?!\s*=[^=])"
)
_CALLED = re.compile(r"\bself\.(\w+(?:\.\w+)*)\(")


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
    """The modules whose weight another module reads by its source, and the type of that one.

    Args:
        always: True for those that it only reads; False for those that it calls as well, in another branch.
    """
    read: dict[nn.Module, str] = {}
    for module in modules:
        for name, called in _weights_read(type(module)).items():  # type: ignore[arg-type]
            try:
                layer = module.get_submodule(name)
            except AttributeError:
                continue  # this one has none
            if called is not always:
                read[layer] = type(module).__name__
    return read


@cache
def _weights_read(kind: type[nn.Module]) -> dict[str, bool]:
    """The names whose ``weight`` is read by ``forward`` or methods that it calls; whether these are called too."""
    if kind.__module__.startswith(("torch.", "glora.")):
        return {}
    read: set[str] = set()
    seen: set[str] = set()
    called = ["forward"]
    while set(called) - seen:
        method = next(name for name in called if name not in seen)
        seen.add(method)
        try:
            source = re.sub(r"#.*", "", inspect.getsource(getattr(kind, method)))
        except (AttributeError, OSError, TypeError):  # a module, or not written in Python, or typed in by hand
            continue
        read |= set(_READ.findall(source))
        called += _CALLED.findall(source)
    return {name: name in called for name in read}


def warn_of_readers(action: str, model: nn.Module, names: Mapping[nn.Module, str]) -> None:
    """Name those of ``names``, adapted layers, whose weight another module of ``model`` reads in some branch."""
    read = {**read_by_others(model.modules(), always=False), **read_by_others(model.modules(), always=True)}
    found: dict[str, list[str]] = {}
    for module, reader in read.items():
        if module in names:
            found.setdefault(reader, []).append(names[module])
    for reader, layers in found.items():
        warnings.warn(
            f"{action}: {reader} reads the weight of {listed(layers)} without a call, in some branch at least: there "
            "GLoRA has no effect before it is merged. glora.train names layers that did not run; exclude these",
            stacklevel=4,
        )
