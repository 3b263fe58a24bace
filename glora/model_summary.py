"""What GLoRA has made of a model: which weights are adapted, which train in full, which are frozen, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .arguments import listed
from .layers.adapters import adapters
from .layers.base import GLoRALayer
from .layers.plain import qualified_name
from .models.modules import require_layers
from .models.readers import read_by_others
from .models.wrappers import named_modules, named_parameters
from .parameters import count_parameters

# Parameters that hold many matrices (the experts of a mixture) are named if they are more than this share of all.
NOTEWORTHY = 0.05
ONE_DIMENSIONAL = (nn.Conv1d, nn.ConvTranspose1d)


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found, by names without wrappers; ``print`` shows it as a table.

    Attributes:
        adapted: ``(kind, N, K, rank)`` of every adapted layer, by name.
        trained: the number of values of every other parameter that trains, by name.
        frozen: for every other weight of two or more dimensions, by the name of its parameter, why it has no adapter.
        support_values: how many values the support tensors hold.
        path_values: how many of them the current paths read.
        coverage: the share of all weights of two or more dimensions, counted in values, that is adapted.
    """

    adapted: Mapping[str, tuple[str, int, int, int]]
    trained: Mapping[str, int]
    frozen: Mapping[str, str]
    support_values: int
    path_values: int
    coverage: float

    def __str__(self) -> str:
        kinds = Counter((kind, f"rank {rank}") for kind, _, _, rank in self.adapted.values())
        lines = [
            f"adapted: {len(self.adapted)} layers, {self.coverage:.1%} of the values of all matrix weights; "
            f"{self.support_values:,} support values, of which the paths read {self.path_values:,}",
            *(f"  {count} x {kind}, {rank}" for (kind, rank), count in kinds.items()),
            f"trained in full: {sum(self.trained.values()):,} values",
            *(f"  {name}: {count:,}" for name, count in _shortened(self.trained.items())),
            f"frozen and not adapted: {len(self.frozen)} weights",
        ]
        for reason, count in Counter(self.frozen.values()).items():
            names = [name for name, other in self.frozen.items() if other == reason]
            lines.append(f"  {count} x {reason}: {listed(names, 3)}")
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """Say what of ``model`` is adapted, trained in full, and frozen without an adapter, and why.

    It reads the model as it is: call it after :func:`glora.inject`, :func:`glora.load_adapter` or any later change.

    Raises:
        ValueError: ``model`` has no adapted layer.

    Example:
        >>> print(glora.summary(glora.inject(timm.create_model("resnet18"), rank=2, convolutions=True)))
        adapted: 20 layers, 95.6% of the values of all matrix weights; 215,578 support values, of which the paths ...
          20 x GLoRAConv2d, rank 2
        trained in full: 513,000 values
          fc.weight: 512,000
          fc.bias: 1,000
        frozen and not adapted: 0 weights
    """
    layers = require_layers(model)
    of_layers = {id(p) for layer in layers.values() for p in layer.parameters()}
    # each weight once, since layers may share it; N * K, since a quantised one is packed
    covered = sum({id(layer.weight): layer.out_features * layer.in_features for layer in layers.values()}.values())
    others = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in of_layers)
    return Summary(
        adapted={name: (type(layer).__name__, *layer.shape[:2], layer.rank) for name, layer in layers.items()},
        trained={name: p.numel() for name, p in named_parameters(model) if p.requires_grad and id(p) not in of_layers},
        frozen=dict(_frozen(model, of_layers)),
        support_values=sum(p.numel() for layer in layers.values() for p in layer.support_parameters()),
        path_values=count_parameters(model),
        coverage=covered / (covered + others),
    )


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many values train, in one line, as PEFT's method of this name does.

    What trains are the support tensors that the current paths read, and the heads (whatever else requires grad). A
    supernet stores more, of which each path reads a part: search limits and :func:`glora.count_parameters` count what
    is read. All parameters are those of the model without GLoRA, and what GLoRA stores.

    Raises:
        ValueError: ``model`` has no adapted layer.

    Example:
        >>> glora.print_trainable_parameters(model)
        trainable params: 1,256,548 (paths 1,179,648, heads 76,900) || stored: 3,041,664 || all params: ...
    """
    found = summary(model)
    heads = sum(found.trained.values())
    trained = found.path_values + heads
    layers = require_layers(model)
    weights = {id(layer.weight): layer.out_features * layer.in_features for layer in layers.values()}
    every = sum(weights.get(id(p), p.numel()) for p in model.parameters())  # a quantised weight is packed
    print(
        f"trainable params: {trained:,} (paths {found.path_values:,}, heads {heads:,}) || stored: "
        f"{found.support_values:,} || all params: {every:,} || trainable%: {trained / every:.4%}"
    )


def unadaptable(
    named: Mapping[str, nn.Module], kinds: Iterable[type[nn.Module]], read: Container[nn.Module]
) -> list[str]:
    """The names of modules that look like ``kinds`` but cannot be adapted, or whose weights are ``read``."""
    kinds = tuple(kinds)
    matrices = sum(p.numel() for module in set(named.values()) for p in module.parameters(False) if p.ndim >= 2)
    projections = {m.out_proj for m in named.values() if isinstance(m, nn.MultiheadAttention)}
    found: dict[nn.Module, str] = {}
    for name, module in named.items():
        bypassed = isinstance(module, kinds) and module in read
        subclass = isinstance(module, kinds) and type(module) not in kinds and module not in projections
        stacks = [p for p in module.parameters(recurse=False) if _is_stack(module, p)]
        many = sum(p.numel() for p in stacks) > NOTEWORTHY * matrices
        if bypassed or subclass or isinstance(module, nn.MultiheadAttention) or many:
            found.setdefault(module, name)
    return list(found.values())


def describe(named: Mapping[str, nn.Module]) -> str:
    """Kinds and first names of modules (if any has parameters, only those): ``28 FalconLinear ('h.0.mlp.up', ...)``."""
    shown = {n: m for n, m in named.items() if any(True for _ in m.parameters(recurse=False))} or named
    names: dict[str, list[str]] = {}
    for name, module in shown.items():
        names.setdefault(type(module).__name__, []).append(name)
    return ", ".join(f"{len(each)} {kind} ({listed(each, 3)})" for kind, each in names.items())


def _frozen(model: nn.Module, of_layers: set[int]) -> Iterable[tuple[str, str]]:
    read = read_by_others(model.modules(), always=True)
    users = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for prefix, module in named_modules(model):
        if isinstance(module, GLoRALayer):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad or parameter.ndim < 2:
                continue
            if users[id(parameter)] > 1:
                layer = " that is adapted" if id(parameter) in of_layers else ""
                yield name, f"{qualified_name(type(module))}, tied to another module{layer}"
            elif module in read:
                yield name, f"{qualified_name(type(module))}, which {read[module]} reads without calling it"
            else:
                yield name, _reason(module, parameter)


def _reason(module: nn.Module, parameter: Tensor) -> str:
    kinds = tuple(adapters())
    if type(module) is nn.Conv2d:
        return "torch.nn.Conv2d, not among the targets or without convolutions=True"
    if type(module) in kinds:
        return f"{qualified_name(type(module))}, not among the targets"
    if isinstance(module, nn.MultiheadAttention) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "torch.nn.MultiheadAttention, which reads its weights without calling a layer"
    if isinstance(module, kinds):
        return f"{qualified_name(type(module))}, a subclass, which may compute something else"
    if _is_stack(module, parameter):
        return f"{qualified_name(type(module))}, several matrices in one parameter"
    return f"{qualified_name(type(module))}, which GLoRA does not adapt"


def _is_stack(module: nn.Module, parameter: Tensor) -> bool:
    if isinstance(module, ONE_DIMENSIONAL) or type(module).__module__.startswith("torch.nn."):
        return False
    return parameter.ndim == 3 and min(parameter.shape) > 1


def _shortened(items: Iterable[tuple[str, int]], limit: int = 8) -> list[tuple[str, int]]:
    every = list(items)
    rest = every[limit:]
    return every if not rest else [*every[:limit], (f"and {len(rest)} more", sum(count for _, count in rest))]
