"""Models that write and read themselves by ``save_pretrained`` and ``from_pretrained``, and what these keep of GLoRA.

``from_pretrained`` builds a new model from the config and drops every tensor that has no place there; at most a line in
a table says so. So adapted layers are lost as a whole, and a merged model loses the biases that merging created.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from traceback import extract_stack
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import listed
from ..layers.packages import is_a
from .modules import glora_layers
from .wrappers import modules_by_name, named_modules

_Shapes = dict[str, torch.Size]


def guard_saving(model: nn.Module) -> None:
    """Make every part of ``model`` with a ``save_pretrained`` warn if it saves adapted layers that are not merged."""
    for module in _savers(model).values():
        own = vars(module).get("save_pretrained")
        if not isinstance(own, SavingGuard):
            module.save_pretrained = SavingGuard(module, own)


def release_saving(model: nn.Module) -> None:
    """Undo :func:`guard_saving`: afterwards the model holds nothing of this package."""
    for module in _savers(model).values():
        guard = vars(module).get("save_pretrained")
        if isinstance(guard, SavingGuard):
            del module.save_pretrained
            if guard.own is not None:
                module.save_pretrained = guard.own


class SavingGuard:
    """Takes the place of ``module.save_pretrained``; copies and pickles of the model have their own.

    It warns once for each place that it is called from: a trainer saves many checkpoints.

    Args:
        module: what is saved.
        own: what ``module.save_pretrained`` was before; None if it was the method of the class.
    """

    def __init__(self, module: Any, own: Callable | None = None):
        self.module, self.own = module, own
        self._told: set[tuple[str, int | None]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = extract_stack(limit=2)[0]
        place = caller.filename, caller.lineno
        layers = list(glora_layers(self.module))
        if place not in self._told and layers:
            self._told.add(place)
            kind = type(self.module).__name__
            warnings.warn(
                f"save_pretrained: the model is not merged, and {kind}.from_pretrained will drop what GLoRA has learnt "
                f"in {listed(layers)} (it loads the bare base). Call glora.merge(model) first; or keep the adapter by "
                "glora.save_adapter(model, file), and put it into the base by glora.load_adapter",
                stacklevel=2,
            )
        save = partial(type(self.module).save_pretrained, self.module) if self.own is None else self.own
        return save(*args, **kwargs)


def _savers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in named_modules(model) if hasattr(type(module), "save_pretrained")}


# -- created biases ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Home:
    """A part of a model that is saved and loaded as one, and what becomes of the biases that a merge creates in it.

    Attributes:
        name, kind: the names of the part and of its class.
        dropped: the layers that get a bias for which the class, built from its config, has no place; by their names
            in the part.
        switches: entries of the config that would give all of them a place; empty if there are none.
        zeros: the other modules that these entries give a bias, with its shape.
    """

    name: str
    kind: str
    dropped: tuple[str, ...]
    switches: tuple[str, ...] = ()
    zeros: Mapping[str, torch.Size] | None = None

    def full(self, names: Collection[str]) -> list[str]:
        """Names in the part as names in the model."""
        return [f"{self.name}.{name}" if self.name else name for name in names]

    def switch(self, model: nn.Module, on: bool) -> None:
        """Set or reset the entries of the config, and the biases of zeros."""
        part: Any = modules_by_name(model)[self.name]
        for entry in self.switches:
            parents, last = _split(entry)
            setattr(reduce(getattr, parents, part.config), last, on)
        for name, shape in (self.zeros or {}).items():
            module: Any = modules_by_name(part)[name]
            module.register_parameter("bias", _zeros(shape, module.weight, part) if on else None)


def homes(model: nn.Module, created: Sequence[str]) -> list[Home]:
    """Where the new biases of ``created`` are saved. Biases outside any part with ``save_pretrained`` have no home."""
    savers = _savers(model)
    # models of Transformers first: what wraps one (SentenceTransformer) lets it save itself
    order = sorted(savers, key=lambda name: not is_a(savers[name], "transformers.modeling_utils", "PreTrainedModel"))
    parts: dict[str, list[str]] = {}
    for layer in created:
        part = next((name for name in order if not name or layer.startswith(f"{name}.")), None)
        if part is not None:
            parts.setdefault(part, []).append(layer.removeprefix(f"{part}.") if part else layer)
    return [_home(name, savers[name], layers) for name, layers in parts.items()]


def _home(name: str, part: Any, created: list[str]) -> Home:
    kind, layers = type(part).__name__, tuple(created)
    config = getattr(part, "config", None)
    without = _shapes_built(part, config)
    if without is None:
        return Home(name, kind, layers)
    dropped = tuple(layer for layer in layers if f"{layer}.bias" not in without)
    chosen: list[str] = []
    left = set(dropped)
    for entry in _switches(config) if left else ():
        places = _places(part, config, [entry], without)
        if left & set(places):
            chosen.append(entry)
            left -= set(places)
    if left or not chosen:
        return Home(name, kind, dropped)
    places = _places(part, config, chosen, without)
    zeros = {layer: shape for layer, shape in places.items() if layer not in layers}
    return Home(name, kind, dropped, tuple(chosen), zeros)


def _places(part: nn.Module, config: Any, entries: Sequence[str], without: _Shapes) -> _Shapes:
    """Modules that gain a bias, of this shape, if these config entries are set. Empty if they change anything else."""
    changed = copy.deepcopy(config)
    for entry in entries:
        parents, last = _split(entry)
        setattr(reduce(getattr, parents, changed), last, True)
    built = _shapes_built(part, changed)
    if built is None or any(built.get(name) != shape for name, shape in without.items()):
        return {}
    modules = modules_by_name(part)
    added = {name: shape for name, shape in built.items() if name not in without}
    layers = {name.removesuffix(".bias"): shape for name, shape in added.items()}
    fit = all(layer in modules and _takes_bias(modules[layer]) for layer in layers)
    return layers if fit and all(name.endswith(".bias") for name in added) else {}


def _takes_bias(module: Any) -> bool:
    """Whether ``module`` could have a bias but has none; False if its weight is on meta."""
    return getattr(module, "bias", module) is None and not module.weight.is_meta


def _shapes_built(part: Any, config: Any) -> _Shapes | None:
    """Names and shapes of the parameters of the class built from ``config``; None if it cannot be built."""
    if config is None:
        return None
    try:
        with torch.device("meta"):
            built = type(part)(copy.deepcopy(config))
    except Exception:  # anybody's class may raise anything
        return None
    return {name: parameter.shape for name, parameter in built.named_parameters(remove_duplicate=False)}


def _switches(config: Any, prefix: str = "") -> Iterator[str]:
    """Entries of a config, and of configs within it, that are False and named like a bias."""
    for name, value in vars(config).items():
        if value is False and "bias" in name:
            yield prefix + name
        elif hasattr(type(value), "model_type"):
            yield from _switches(value, f"{prefix}{name}.")


def _split(entry: str) -> tuple[list[str], str]:
    *parents, last = entry.split(".")
    return parents, last


def _zeros(shape: torch.Size, weight: Tensor, part: Any) -> nn.Parameter:
    dtype = weight.dtype if weight.is_floating_point() else part.dtype
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device), requires_grad=False)
