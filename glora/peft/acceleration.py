"""PEFT's GLoRA and HiRA at the cost of ours, in place and reversibly."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.plain import qualified_name


class Acceleration:
    """An accelerated model, and the way back; made by :func:`accelerate`.

    As a context manager it restores, at the end of the ``with`` block, the former forward of the layers that
    :func:`accelerate` changed.
    """

    def __init__(self, model: nn.Module, changed: list[nn.Module]):
        self._model, self._changed = model, changed

    @property
    def served(self) -> tuple[str, ...]:
        """Names of the layers that our operator serves, as they are now."""
        return tuple(name for name, reason in _reasons(self._model).items() if reason is None)

    @property
    def kept(self) -> dict[str, str]:
        """Every other adapter layer, which PEFT's own forward serves now, and why."""
        return {name: reason for name, reason in _reasons(self._model).items() if reason is not None}

    def undo(self) -> None:
        """Restore PEFT's own forward in every layer of the model; calling it again changes nothing."""
        _restore(list(self._model.modules()))

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *exception: object) -> None:
        _restore(self._changed)

    def __repr__(self) -> str:
        return f"Acceleration(served={list(self.served)}, kept={self.kept})"


def accelerate(peft_model: nn.Module) -> Acceleration:
    """Let :func:`glora_kernels.glora_linear` compute PEFT's GLoRA and HiRA layers, in place.

    GLoRA ``y = (W0 + W0*A + B) x + W0 c + b0*D + E + b0`` and HiRA ``y = (W0 + W0 * BA) x + b0`` within
    the contract of ``docs/numerics.md``: with fewer dense products than PEFT, and no dense matrix kept for
    backward. Only the class of a layer changes, to a subclass of its own, so that saving, loading, merging,
    switching and disabling adapters, copying and pickling work as before, and so do activation checkpointing
    and ``torch.compile``. (Unpickling an accelerated model needs glora.)

    A layer falls back to PEFT's forward for as long as that does more: no adapter or several are
    active, adapters are merged or disabled, a batch mixes them (``adapter_names``), HiRA's dropout is active,
    the base is not a frozen, plain ``nn.Linear``. Layers that PEFT adds later are left to PEFT: call it again.

    Args:
        peft_model: what ``peft.get_peft_model`` returned, or any module that contains such layers;
            accelerated before or not.

    Returns:
        ``.served`` and ``.kept`` list the layers; ``.undo()`` restores PEFT's forward everywhere, and so
        does the end of a ``with`` block for what this call changed.

    Raises:
        TypeError: not a module.
        ValueError: it has no GLoRA or HiRA layer of PEFT.
        ImportError: PEFT is not installed, or older than 0.21.
    """
    if not isinstance(peft_model, nn.Module):
        raise TypeError(f"peft_model: expected a torch.nn.Module, got {type(peft_model).__name__}")
    from peft.tuners.glora.layer import GloraLayer
    from peft.tuners.hira.layer import HiraLayer

    from .layers import ACCELERATED

    layers = [module for module in peft_model.modules() if isinstance(module, (GloraLayer, HiraLayer))]
    if not layers:
        raise ValueError(
            "peft_model: expected at least one GLoRA or HiRA layer of PEFT, found none; "
            "call peft.get_peft_model with a GloraConfig or HiraConfig first"
        )
    changed = [layer for layer in layers if type(layer) in ACCELERATED]
    for layer in changed:
        layer.__class__ = ACCELERATED[type(layer)]
    return Acceleration(peft_model, changed)


def _restore(modules: list[nn.Module]) -> None:
    from .layers import AcceleratedLayer

    layers: list[Any] = [module for module in modules if isinstance(module, AcceleratedLayer)]
    for layer in layers:
        layer.__class__ = layer.original


def _reasons(model: nn.Module) -> dict[str, str | None]:
    """For every adapter layer of PEFT why its own forward serves it; None where ours does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name: _reason(layer) for name, layer in named.items()}


def _reason(layer: Any) -> str | None:
    from .layers import ACCELERATED, AcceleratedLayer

    if isinstance(layer, AcceleratedLayer):
        if "forward" in vars(layer):
            return "its forward was replaced"
        terms = layer.served_terms()
        return terms if isinstance(terms, str) else None
    if type(layer) in ACCELERATED:
        return "it is not accelerated"
    return f"no operator for {qualified_name(type(layer))}"
