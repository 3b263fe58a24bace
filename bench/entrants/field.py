"""Ours and every peer on one backbone, each held against the fp64 reference before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import nn

import glora
from glora import PathConfig
from glora.paths import Paths

from ..agreement import Truth, Workload, require_agreement, results, truth
from . import formulas, lycoris_models, peft_models
from . import names as who
from .copies import sharing

ADAPTER_STD = 0.02  # of every factor: not zero, since zeros run faster
PEER_SLACK = 10  # peers promise no bound in units of u S


@dataclass(frozen=True)
class Entrant:
    """One implementation that takes part.

    Attributes:
        make: makes an adapted model from the backbone and our model with the same product.
        path: the path on which ours computes the same, by rank; None for an entrant that can be set to any path.
        names: its names for our parameters, by layer; None where the names are the same.
        product: ``"hadamard"`` or ``"matmul"``.
        package: the package that has to be installed.
    """

    make: Callable[[nn.Module, nn.Module], nn.Module]
    path: Callable[[int], PathConfig] | None = None
    names: dict[str, str] | None = None
    product: str = "hadamard"
    package: str = "glora"


ENTRANTS = {
    who.FROZEN: Entrant(lambda backbone, ours: _frozen_model(backbone, next(iter(glora.glora_layers(ours))))),
    who.LORA: Entrant(peft_models.lora_model, who.lora, peft_models.LORA_NAMES, package="peft"),
    who.OURS: Entrant(lambda _backbone, ours: ours),
    who.ASSEMBLED: Entrant(lambda backbone, ours: formulas.with_layers(backbone, ours, formulas.AssembledLinear)),
    who.OFFICIAL: Entrant(lambda backbone, ours: formulas.with_layers(backbone, ours, formulas.OfficialLinear)),
    who.HIRA: Entrant(peft_models.hira_model, who.hira, peft_models.HIRA_NAMES, package="peft"),
    who.GLORA: Entrant(peft_models.glora_model, who.all_low_rank, peft_models.GLORA_NAMES, package="peft"),
    who.OURS_MATMUL: Entrant(lambda _backbone, ours: ours, who.lycoris, product="matmul"),
    who.LYCORIS_BYPASS: Entrant(lycoris_models.bypass_model, who.lycoris, lycoris_models.NAMES, "matmul", "lycoris"),
    who.LYCORIS: Entrant(lycoris_models.lycoris_model, who.lycoris, lycoris_models.NAMES, "matmul", "lycoris"),
}
ANY_PATH = (who.OURS, who.ASSEMBLED, who.OFFICIAL)
OURS_OF = {"hadamard": who.OURS, "matmul": who.OURS_MATMUL}  # by product


@dataclass
class Field:
    """Models by entrant, and the entrants that were refused.

    Attributes:
        models: the models of the entrants that take part.
        backbone: the model that all were made from, and whose weights they share.
        layers: the names of the adapted layers.
        rank: the rank of every adapter.
        errors: the largest error of each against fp64, once :meth:`check` has run.
        refused: the entrants that do not take part, and why.
        missing: the entrants that could not be made: a package is not installed, or has another version.
    """

    models: dict[str, nn.Module]
    backbone: nn.Module
    layers: tuple[str, ...]
    rank: int
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def set_paths(self, paths: Paths) -> None:
        """Set the same paths for all entrants that can be set to any path."""
        for name in ANY_PATH:
            if name in self.models:
                glora.set_paths(self.models[name], paths)

    def set_path(self, path: PathConfig) -> None:
        """Set one path for every layer of all entrants that can be set to any path."""
        self.set_paths(dict.fromkeys(self.layers, path))

    def check(self, workload: Workload, path_sets: Sequence[Paths], tolerance: float) -> None:
        """Compare output and gradients of every entrant with fp64; an entrant that is wrong is refused and removed.

        Args:
            path_sets: the paths on which to check the entrants that can be set to any path.
            tolerance: see :func:`~bench.agreement.require_agreement`; in units of u S peers may have
                :data:`PEER_SLACK` times as much.
        """
        for paths in path_sets:
            self.set_paths(paths)
            want = truth(workload, self.models[who.OURS])
            for name in ANY_PATH:
                self._hold(name, workload, want, tolerance)
        known: dict[tuple[str, PathConfig], Truth] = {}
        for name, entrant in ENTRANTS.items():
            if name in self.models and entrant.path is not None:
                ours, path = self._ours(entrant.product), entrant.path(self.rank)
                glora.set_paths(ours, dict.fromkeys(self.layers, path))
                if (entrant.product, path) not in known:
                    known[entrant.product, path] = truth(workload, ours)
                self._hold(name, workload, known[entrant.product, path], tolerance)
        if who.FROZEN in self.models:
            self._hold(who.FROZEN, workload, truth(workload, self.models[who.FROZEN]), tolerance)
        self.refuse(self.refused)

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Remove an entrant that was found wrong, here or elsewhere."""
        self.refused.update(reasons)
        for name in reasons:
            self.models.pop(name, None)

    def _ours(self, product: str) -> nn.Module:
        return self.models[OURS_OF[product]]

    def _hold(self, name: str, workload: Workload, want: Truth, tolerance: float) -> None:
        if name not in self.models or name in self.refused:
            return
        try:
            got = results(workload, self.models[name])
            peer = name not in (who.OURS, who.OURS_MATMUL) and want.scale is not None
            allowed = PEER_SLACK * tolerance if peer else tolerance
            error = require_agreement(name, got, want, allowed, self._names(name))
        except Exception as failure:  # whatever a peer does wrong must not end the run of the others
            self.refused[name] = f"{type(failure).__name__}: {failure}"
            return
        self.errors[name] = max(self.errors.get(name, 0.0), error)

    def _names(self, name: str) -> Mapping[str, str] | None:
        names = ENTRANTS[name].names
        if names is None:
            return None
        return {f"{layer}.{own}": f"{layer}.{theirs}" for layer in self.layers for own, theirs in names.items()}


