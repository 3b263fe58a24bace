"""Putting GLoRA into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .adapters import adapted, adapters
from .layer import qualified_name
from .modules import glora_layers, matches, replace_modules

DEFAULT_EXCLUDE = ("head",)


def inject(
    model: nn.Module,
    rank: int = 8,
    *,
    targets: Iterable[str] | None = None,
    exclude: Iterable[str] = DEFAULT_EXCLUDE,
    product: str = "hadamard",
    convolutions: bool = False,
) -> nn.Module:
    """Replace linear layers of ``model`` by :class:`GLoRALinear`, in place; outputs stay the same.

    Then only support tensors require grad, and whatever the excluded modules left trainable (the
    classifier head). A frozen weight may be tied to other modules: it stays tied, and each adapted
    layer has support tensors of its own. A name selects a module if its dotted components occur in a row in the
    module's: ``"qkv"``, ``"mlp.fc1"``, ``"blocks.11"``; never by a part of a component.

    Args:
        rank: the largest rank a path may ask for.
        targets: names of layers to adapt; None for every ``nn.Linear``, and every ``Conv1D`` of Hugging Face's GPT-2.
        exclude: names of modules that are left exactly as they are.
        product: ``"hadamard"`` or ``"matmul"``.
        convolutions: adapt every ``nn.Conv2d`` too (:class:`GLoRAConv2d`), or those among the targets.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an empty, repeated or unmatched name; nothing to adapt; a model adapted before;
            a layer that shares a trainable parameter with an excluded module. The model is unchanged then.
        TypeError: a target of a subclass of what is adapted, which may compute something else; one with hooks,
            pruning or weight norm; one that an ``nn.TransformerEncoderLayer`` or ``nn.MultiheadAttention`` reads
            directly.
    """
    targets = None if targets is None else _checked_names("targets", targets)
    excluded = _checked_names("exclude", exclude)
    if glora_layers(model):
        raise ValueError("model: expected a model without GLoRA, it holds adapted layers already")
    kinds = [kind for kind in adapters() if convolutions or kind is not nn.Conv2d]
    if isinstance(model, tuple(kinds)):
        raise ValueError(
            "model: expected a model that contains linear layers; use GLoRALinear.from_linear for one layer"
        )
    # with every name of a shared module: each of them may be a target, or excluded
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if targets is not None:
        _check_matched("targets", targets, list(named))
        _check_convolutions(targets, named, kinds)
    if excluded != DEFAULT_EXCLUDE:
        _check_matched("exclude", excluded, list(named))

    left_alone = {module for name, module in named.items() if any(matches(name, pattern) for pattern in excluded)}
    kept = {id(p) for module in left_alone for p in module.parameters()}
    chosen = _choose(named, targets, left_alone, kinds)
    _check_kept(model, chosen, kept)
    adapt(model, chosen, rank, product, kept)
    return model


def adapt(model: nn.Module, modules: Iterable[nn.Module], rank: int, product: str, kept: set[int]) -> None:
    """Replace exactly ``modules``, and freeze every parameter of ``model`` whose id is not ``kept``.

    Raises:
        TypeError: one of ``modules`` cannot be replaced (see :func:`inject`); the model is unchanged then.
    """
    modules = list(modules)
    readers = _read_directly(model.modules())
    for name, module in model.named_modules():
        if module in readers and module in modules:
            raise _bypassed(name, readers[module])
    replacements: dict[nn.Module, nn.Module] = {}
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    try:
        for module in modules:
            replacements[module] = adapted(module, rank, product)
    except Exception:
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        raise
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    replace_modules(model, replacements)


def _choose(
    named: Mapping[str, nn.Module],
    targets: tuple[str, ...] | None,
    left_alone: set[nn.Module],
    kinds: Sequence[type[nn.Module]],
) -> list[nn.Module]:
    chosen: dict[nn.Module, None] = {}
    readers = _read_directly(named.values())
    for name, module in named.items():
        if module in left_alone or not isinstance(module, tuple(kinds)):
            continue
        selected = targets is None or any(matches(name, pattern) for pattern in targets)
        if not selected:
            continue
        exact = type(module) in kinds
        if module in readers and (exact or targets is not None):
            raise _bypassed(name, readers[module])
        if exact:
            chosen[module] = None
        elif targets is not None:
            base = next(qualified_name(kind) for kind in kinds if isinstance(module, kind))
            kind = qualified_name(type(module))
            raise TypeError(
                f"targets: expected exactly {base} at {name!r}, got its subclass {kind}, which may compute "
                f"something else; exclude it, or put a {base} in its place"
            )
    if not chosen:
        scope = "" if targets is None else f" among targets {list(targets)}"
        wanted = "nn.Linear or nn.Conv2d" if nn.Conv2d in kinds else "nn.Linear"
        raise ValueError(f"model: expected at least one {wanted} to adapt{scope}, found none")
    return list(chosen)


def _read_directly(modules: Iterable[nn.Module]) -> dict[nn.Module, str]:
    """The linear layers whose weights a module of PyTorch's own reads without calling them, and which module does."""
    read: dict[nn.Module, str] = {}
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):
            read |= {module.linear1: "TransformerEncoderLayer", module.linear2: "TransformerEncoderLayer"}
        elif isinstance(module, nn.MultiheadAttention):
            read[module.out_proj] = "MultiheadAttention"
    return read


def _bypassed(name: str, reader: str) -> TypeError:
    return TypeError(
        f"model: {name!r} belongs to an nn.{reader}, which reads its weight without calling it; exclude it"
    )


def _check_kept(model: nn.Module, chosen: Iterable[nn.Module], kept: set[int]) -> None:
    """Raise ValueError if what is excluded would go on training a parameter that an adapted layer freezes."""
    frozen = {id(p) for module in chosen for p in module.parameters() if p.requires_grad}
    if frozen & kept:
        named = model.named_parameters(remove_duplicate=False)
        names = [name for name, p in named if id(p) in frozen & kept]
        raise ValueError(
            "exclude: expected modules that share no trainable parameter with an adapted layer, got one named "
            f"{names}; exclude all of them, or freeze it first"
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


def _check_convolutions(
    targets: tuple[str, ...], named: Mapping[str, nn.Module], kinds: Sequence[type[nn.Module]]
) -> None:
    """A target that selects convolutions and nothing else is not left out in silence."""
    for pattern in targets:
        selected = [module for name, module in named.items() if matches(name, pattern)]
        adaptable = any(isinstance(module, tuple(kinds)) for module in selected)
        if not adaptable and any(isinstance(module, nn.Conv2d) for module in selected):
            raise ValueError(f"targets: {pattern!r} selects convolutions, which are adapted with convolutions=True")


def _check_matched(argument: str, patterns: tuple[str, ...], names: list[str]) -> None:
    missing = [pattern for pattern in patterns if not any(matches(name, pattern) for name in names)]
    if missing:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names} - {str(i) for i in range(1000)})
        raise ValueError(f"{argument}: {missing} match no module; components of this model's names: {leaves}")
