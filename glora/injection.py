"""Putting GLoRA into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from .layer import GLoRALinear, qualified_name
from .modules import glora_layers, matches, replace_modules

DEFAULT_EXCLUDE = ("head",)


def inject(
    model: nn.Module,
    rank: int = 8,
    *,
    targets: Iterable[str] | None = None,
    exclude: Iterable[str] = DEFAULT_EXCLUDE,
    product: str = "hadamard",
) -> nn.Module:
    """Replace linear layers of ``model`` by :class:`GLoRALinear`, in place; outputs stay the same.

    Then only support tensors require grad, and whatever the excluded modules left trainable (the
    classifier head). A name selects a module if its dotted components occur in a row in the
    module's: ``"qkv"``, ``"mlp.fc1"``, ``"blocks.11"``; never by a part of a component.

    Args:
        rank: the largest rank a path may ask for.
        targets: names of layers to adapt; None for every ``nn.Linear``.
        exclude: names of modules that are left exactly as they are.
        product: ``"hadamard"`` or ``"matmul"``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an empty, repeated or unmatched name; nothing to adapt; a model adapted
            before. The model is unchanged then.
        TypeError: a target that is an ``nn.Linear`` subclass, which may compute something else; one
            with hooks, pruning or weight norm; one that an ``nn.TransformerEncoderLayer`` reads directly.
    """
    targets = None if targets is None else _checked_names("targets", targets)
    excluded = _checked_names("exclude", exclude)
    if glora_layers(model):
        raise ValueError("model: expected a model without GLoRA, it holds GLoRALinear layers already")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a model that contains linear layers; use GLoRALinear.from_linear for one layer"
        )
    # with every name of a shared module: each of them may be a target, or excluded
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if targets is not None:
        _check_matched("targets", targets, list(named))
    if excluded != DEFAULT_EXCLUDE:
        _check_matched("exclude", excluded, list(named))

    left_alone = {module for name, module in named.items() if any(matches(name, pattern) for pattern in excluded)}
    kept = {id(p) for module in left_alone for p in module.parameters()}
    adapt(model, _choose(named, targets, left_alone), rank, product, kept)
    return model


def adapt(model: nn.Module, linears: Iterable[nn.Linear], rank: int, product: str, kept: set[int]) -> None:
    """Replace exactly ``linears``, and freeze every parameter of ``model`` whose id is not ``kept``.

    Raises:
        TypeError: one of ``linears`` cannot be replaced (see :func:`inject`); the model is unchanged then.
    """
    linears = list(linears)
    _refuse_read_directly(model, linears)
    replacements: dict[nn.Module, nn.Module] = {}
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    try:
        for linear in linears:
            replacements[linear] = GLoRALinear.from_linear(linear, rank, product)
    except Exception:
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        raise
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    replace_modules(model, replacements)


def _choose(
    named: Mapping[str, nn.Module], targets: tuple[str, ...] | None, left_alone: set[nn.Module]
) -> list[nn.Linear]:
    chosen: dict[nn.Linear, None] = {}
    for name, module in named.items():
        if module in left_alone or not isinstance(module, nn.Linear):
            continue
        selected = targets is None or any(matches(name, pattern) for pattern in targets)
        if not selected:
            continue
        if type(module) is nn.Linear:
            chosen[module] = None
        elif targets is not None:
            kind = qualified_name(type(module))
            raise TypeError(f"targets: expected exactly torch.nn.Linear at {name!r}, got its subclass {kind}")
    if not chosen:
        scope = "" if targets is None else f" among targets {list(targets)}"
        raise ValueError(f"model: expected at least one nn.Linear to adapt{scope}, found none")
    return list(chosen)


def _refuse_read_directly(model: nn.Module, linears: list[nn.Linear]) -> None:
    names = {module: name for name, module in model.named_modules()}
    for module in names:
        if not isinstance(module, nn.TransformerEncoderLayer):
            continue
        for child in (module.linear1, module.linear2):
            if child in linears:
                raise TypeError(
                    f"model: {names[child]!r} belongs to an nn.TransformerEncoderLayer, whose fast path reads its "
                    "weight without calling it; exclude it"
                )


def _checked_names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        got = f"the string {names!r}; write ({names!r},)" if isinstance(names, str) else repr(names)
        raise ValueError(f"{argument}: expected a list of names, got {got}")
    checked = tuple(names)
    for name in checked:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{argument}: expected non-empty names, got {name!r}")
    repeated = sorted({name for name in checked if checked.count(name) > 1})
    if repeated:
        raise ValueError(f"{argument}: expected each name once, got {repeated} more than once")
    return checked


def _check_matched(argument: str, patterns: tuple[str, ...], names: list[str]) -> None:
    missing = [pattern for pattern in patterns if not any(matches(name, pattern) for name in names)]
    if missing:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names} - {str(i) for i in range(1000)})
        raise ValueError(f"{argument}: {missing} match no module; components of this model's names: {leaves}")
