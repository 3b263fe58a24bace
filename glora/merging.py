"""From adapted layers to plain ones, with a report of what that cost, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from .config import PathConfig
from .distributed import require_whole
from .layer import GLoRALayer, qualified_name
from .modules import evaluating, replace_modules, replaced_modules, require_layers
from .quantised import GLoRAQuantisedLinear


@dataclass(frozen=True)
class LayerMerge:
    """One merged layer.

    Attributes:
        name, path: which layer, and what it had learnt.
        difference: largest absolute difference between merged and unmerged outputs on random
            tokens; 0 where both multiply by the same bits, as the torch backend does.
        error: largest absolute error of the merged output against the formula in fp64.
        bias_created: the merged layer has a bias that the base had not (C or E).
        untied: the base's weight was another module's too; the merged one is not.
        requantisation: for a quantised base, the largest absolute difference between W_eff and what
            the merged weight holds of it; None where W_eff is held as it is.
    """

    name: str
    path: PathConfig
    difference: float
    error: float
    bias_created: bool
    untied: bool
    requantisation: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge` did.

    Attributes:
        layers: one entry a layer, in the model's order.
        largest_difference, largest_error: over all layers.
        largest_requantisation: over those with a quantised base; None if there is none.
        model_difference: largest absolute difference of the model's output on the sample, if given.
        originals: the layers that :func:`unmerge` puts back, if they were kept.
    """

    layers: tuple[LayerMerge, ...]
    model_difference: float | None = None
    originals: Mapping[str, GLoRALayer] | None = field(default=None, repr=False)

    @property
    def largest_difference(self) -> float:
        return max(layer.difference for layer in self.layers)

    @property
    def largest_error(self) -> float:
        return max(layer.error for layer in self.layers)

    @property
    def largest_requantisation(self) -> float | None:
        return max((lost for layer in self.layers if (lost := layer.requantisation) is not None), default=None)

    def to_dict(self) -> dict:
        """Plain data for JSON; without the originals."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "largest_difference": self.largest_difference,
            "largest_error": self.largest_error,
            "largest_requantisation": self.largest_requantisation,
            "model_difference": self.model_difference,
        }

    def __str__(self) -> str:
        model = "not measured" if self.model_difference is None else f"{self.model_difference:.2e}"
        untied = [layer.name for layer in self.layers if layer.untied]
        lost = self.largest_requantisation
        return (
            f"merged {len(self.layers)} layers: largest difference to the unmerged layer "
            f"{self.largest_difference:.2e}, largest error against fp64 {self.largest_error:.2e}, "
            f"difference of the model's output {model}"
            + ("" if lost is None else f", largest change of a weight by quantising it anew {lost:.2e}")
            + (f"; no longer tied: {untied}" if untied else "")
        )


def merge(
    model: nn.Module,
    sample: Tensor | None = None,
    *,
    keep: bool = False,
    safe: bool = True,
    bias: str = "create",
    requantise: bool = False,
) -> MergeReport:
    """Replace every adapted layer of ``model`` by a plain one of the type it was made from, in place.

    The merged model has the names, shapes and module types that it had before ``inject``, and so its
    cost; only a weight that was tied to another module is a parameter of its own afterwards, as the
    report says. Tying it again undoes the merge: transformers' ``tie_weights()`` does, unless the model's
    ``config.tie_word_embeddings`` is set to False.
    Effective weights are formed in fp32 (fp64 for fp64) and rounded once.

    Args:
        sample: an input of the model; the difference of its output is reported.
        keep: keep the adapted layers in the report, so that :func:`unmerge` restores them exactly.
        safe: refuse a merged weight, bias or output that is not finite.
        bias: what happens where the path of a layer without a bias makes one (C or E): ``"create"`` gives the plain
            layer a bias, ``"forbid"`` refuses, as for a file format or an engine that has no place for it.
        requantise: merge layers with a quantised base (:class:`GLoRAQuantisedLinear`) too, by quantising W_eff anew;
            the report says what that cost.

    Raises:
        ValueError: nothing to merge; sharded parameters; a quantised base without ``requantise``; by layer, a bias that
            would be created against ``bias="forbid"`` or (with ``safe``) a result that is not finite. The model is
            unchanged then.
    """
    require_whole(model)
    layers = require_layers(model)
    if "" in layers:
        raise ValueError("model: expected a model that contains adapted layers; call .merge() on a single layer")
    _check_biases(bias, layers)
    _check_quantised(requantise, layers)
    merged: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        try:
            merged[name] = _merged(layer, safe)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    entries = tuple(
        _measure(name, layers[name], plain, untied=users[id(layers[name].weight)] > 1) for name, plain in merged.items()
    )
    replacements: dict[nn.Module, nn.Module] = {layers[name]: plain for name, plain in merged.items()}
    difference = None if sample is None else _model_difference(model, replacements, sample)
    if safe and difference is not None and not difference < float("inf"):
        raise ValueError(f"sample: expected finite outputs of the merged model, got a difference of {difference}")
    replace_modules(model, replacements)
    return MergeReport(entries, difference, layers if keep else None)


def unmerge(model: nn.Module, report: MergeReport) -> None:
    """Undo ``merge(model, keep=True)``: the very layers that were there, with no bit changed.

    Raises:
        ValueError: the report kept no layers, or ``model`` has something else than a plain layer
            of the right type and shape in one of their places; the model is unchanged then.
    """
    if report.originals is None:
        raise ValueError("report: expected one of merge(model, keep=True), got one that kept no layers")
    modules = dict(model.named_modules())
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in report.originals.items():
        found = modules.get(name)
        if found is None or not layer.stands_merged(found):
            kind, shape = layer.plain_type, tuple(layer.weight.shape)
            raise ValueError(f"model: expected a merged {qualified_name(kind)} of {shape} at {name!r}, got {found!r}")
        replacements[found] = layer
    replace_modules(model, replacements)


def _merged(layer: GLoRALayer, safe: bool) -> nn.Module:
    if isinstance(layer, GLoRAQuantisedLinear):
        return layer.merge(safe=safe, requantise=True)
    return layer.merge(safe=safe)


def _check_biases(policy: str, layers: Mapping[str, GLoRALayer]) -> None:
    if policy not in ("create", "forbid"):
        raise ValueError(f"bias: expected 'create' or 'forbid', got {policy!r}")
    made = [name for name, layer in layers.items() if layer.bias is None and layer.path.makes_bias]
    if policy == "forbid" and made:
        raise ValueError(
            f"bias: expected no bias where the base has none ('forbid'), got C or E in the paths of {made}; set other "
            "paths, search with C and E 'none', or merge with bias='create'"
        )


def _check_quantised(requantise: bool, layers: Mapping[str, GLoRALayer]) -> None:
    quantised = [name for name, layer in layers.items() if not layer.merges_exactly]
    if quantised and not requantise:
        raise ValueError(
            "requantise: expected True to merge into quantised weights, which rounds them anew, got False with "
            f"{quantised}"
        )


@torch.no_grad()
def _measure(name: str, layer: GLoRALayer, plain: nn.Module, untied: bool) -> LayerMerge:
    """Both layers on random inputs of unit variance, and the formula in fp64."""
    x = layer.probe(torch.Generator().manual_seed(0))
    with torch.autocast(x.device.type, enabled=False):
        y, unmerged = layer.outputs_merged(plain, x).double(), layer(x).double()
        exact = layer.exact(x)
    created = plain.bias is not None and layer.bias is None
    lost = None
    if isinstance(layer, GLoRAQuantisedLinear):
        lost = layer.requantisation_error(plain)  # type: ignore[arg-type]
    return LayerMerge(name, layer.path, _largest(y - unmerged), _largest(y - exact), created, untied, lost)


@torch.no_grad()
def _model_difference(model: nn.Module, replacements: Mapping[nn.Module, nn.Module], sample: Tensor) -> float:
    with evaluating(model):
        before = model(sample)
        with replaced_modules(model, replacements), evaluating(model):
            after = model(sample)
    if not isinstance(before, Tensor):
        raise ValueError(f"sample: expected a model that returns a tensor, got {type(before).__name__}")
    return _largest((before - after).double())


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
