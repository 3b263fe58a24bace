"""Which layer adapts which module: by exact type, since a subclass may compute something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .base import GLoRALayer
from .conv1d import GLoRAConv1D
from .conv2d import GLoRAConv2d
from .linear import GLoRALinear
from .packages import loaded
from .plain import qualified_name
from .quantised import GLoRAQuantisedLinear
from .quantised_formats import is_quantised, layer_types


class Adapter(NamedTuple):
    """How modules of one type are adapted.

    Attributes:
        make: turns ``(module, rank, product)`` into the adapted layer.
        features: the module's N and K.
    """

    make: Callable[[Any, int, str], GLoRALayer]
    features: Callable[[Any], tuple[int, int]]


def _linear(linear: nn.Linear, rank: int, product: str) -> GLoRALinear:
    """torchao puts a quantised weight into a layer whose type stays ``nn.Linear``."""
    kind = GLoRAQuantisedLinear if is_quantised(linear) else GLoRALinear
    return kind.from_linear(linear, rank, product)


def adapters() -> dict[type[nn.Module], Adapter]:
    """Every type of module that can be adapted, without those of packages that are not loaded: no model has them."""
    table: dict[type[nn.Module], Adapter] = {
        nn.Linear: Adapter(_linear, GLoRALinear.features),
        nn.Conv2d: Adapter(GLoRAConv2d.from_conv2d, GLoRAConv2d.features),
    }
    conv1d = loaded("transformers.pytorch_utils", "Conv1D")
    if conv1d is not None:
        table[conv1d] = Adapter(GLoRAConv1D.from_conv1d, GLoRAConv1D.features)
    quantised = Adapter(GLoRAQuantisedLinear.from_linear, GLoRAQuantisedLinear.features)
    return {**table, **dict.fromkeys(layer_types(), quantised)}


def adapted(module: nn.Module, rank: int, product: str) -> GLoRALayer:
    """The layer around ``module``; ``rank`` and ``product`` as for :func:`glora.inject`.

    Raises:
        TypeError: no layer adapts modules of its type, or it has hooks, pruning or weight norm.
    """
    table = adapters()
    if type(module) not in table:
        bases = [kind for kind in table if isinstance(module, kind)] or list(table)
        names = " or ".join(qualified_name(kind) for kind in bases)
        raise TypeError(f"module: expected exactly {names}, got {qualified_name(type(module))}")
    return table[type(module)].make(module, rank, product)
