"""PEFT's GLoRA and HiRA layers with our operator as their forward.

Nothing is added to a layer: exchanging its class is all that accelerates it, so that parameters, state
dicts, hooks and every other method stay PEFT's. Importing this loads PEFT.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, ClassVar

from peft.tuners.glora.layer import GloraEmptyPath, GloraLinear, GloraLoraPath, GloraScalarPath, GloraVectorPath
from peft.tuners.hira.layer import Linear as HiraLinear
from torch import Tensor, nn

from glora_kernels import Constant, LowRank, Terms, Vector, glora_linear
from glora_kernels.checks import FLOATING
from glora_kernels.terms import SLOTS

from ..layers.plain import is_bare, qualified_name

TERMS = {
    GloraLoraPath: lambda path: LowRank(path.Xd, path.Xu),
    GloraVectorPath: lambda path: Vector(path.X),
    GloraScalarPath: lambda path: Constant(path.X),
    GloraEmptyPath: lambda path: None,
}


class AcceleratedLayer:
    """What both kinds have in common: every call asks again whether the operator may serve it."""

    original: ClassVar[type[nn.Module]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., K) -> (..., N)``; by PEFT's own forward where :meth:`served_terms` gives no terms."""
        terms = None if args or kwargs else self.served_terms()
        if not isinstance(terms, Terms):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base = self.base_layer  # type: ignore[attr-defined]
        return glora_linear(x, base.weight, base.bias, terms)

    def served_terms(self) -> Terms | str:
        """What the active adapter adds, or why PEFT's forward has to serve this layer as it is now."""
        layer: Any = self
        if layer.disable_adapters:
            return "its adapters are disabled"
        if layer.merged:
            return "its adapters are merged"
        active = [adapter for adapter in layer.active_adapters if adapter in self.adapters]
        if len(active) != 1:
            return f"{len(active)} of its adapters are active, not one"
        unfit = _unfit_base(layer.base_layer)
        terms = self.terms_of(active[0]) if unfit is None else unfit
        if isinstance(terms, Terms) and any(s.device != layer.base_layer.weight.device for s in terms.flatten()[0]):
            return "its adapter is not on the device of its weight"
        return terms

    @property
    def adapters(self) -> Container[str]:
        """The names of the adapters that this layer has."""
        raise NotImplementedError

    def terms_of(self, adapter: str) -> Terms | str:
        """The tensors of one adapter, or why the operator cannot do with them what PEFT does."""
        raise NotImplementedError


class AcceleratedGlora(AcceleratedLayer, GloraLinear):
    """``y = (W0 + W0*A + B) x + W0 c + b0*D + E + b0``."""

    original = GloraLinear

    @property
    def adapters(self) -> Container[str]:
        return self.glora_A

    def terms_of(self, adapter: str) -> Terms | str:
        terms: dict[str, Any] = {}
        for slot in SLOTS:
            path = getattr(self, f"glora_{slot}")[adapter]
            if type(path) not in TERMS or not is_bare(path):
                return f"its {slot} is a changed {qualified_name(type(path))}"
            terms[slot] = TERMS[type(path)](path)
        return Terms(**terms)


class AcceleratedHira(AcceleratedLayer, HiraLinear):
    """``y = (W0 + W0 * BA) x + b0``, with B and A as HiRA calls them: the low rank A of GLoRA alone."""

    original = HiraLinear

    @property
    def adapters(self) -> Container[str]:
        return self.hira_A

    def terms_of(self, adapter: str) -> Terms | str:
        dropout = self.hira_dropout[adapter]
        inactive = type(dropout) is nn.Dropout and not (dropout.training and dropout.p)
        if type(dropout) is not nn.Identity and not inactive:
            return "its dropout is active"
        return Terms(A=LowRank(self.hira_B[adapter], self.hira_A[adapter]))


ACCELERATED: dict[type[nn.Module], type[Any]] = {GloraLinear: AcceleratedGlora, HiraLinear: AcceleratedHira}


def _unfit_base(base: nn.Module) -> str | None:
    """Why the base layer is more than ``W0 x + b0`` with W0 and b0 frozen, if it is."""
    if type(base) is not nn.Linear:
        return f"its base layer is {qualified_name(type(base))}, not torch.nn.Linear"
    if not is_bare(base):
        return "its base layer has hooks, pruning or weight norm"
    if type(base.weight) is not nn.Parameter or base.weight.dtype not in FLOATING:
        return f"its weight is {qualified_name(type(base.weight))} of {base.weight.dtype}"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "its base layer is trained"
    return None