def make_field(backbone: nn.Module, names: Iterable[str], rank: int, entrants: Iterable[str] = ENTRANTS) -> Field:
    """The models of ``entrants`` and of ours with their products, adapted at exactly ``names``, frozen elsewhere."""
    names, entrants = tuple(names), (who.OURS, *entrants)
    products = {ENTRANTS[name].product for name in entrants}
    ours = {product: _our_model(backbone, names, rank, product) for product in OURS_OF if product in products}
    made = Field({}, backbone, names, rank)
    for name in dict.fromkeys((*(OURS_OF[product] for product in ours), *entrants)):
        entrant = ENTRANTS[name]
        if find_spec(entrant.package) is None:
            made.missing[name] = f"the package {entrant.package} is not installed"
            continue
        try:
            model = entrant.make(backbone, ours[entrant.product])
            if entrant.names is not None:
                peft_models.copy_factors(ours[entrant.product], model, entrant.names)
        except (ImportError, AttributeError, TypeError) as error:  # an older package, say
            made.missing[name] = f"{entrant.package} did not make it: {type(error).__name__}: {error}"
            continue
        made.models[name] = model
    return made


def _our_model(backbone: nn.Module, names: tuple[str, ...], rank: int, product: str) -> nn.Module:
    model = glora.inject(sharing(backbone), rank, targets=names, heads=(), product=product)
    with torch.no_grad():
        for parameter in glora.trainable_parameters(model):
            parameter.normal_(std=ADAPTER_STD)
    return model


def _frozen_model(backbone: nn.Module, first: str) -> nn.Module:
    """A frozen model whose backward pass still goes back to the output of the layer ``first``.

    The backward pass of an adapted model ends there too: the input of its first adapted layer needs no gradient.
    """
    model = sharing(backbone).requires_grad_(False)
    model.get_submodule(first).register_forward_hook(lambda _module, _inputs, y: y.requires_grad_())
    return model
