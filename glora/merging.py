"""From adapted layers to plain ones, with a report of what that cost, and back."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from .arguments import listed, require_type, type_of
from .config import PathConfig
from .dataset import Batch
from .distributed import require_whole
from .layers.base import GLoRALayer
from .layers.plain import is_bare, qualified_name
from .layers.quantised import GLoRAQuantisedLinear
from .models.contents import BATCH_NORMS
from .models.modules import called, evaluating, replace_modules, replaced_modules, require_layers
from .models.pretrained import Home, guard_saving, homes, release_saving
from .models.readers import warn_of_readers
from .models.wrappers import modules_by_name
from .objective import Objective, Outputs


@dataclass(frozen=True)
class LayerMerge:
    """One merged layer.

    Attributes:
        name, path: which layer, and what it had learnt.
        difference: largest absolute difference between merged and unmerged outputs on random
            tokens; 0 where both multiply by the same bits, as the torch backend does.
        error: largest absolute error of the merged output against the formula in fp64.
        bias_created: the merged layer has a bias that the base did not have (C or E).
        untied: the base shared its weight or bias with another module; the merged layer does not.
        requantisation: for a quantised base, the largest absolute difference between W_eff and the
            merged weight as decoded; None for other bases.
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
        layers: one entry per layer, in the model's order.
        largest_difference, largest_error: over all layers.
        largest_requantisation: over the layers with a quantised base; None if there is none.
        model_difference: largest absolute difference of the model's output on the sample, if given.
        originals: the layers that :func:`unmerge` puts back, if they were kept.
        dropped_biases: the created biases that ``from_pretrained`` of the model's class will not load.
        config_changes: entries of the model's config that were set True, so that it loads the created biases.
        zero_biases: other modules that these entries concern: they were given a bias of zeros.
    """

    layers: tuple[LayerMerge, ...]
    model_difference: float | None = None
    originals: Mapping[str, GLoRALayer] | None = field(default=None, repr=False)
    dropped_biases: tuple[str, ...] = ()
    config_changes: tuple[str, ...] = ()
    zero_biases: tuple[str, ...] = ()
    _merged: Mapping[str, nn.Module] | None = field(default=None, repr=False)
    _homes: tuple[Home, ...] = field(default=(), repr=False)

    @property
    def created_biases(self) -> tuple[str, ...]:
        """The layers whose base had no bias, and that have one now."""
        return tuple(layer.name for layer in self.layers if layer.bias_created)

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
            "created_biases": list(self.created_biases),
            "dropped_biases": list(self.dropped_biases),
            "config_changes": list(self.config_changes),
            "zero_biases": list(self.zero_biases),
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
            + self._about_biases()
        )

    def _about_biases(self) -> str:
        created, dropped = self.created_biases, self.dropped_biases
        if not created:
            return ""
        text = f"; created a bias in {len(created)} layers that had none: {listed(created)}"
        if dropped:
            return f"{text}; from_pretrained will drop {'them' if dropped == created else listed(dropped)}"
        if self.config_changes:
            zeros = f", {len(self.zero_biases)} other layers have a bias of zeros" if self.zero_biases else ""
            return f"{text}; set in the model's config, so that they load: {', '.join(self.config_changes)}{zeros}"
        return f"{text}; a model that is built anew needs a bias there before it loads them"


@torch.inference_mode(False)  # the merged weights may be trained later
def merge(
    model: nn.Module,
    sample: Tensor | Mapping[str, Tensor] | None = None,
    *,
    outputs: Outputs = None,
    keep: bool = False,
    safe: bool = True,
    bias: str = "auto",
    requantise: bool = False,
) -> MergeReport:
    """Replace every adapted layer of ``model`` by a plain one of the type it was made from, in place.

    The merged model has the names, shapes, module types and cost that it had before ``inject``. There is one exception:
    a weight that was tied to another module becomes a parameter of its own, as a warning and the report say. Tying it
    again undoes the merge; transformers' ``tie_weights()`` does so unless the model's ``config.tie_word_embeddings`` is
    set to False. Effective weights are formed in fp32 (fp64 for fp64) and rounded once.

    Args:
        sample: an input of the model, or its arguments by name (a tokenizer's or processor's output); the difference of
            its logits is reported.
        outputs: where the logits are in the model's output, as for :func:`glora.evaluate`.
        keep: keep the adapted layers in the report, so that :func:`unmerge` restores them exactly.
        safe: refuse a merged weight, bias or output that is not finite.
        bias: what to do where the path of a layer without a bias makes one (C or E); the report lists these layers:

            - ``"auto"``: the plain layer gets a bias; refused where the model's ``from_pretrained`` would drop it (that
              of Transformers does so without an error).
            - ``"config"``: as ``"auto"``, but sets entries of a Transformers model's config that can give the layer a
              bias (``attention_bias`` and the like); other layers that the entry concerns get a bias of zeros.
            - ``"create"``: the plain layer always gets a bias; a warning says where it would be dropped.
            - ``"forbid"``: refused; for a file format or an engine that has no place for a bias.

            Training and searching over ``glora.SearchSpace(..., bias_free=True)`` avoids such paths.
        requantise: merge layers with a quantised base (:class:`GLoRAQuantisedLinear`) too, by quantising W_eff again;
            the report says what that cost.

    Raises:
        ValueError: nothing to merge; sharded parameters, or some on meta or offloaded; hooks on an adapted layer, which
            would be lost; a quantised base without ``requantise``; a bias that ``bias`` refuses; with ``safe``, a
            result that is not finite, by layer. The model is unchanged then.

    Warns:
        UserWarning: weights that are no longer tied; created biases that ``from_pretrained`` will drop, or that stand
            in front of a batch norm; layers whose weight another module reads without calling them.
    """
    require_whole(model)
    layers = require_layers(model)
    if "" in layers:
        raise ValueError("model: expected a model that contains adapted layers; call .merge() on a single layer")
    require_mergeable(layers)
    _check_sample(sample)
    places = _check_biases(bias, model, layers)
    _check_quantised(requantise, layers)
    merged: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        try:
            merged[name] = _merged(layer, safe)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    _warn_of_bypassed(model, layers)
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    entries = tuple(
        _measure(name, layers[name], plain, untied=_is_tied(layers[name], users)) for name, plain in merged.items()
    )
    replacements: dict[nn.Module, nn.Module] = {layers[name]: plain for name, plain in merged.items()}
    difference = None if sample is None else _model_difference(model, replacements, sample, outputs)
    if safe and difference is not None and not difference < float("inf"):
        raise ValueError(f"sample: expected finite outputs of the merged model, got a difference of {difference}")
    for name, layer in layers.items():
        if layer.compiled_with is not None:
            args, kwargs = layer.compiled_with
            merged[name].compile(*args, **kwargs)
    replace_modules(model, replacements)
    release_saving(model)
    dropped = [name for home in places if not home.switches for name in home.full(home.dropped)]
    switched = tuple(home for home in places if home.switches)
    for home in switched:
        home.switch(model, True)
    report = MergeReport(
        layers=entries,
        model_difference=difference,
        originals=layers if keep else None,
        dropped_biases=tuple(dropped),
        config_changes=tuple(
            entry for home in switched for entry in home.full([f"config.{entry}" for entry in home.switches])
        ),
        zero_biases=tuple(name for home in switched for name in home.full(home.zeros or ())),
        _merged=merged if keep else None,
        _homes=switched,
    )
    _warn_of_lost_biases(model, report)
    if untied := [layer.name for layer in entries if layer.untied]:
        warnings.warn(
            f"merge: {listed(untied)} had the weight or bias of another module; now they have their own, which is "
            "lost in a model that ties them (Transformers: set config.tie_word_embeddings to False before saving)",
            stacklevel=3,  # past the decorator
        )
    return report


def unmerge(model: nn.Module, report: MergeReport) -> None:
    """Undo ``merge(model, keep=True)``: put the very same layers back, with no bit changed.

    A copy of the merged model gets copies of them, so that it shares nothing with the original.

    Raises:
        ValueError: the report kept no layers, or one of their places in ``model`` does not hold a plain
            layer of the right type and shape; the model is unchanged then.
    """
    require_type("report", report, MergeReport, "what merge(model, keep=True) returned")
    if report.originals is None:
        raise ValueError("report: expected one of merge(model, keep=True), got one that kept no layers")
    modules = modules_by_name(model)
    for name, layer in report.originals.items():
        found = modules.get(name)
        if found is None or not layer.stands_merged(found):
            kind, shape = layer.plain_type, tuple(layer.weight.shape)
            raise ValueError(f"model: expected a merged {qualified_name(kind)} of {shape} at {name!r}, got {found!r}")
    own = any(modules[name] is plain for name, plain in (report._merged or {}).items())
    originals = report.originals if own else copy.deepcopy(dict(report.originals))
    for home in report._homes:
        home.switch(model, False)
    replace_modules(model, {modules[name]: layer for name, layer in originals.items()})
    guard_saving(model)


def _merged(layer: GLoRALayer, safe: bool) -> nn.Module:
    if isinstance(layer, GLoRAQuantisedLinear):
        return layer.merge(safe=safe, requantise=True)
    return layer.merge(safe=safe)


def require_mergeable(layers: Mapping[str, GLoRALayer]) -> None:
    """Raise ValueError, naming layers, if one has parameters on meta, or if some have hooks, which would be lost."""
    for name, layer in layers.items():
        absent = next((own for own, parameter in layer.named_parameters() if parameter.is_meta), None)
        if absent is not None:
            raise ValueError(
                f"model: expected real tensors, got {absent!r} of layer {name!r} on meta; load the weights first, or "
                "bring offloaded ones back (accelerate.hooks.remove_hook_from_submodules(model))"
            )
    hooked = [name for name, layer in layers.items() if not is_bare(layer)]
    if hooked:
        raise ValueError(
            f"model: expected adapted layers without hooks, which would be lost, got some on {listed(hooked)}; remove "
            "them (handle.remove(), accelerate.hooks.remove_hook_from_submodules) and put them on the merged model"
        )


def _check_biases(policy: str, model: nn.Module, layers: Mapping[str, GLoRALayer]) -> list[Home]:
    """Where created biases will be saved, with the config entries to set. Raises ValueError for what is refused."""
    if policy not in ("auto", "config", "create", "forbid"):
        raise ValueError(f"bias: expected 'auto', 'config', 'create' or 'forbid', got {policy!r}")
    made = [name for name, layer in layers.items() if layer.bias is None and layer.path.makes_bias]
    if policy == "forbid" and made:
        raise ValueError(
            f"bias: expected no bias where the base has none ('forbid'), got C or E in the paths of {listed(made)}; "
            "train and search with glora.SearchSpace(..., bias_free=True), set other paths, or merge with bias='create'"
        )
    places = homes(model, made)
    for home in places if policy in ("auto", "config") else ():
        if home.dropped and not (policy == "config" and home.switches):
            raise ValueError(_refused(home, policy))
    return places if policy == "config" else [replace(home, switches=(), zeros=None) for home in places]


def _refused(home: Home, policy: str) -> str:
    switches = " and ".join(f"config.{entry}" for entry in home.switches)
    switch = f"bias='config', which sets {switches}, or with " if switches else ""
    none = ", which has no entry in its config for it" if policy == "config" else ""
    return (
        f"bias: expected no new bias that {home.kind}.from_pretrained would drop{none}; got C or E in the paths of "
        f"layers that have none: {listed(home.full(home.dropped))}. Train and search with "
        f"glora.SearchSpace(..., bias_free=True); or merge with {switch}bias='create' to have it all the same"
    )


def _warn_of_lost_biases(model: nn.Module, report: MergeReport) -> None:
    if report.dropped_biases:
        warnings.warn(
            f"merge: created biases that from_pretrained will drop, in {listed(report.dropped_biases)}; keep this "
            "model's state_dict() instead, and build a model that has them",
            stacklevel=4,
        )
    fused = [name for name in report.created_biases if _is_fused(model, name)]
    if fused:
        warnings.warn(
            f"merge: created biases in front of a batch norm, in {listed(fused)}; a reparameterisation of the model "
            "(timm's reparameterize_model) may drop them: compare its outputs with this model's",
            stacklevel=4,
        )


def _is_fused(model: nn.Module, name: str) -> bool:
    """Whether a module around this layer offers to fuse it with a batch norm beside it."""
    parents = [".".join(name.split(".")[:depth]) for depth in range(name.count(".") + 1)]
    modules = modules_by_name(model)
    if not any(isinstance(child, BATCH_NORMS) for child in modules[parents[-1]].children()):
        return False
    offers = ("reparameterize", "fuse", "switch_to_deploy")
    return any(hasattr(type(modules[parent]), offer) for parent in parents for offer in offers)


def _check_quantised(requantise: bool, layers: Mapping[str, GLoRALayer]) -> None:
    quantised = [name for name, layer in layers.items() if not layer.merges_exactly]
    if quantised and not requantise:
        raise ValueError(
            "requantise: expected True to merge into quantised weights, which rounds them anew, got False with "
            f"{quantised}"
        )


def _warn_of_bypassed(model: nn.Module, layers: Mapping[str, GLoRALayer]) -> None:
    """Name the layers that the model seems not to call: what they have learnt takes effect now."""
    warn_of_readers(model, {layer: name for name, layer in layers.items()})
    idle = [name for name, layer in layers.items() if not layer.has_run]
    if 0 < len(idle) < len(layers):
        warnings.warn(
            f"merge: {listed(idle)} did not run where other layers did; if the model reads their weight instead of "
            "calling them, it computes something else from now on",
            stacklevel=4,
        )


def _is_tied(layer: GLoRALayer, users: Mapping[int, int]) -> bool:
    return any(users[id(p)] > 1 for p in (layer.weight, layer.bias) if p is not None)


@torch.no_grad()
def _measure(name: str, layer: GLoRALayer, plain: nn.Module, untied: bool) -> LayerMerge:
    """Compare both layers, and the formula in fp64, on random inputs of unit variance."""
    x = layer.probe(torch.Generator().manual_seed(0))
    with torch.autocast(x.device.type, enabled=False):
        # forward itself: a call would run hooks that are on all modules
        y, unmerged = layer.outputs_merged(plain, x).double(), layer.forward(x).double()
        exact = layer.exact(x)
    created = plain.bias is not None and layer.bias is None
    lost = None
    if isinstance(layer, GLoRAQuantisedLinear):
        lost = layer.requantisation_error(plain)  # type: ignore[arg-type]
    return LayerMerge(name, layer.path, _largest(y - unmerged), _largest(y - exact), created, untied, lost)


def _check_sample(sample: object) -> None:
    if sample is None or isinstance(sample, Tensor):
        return
    expected = "a tensor, or a dictionary of tensors by the names of the model's arguments (return_tensors='pt')"
    require_type("sample", sample, Mapping, expected)
    odd = {name: type_of(value) for name, value in sample.items() if not isinstance(value, Tensor)}  # type: ignore[attr-defined]
    if odd or not sample:
        raise TypeError(f"sample: expected {expected}, got {odd or 'an empty one'}")


@torch.no_grad()
def _model_difference(
    model: nn.Module,
    replacements: Mapping[nn.Module, nn.Module],
    sample: Tensor | Mapping[str, Tensor],
    outputs: Outputs,
) -> float:
    objective = Objective(model, outputs=outputs)
    given = objective.arguments(Batch(sample if isinstance(sample, Tensor) else dict(sample), None), "sample")
    with evaluating(model):
        before = objective.logits(called(model, given))
        with replaced_modules(model, replacements), evaluating(model):
            after = objective.logits(called(model, given))
    return _largest((before - after).double())


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
