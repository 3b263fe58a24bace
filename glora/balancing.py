"""Scales of kinds, such that one optimiser step of every kind changes a layer's output by the same share.

AdamW's first step moves every number by the learning rate: ``theta -= lr * g / (|g| + eps)``. How far the output
``y = W0 x + b0`` of a layer then moves depends on the kind (docs/quality.md): a number of B as a vector is added to
all K inputs of a row, one of A scales a small weight. Untreated, the kinds differ by a factor of hundreds.

In a model that is not trained yet, the left factors and the vectors are zero. So the gradient of a right factor is
zero, the step is that of the left storage alone, and the output moves in proportion to the learning rate. One forward
and backward pass of the model gives the input of every layer and the gradient of its output; the rest is done layer by
layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels import Terms

from .arguments import listed, require_type
from .config import KINDS, STORAGES, Choice, PathConfig, SearchSpace
from .dataset import Batch, require_batch
from .distributed import require_whole, unwrapped
from .layers.base import GLoRALayer, as_layer, term_of
from .models.modules import evaluating, require_layers
from .models.wrappers import is_compiled
from .objective import Loss, Objective, Outputs
from .paths import using_paths
from .random_numbers import drawing_from
from .scales import Scales

Kind = tuple[str, str]  # slot and kind
Runs = list[tuple[Tensor, Tensor]]  # of one layer: input, and gradient of the output
RATE = 1e-2  # the learning rate that targets refer to
TARGET = 0.02  # measured: docs/quality.md
_EPS = 1e-8  # AdamW's
_SMALLEST, _LARGEST = -10, 5  # exponents of the scales


@dataclass(frozen=True)
class Balance:
    """What :func:`balance` measured and set.

    Attributes:
        changes: by layer and by kind (``("B", "vector")``): the relative change of the layer's output,
            ``|y after - y before| / |y before|``, by one step at ``lr`` and scale 1.
        scales: by layer, as they are set now.
        target, lr: as given.
    """

    changes: Mapping[str, Mapping[Kind, float]]
    scales: Mapping[str, Scales]
    target: float
    lr: float

    def __str__(self) -> str:
        """A line for each kind: the mean change over the layers before and after, and the range of the scales."""
        lines = ["kind          one step before    after    scales"]
        for kind in {kind: None for changes in self.changes.values() for kind in changes}:
            having = {name: changes[kind] for name, changes in self.changes.items() if kind in changes}
            factors = {name: self.scales[name].of(*kind) for name in having}
            after = fmean(change * factors[name] for name, change in having.items())
            low, high = min(factors.values()), max(factors.values())
            scale = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            lines.append(f"{' '.join(kind):<13} {fmean(having.values()):>15.2%} {after:>8.2%}    {scale}")
        return "\n".join(lines)


def balance(
    model: nn.Module,
    batch: Any,
    loss_fn: Loss | None = None,
    *,
    target: float = TARGET,
    lr: float = RATE,
    space: SearchSpace | None = None,
    outputs: Outputs = None,
) -> Balance:
    """Set the scales of every adapted layer, so that one AdamW step of any kind moves its output by ``target``.

    For each kind alone, ``|y after - y before| / |y before|`` on the batch is measured for one step of the rate ``lr``;
    the scale of the kind is ``target`` divided by it, rounded to a power of two. So folding it later
    (:func:`fold_scales`) changes no bit. Training at another rate moves all kinds by as much more or less. Nothing
    beside the scales is changed: neither tensors nor gradients nor statistics of norms nor random numbers.

    Args:
        model: after :func:`glora.inject`, before training. It is run in eval mode.
        batch: ``(inputs, targets)`` or the model's arguments by name, on the model's device; 64 samples are enough.
        loss_fn, outputs: as for :func:`glora.train`.
        target: the share by which one step of each kind shall move a layer's output.
        lr: the learning rate that ``target`` refers to.
        space: kinds to measure; None for all.

    Returns:
        What was measured.

    Raises:
        ValueError: a model without adapted layers, or trained already (scales would change what it computes); sharded
            parameters; a target or rate that is not above 0; a layer that the forward pass does not reach.
        TypeError: an argument or a batch of another type.

    Example:
        >>> model = glora.inject(vit, rank=4)
        >>> print(glora.balance(model, next(iter(loader))))
        >>> glora.train(model, images, glora.Recipe(lr=1e-2), space=glora.SearchSpace(ranks=(4,)))
    """
    for name, value in (("target", target), ("lr", lr)):
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    require_type("space", space, (SearchSpace, type(None)), "a glora.SearchSpace or None")
    kinds = kinds_of(SearchSpace() if space is None else space)
    changes = measure(model, require_batch("batch", batch), Objective(model, loss_fn, outputs), kinds, lr)
    return Balance(changes, set_scales(model, changes, target), target, lr)


def kinds_of(source: SearchSpace | Iterable[PathConfig]) -> list[Kind]:
    """The kinds of a space, or of some paths; without none."""
    if isinstance(source, SearchSpace):
        found = {(slot, kind) for slot in KINDS for kind in getattr(source, slot)}
    else:
        found = {(slot, choice.kind) for path in source for slot, choice in path.choices.items()}
    return [(slot, kind) for slot in KINDS for kind in KINDS[slot] if (slot, kind) in found and kind != "none"]


def set_scales(model: nn.Module, changes: Mapping[str, Mapping[Kind, float]], target: float) -> dict[str, Scales]:
    """Give each layer the scales that make ``target`` of the measured ``changes``, and return them by layer."""
    scales = {name: _scales_for(own, target) for name, own in changes.items()}
    for name, layer in require_layers(model).items():
        layer.scales = scales[name]
    return scales


def _scales_for(changes: Mapping[Kind, float], target: float) -> Scales:
    """Powers of two; 1 for a kind that moves nothing."""
    factors: dict[str, dict[str, float]] = defaultdict(dict)
    for (slot, kind), change in changes.items():
        if change > 0:
            exponent = round(math.log2(target / change))
            factors[slot][kind] = 2.0 ** min(max(exponent, _SMALLEST), _LARGEST)
    return Scales(**factors)


def measure(
    model: nn.Module, batch: Batch, objective: Objective, kinds: Iterable[Kind], lr: float = RATE
) -> dict[str, dict[Kind, float]]:
    """The relative change of each layer's output by one AdamW step of each kind alone, at the rate ``lr``.

    Raises:
        ValueError: as :func:`balance`.
    """
    model = unwrapped(model)
    require_whole(model)
    layers = require_layers(model)
    trained = [
        name for name, layer in layers.items() if any(bool(getattr(layer, n).any()) for n, *_ in STORAGES.values())
    ]
    if trained:
        raise ValueError(
            f"model: expected one that is not trained yet, whose outputs scales do not change; {listed(trained)} have "
            "left factors or vectors other than zero. Call glora.balance after glora.inject"
        )
    runs = _run(model, layers, batch, objective)
    changes = {n: {kind: lr * _change(layer, kind, runs[n]) for kind in kinds} for n, layer in layers.items()}
    infinite = [
        f"{' '.join(kind)} of {n}" for n, own in changes.items() for kind, c in own.items() if not math.isfinite(c)
    ]
    if infinite:
        raise ValueError(
            f"model: expected outputs and gradients that are finite, got others for {listed(infinite)}; look at the "
            "batch, the weights and the loss"
        )
    return changes


def _run(model: nn.Module, layers: Mapping[str, GLoRALayer], batch: Batch, objective: Objective) -> dict[str, Runs]:
    """Of each run of each layer its input and the gradient of its output, in eval mode and without adapters.

    Buffers and generators are as before afterwards.
    """
    runs: dict[str, Runs] = {name: [] for name in layers}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with ExitStack() as stack:
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(drawing_from(0))
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.enter_context(using_paths(model, PathConfig()))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        token = stack.enter_context(_recorded(layers, runs))
        output = objective.output(model, batch)
        torch.autograd.grad(objective.loss(output, batch.target, batch.named), token, allow_unused=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    idle = [name for name, own in runs.items() if not own]
    if idle:
        raise ValueError(
            f"model: expected a loss that depends on every adapted layer, which it does not on {listed(idle)}; leave "
            "them out (glora.inject(..., exclude=...)), or, within a checkpoint, take use_reentrant=False"
        )
    return runs


@contextmanager
def _recorded(layers: Mapping[str, GLoRALayer], runs: Mapping[str, Runs]) -> Iterator[Tensor]:
    """Fill ``runs`` in a forward pass and a backward pass to the tensor given.

    Nothing of the model needs to require grad: that tensor, a zero, is added to the output of every layer.
    """
    token = torch.zeros((), device=next(iter(layers.values())).E.device, requires_grad=True)

    def hook(name: str) -> Callable[..., Tensor]:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Tensor) -> Tensor:
            (x,) = (*inputs, *keywords.values())
            x = as_layer(layers[name], x.detach()).clone()  # what comes later may change it in place
            output = output + token.to(output.device, output.dtype)
            if output.requires_grad:  # not in a pass that a checkpoint runs again
                output.register_hook(lambda grad: runs[name].append((x, grad)))
            return output

        return record

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield token
    finally:
        for handle in handles:
            handle.remove()


def _change(layer: GLoRALayer, kind: Kind, runs: Runs) -> float:
    """The relative change of the output by one step of the rate 1; 0 for D of a layer without a bias."""
    slot, form = kind
    if slot == "D" and layer.bias is None:
        return 0.0
    left, *others = [getattr(layer, name).detach() for name in STORAGES[slot]]
    choice, right = (Choice(form, layer.rank), others) if form == "lora" else (Choice(form), [])

    def outputs(storage: Tensor | None) -> list[Tensor]:
        terms: dict[str, Any] = {} if storage is None else {slot: term_of(choice, storage, *right)}
        return [layer.compute(x, Terms(**terms, product=layer.product)) for x, _ in runs]

    start = left.clone().requires_grad_()
    with torch.enable_grad():
        found = outputs(start)
        (gradient,) = torch.autograd.grad(found, start, [grad.to(y.dtype) for y, (_, grad) in zip(found, runs)])
    gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))  # in fp16, eps would be 0
    with torch.no_grad():
        before, after = outputs(None), outputs((-gradient / (gradient.abs() + _EPS)).to(left.dtype))
        moved = math.sqrt(sum(float((b.double() - a.double()).square().sum()) for a, b in zip(before, after)))
        size = math.sqrt(sum(float(y.double().square().sum()) for y in before))
    return moved / size if size else 0.0


def fold_scales(model: nn.Module) -> nn.Module:
    """Multiply the scales of every adapted layer into what its path reads, and make them 1.

    The outputs stay the same, to the last bit if the scales are powers of two, as those of :func:`balance` are. What
    other paths read of the same storages changes: fold when a path is fixed. An optimiser's moments do not fit then.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no adapted layer, or sharded parameters.

    Example:
        >>> glora.set_paths(model, result.best.paths)
        >>> glora.fold_scales(model)
    """
    require_whole(model)
    with torch.no_grad():
        for layer in require_layers(model).values():
            for name, folded in layer.folded().items():
                getattr(layer, name).copy_(folded)
            layer.scales = Scales()
    return model
