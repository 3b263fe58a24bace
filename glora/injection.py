"""Putting GLoRA into a model."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping, Sequence

from torch import nn

from .distributed import holds_shards
from .layers.adapters import adapted, adapters
from .layers.packages import is_a
from .layers.plain import qualified_name
from .model_summary import describe, unadaptable
from .models.heads import find_heads, loose_parameters
from .models.modules import glora_layers, matches, replace_modules, require_model
from .models.pretrained import guard_saving
from .models.readers import read_by_others, read_by_torch, warn_of_readers
from .models.wrappers import compiled_modules, is_fsdp1, modules_by_name, named_modules
from .presets import apply_preset, preset_named, require_bias_for


def inject(
    model: nn.Module,
    rank: int = 8,
    *,
    targets: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    heads: Iterable[str] | None = None,
    product: str | None = None,
    convolutions: bool = False,
    preset: str | None = None,
) -> nn.Module:
    """Replace linear layers of ``model`` by :class:`GLoRALinear`, in place; outputs stay the same.

    Then only three things require grad: the support tensors, the heads, and whatever the excluded modules left
    trainable. :func:`glora.summary` says what became of every weight. A frozen weight may be tied to other modules: it
    stays tied, and each adapted layer has support tensors of its own. A name selects a module if its dotted components
    are consecutive components of the module's name: ``"qkv"``, ``"mlp.fc1"``, ``"blocks.11"``; parts of one never do.

    Args:
        rank: the largest rank a path may ask for.
        targets: names of layers to adapt; None for every ``nn.Linear``, and every ``Conv1D`` of Hugging Face's GPT-2.
        exclude: names of modules, apart from the heads, that are left exactly as they are.
        heads: names of modules that are not adapted and train in full; ``()`` for none. None recognises them: timm's
            ``get_classifier()``, the modules beside the base model of a Transformers model (``classifier``, ``score``,
            ``lm_head``), and ``fc``, ``classifier`` and ``head`` of other models. In recognised heads, a parameter that
            is shared with the rest of the model (a tied ``lm_head``) is frozen, and one that was frozen before stays
            so. If a target selects nothing outside recognised heads, what it selects is adapted instead.
        product: ``"hadamard"`` or ``"matmul"``; None: the one that the preset needs, else ``"hadamard"``.
        convolutions: adapt every ``nn.Conv2d`` too (:class:`GLoRAConv2d`), or those among the targets.
        preset: a method by name, such as ``"lora"``, as one path of rank ``rank`` (:func:`glora.apply_preset`).

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an empty, repeated or unmatched name; a target with nothing that can be adapted; nothing to adapt; a
            model adapted before; a layer that shares a trainable parameter with a named head or an excluded module. The
            model is unchanged then.
        TypeError: a model within ``DistributedDataParallel`` or another wrapper that has seen its parameters, or one
            that PEFT has adapted; a target of a subclass of what is adapted, which may compute something else, or one
            that another module reads and never calls; a layer with hooks, pruning or weight norm, one compiled on
            its own, or one that an ``nn.TransformerEncoderLayer`` or ``nn.MultiheadAttention`` reads directly.

    Warns:
        UserWarning: linear weights stay frozen because they cannot be adapted (a subclass of ``nn.Linear``, attention
            of PyTorch's own, several matrices in one parameter, a layer that another module reads and never calls);
            another module reads the weight of an adapted layer in some branch; a recognised head was frozen before.

    Example:
        >>> model = glora.inject(torchvision.models.resnet18(), rank=4, convolutions=True)
        >>> model.fc.weight.requires_grad, type(model.conv1).__name__
        (True, 'GLoRAConv2d')
        >>> glora.inject(llama, 8, targets=("q_proj", "v_proj"), heads=(), preset="lora")
    """
    wanted = None if preset is None else preset_named(preset, "preset")
    needed = None if wanted is None else wanted.product
    if needed is not None and product not in (None, needed):
        raise ValueError(f"product: expected {needed!r} for the preset {preset!r}, got {product!r}")
    if product is None:
        product = "hadamard" if needed is None else needed
    require_model(model)
    targets = None if targets is None else _checked_names("targets", targets)
    excluded = _checked_names("exclude", exclude)
    named_heads = None if heads is None else _checked_names("heads", heads)
    require_free(model)
    if glora_layers(model):
        raise ValueError("model: expected a model without GLoRA, it holds adapted layers already")
    kinds = [kind for kind in adapters() if convolutions or kind is not nn.Conv2d]
    if isinstance(model, tuple(kinds)):
        raise ValueError(
            "model: expected a model that contains linear layers; use GLoRALinear.from_linear for one layer"
        )
    # all names of a shared module: any of them may be a target, or excluded
    named = {name: module for name, module in modules_by_name(model).items() if name}
    for argument, names in (("targets", targets), ("exclude", excluded), ("heads", named_heads)):
        _check_matched(argument, names or (), list(named))

    recognised = find_heads(model) if named_heads is None else {}
    heads_in_full = _selected(named, named_heads or ())
    left_alone = _selected(named, excluded)
    if both := [name for name, module in named.items() if module in heads_in_full & left_alone]:
        raise ValueError(f"heads: expected none of the excluded modules, which are left as they are, got {both}")
    head_modules = _not_targeted(recognised, targets, named) | heads_in_full
    spared = left_alone | head_modules
    if targets is not None:
        _check_targets(targets, named, left_alone, head_modules, kinds)
    considered = {
        name: module
        for name, module in named.items()
        if module not in spared and (targets is None or any(matches(name, target) for target in targets))
    }
    read = read_by_others(model.modules(), always=True)
    chosen = _choose(considered, targets, kinds, {**read_by_torch(model.modules()), **read}, read)
    if not chosen:
        scope = "" if targets is None else f" among targets {list(targets)}"
        hints = _hints(considered, kinds, recognised, read)
        raise ValueError(f"model: expected at least one {_wanted(kinds)} to adapt{scope}, found none{hints}")
    if wanted is not None:
        require_bias_for(wanted, any(getattr(module, "bias", None) is not None for module in chosen))
    kept = _own_parameters(left_alone | heads_in_full)
    _check_kept(model, chosen, kept)
    kept |= _own_parameters(head_modules) - _own_parameters(set(model.modules()) - head_modules)
    kept |= loose_parameters(model) if named_heads is None else set()
    frozen = [
        name
        for name, head in recognised.items()
        if head in head_modules and not any(p.requires_grad for p in head.parameters())
    ]
    adapt(model, dict.fromkeys(chosen, rank), product, kept)
    for parameter in (p for module in heads_in_full for p in module.parameters() if p.is_floating_point()):
        parameter.requires_grad_(True)
    if frozen:
        warnings.warn(
            f"inject: the heads {frozen} were frozen before and do not train; heads={list(recognised)} trains them",
            stacklevel=2,
        )
    _warn_of_unadaptable(considered, kinds, read)
    return model if wanted is None else apply_preset(model, wanted.name, rank)


def adapt(model: nn.Module, ranks: Mapping[nn.Module, int], product: str, kept: set[int]) -> None:
    """Replace exactly the modules of ``ranks``, and freeze every parameter of ``model`` whose id is not in ``kept``.

    Raises:
        TypeError: one of the modules cannot be replaced (see :func:`inject`); the model is unchanged then.
    """
    require_free(model)
    names = {module: name for name, module in named_modules(model)}
    readers = read_by_torch(names)
    for module in ranks:
        if module in readers:
            raise _bypassed(names[module], readers[module])
    for module in compiled_modules(model):  # their wrappers would go on calling them
        if module in ranks:
            raise TypeError(f"model: expected {names[module]!r} not compiled by itself; compile it afterwards")
    replacements: dict[nn.Module, nn.Module] = {}
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    try:
        for module, rank in ranks.items():
            replacements[module] = adapted(module, rank, product)
    except Exception as error:
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        raise type(error)(f"{error} (layer {names[module]!r})") from None
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    replace_modules(model, replacements)
    guard_saving(model)
    warn_of_readers(model, {new: names[old] for old, new in replacements.items()})


def require_free(model: nn.Module) -> None:
    """Raise TypeError for a model that something else holds on to: it would go on with parameters that are replaced."""
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        if isinstance(module, nn.parallel.DistributedDataParallel) or is_fsdp1(module):
            kind = type(module).__name__
            raise TypeError(
                f"model: expected one that is not wrapped yet, got {kind} ({where}), which has noted the parameters of "
                f"before; inject first: {kind}(glora.inject(model))"
            )
        if is_a(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
            raise TypeError(
                f"model: expected one that no other library has adapted, got PEFT's {type(module).__name__} ({where}); "
                "merge it first (merge_and_unload), or give glora.inject the model as it was"
            )
    if holds_shards(model):
        raise TypeError(
            "model: expected one that is not sharded yet, got the parameters of fully_shard; inject first: "
            "fully_shard(glora.inject(model))"
        )


def _selected(named: Mapping[str, nn.Module], patterns: Iterable[str]) -> set[nn.Module]:
    return {module for name, module in named.items() if any(matches(name, pattern) for pattern in patterns)}


def _not_targeted(
    heads: Mapping[str, nn.Module], targets: tuple[str, ...] | None, named: Mapping[str, nn.Module]
) -> set[nn.Module]:
    """The modules of ``heads`` to leave alone: all, except those of a target that selects nothing outside heads."""
    parts = {part for head in heads.values() for part in head.modules()}
    selections = [_selected(named, [target]) for target in targets or ()]
    return parts - {module for selection in selections if selection <= parts for module in selection}


def _own_parameters(modules: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters that ``modules`` hold themselves, not through children."""
    return {id(p) for module in modules for p in module.parameters(recurse=False)}


def _choose(
    considered: Mapping[str, nn.Module],
    targets: tuple[str, ...] | None,
    kinds: Sequence[type[nn.Module]],
    bypassed: Mapping[nn.Module, str],
    never_called: Container[nn.Module],
) -> list[nn.Module]:
    """The modules to adapt. Raises TypeError if a target selects one of the right kind that cannot be adapted."""
    chosen: dict[nn.Module, None] = {}
    for name, module in considered.items():
        if not isinstance(module, tuple(kinds)):
            continue
        if targets is not None and module in bypassed:
            raise _bypassed(name, bypassed[module])
        if module in never_called:
            continue
        if type(module) in kinds:
            chosen[module] = None
        elif targets is not None:
            base = next(qualified_name(kind) for kind in kinds if isinstance(module, kind))
            kind = qualified_name(type(module))
            raise TypeError(
                f"targets: expected exactly {base} at {name!r}, got its subclass {kind}, which may compute "
                f"something else; exclude it, or put a {base} in its place"
            )
    return list(chosen)


def _wanted(kinds: Sequence[type[nn.Module]]) -> str:
    return "nn.Linear or nn.Conv2d" if nn.Conv2d in kinds else "nn.Linear"


def _hints(
    considered: Mapping[str, nn.Module],
    kinds: Sequence[type[nn.Module]],
    heads: Mapping[str, nn.Module],
    read: Container[nn.Module],
) -> str:
    """What else the caller might have meant, and what cannot be adapted, for an error."""
    hints = []
    if others := unadaptable(considered, kinds, read):
        hints.append(f"it cannot adapt {describe({name: considered[name] for name in others})}")
    convolutions = sum(type(module) is nn.Conv2d for module in set(considered.values()))
    if convolutions and nn.Conv2d not in kinds:
        hints.append(f"convolutions=True adapts its {convolutions} nn.Conv2d")
    if any(isinstance(part, tuple(kinds)) for head in heads.values() for part in head.modules()):
        hints.append(f"{list(heads)} is taken for the head, which trains in full; heads=() adapts it too")
    return "".join(f"; {hint}" for hint in hints)


def _bypassed(name: str, reader: str) -> TypeError:
    return TypeError(f"model: {name!r} belongs to {reader}, which reads its weight without calling it; exclude it")


def _check_kept(model: nn.Module, chosen: Iterable[nn.Module], kept: set[int]) -> None:
    """Raise ValueError if an excluded module or a head would still train a parameter that an adapted layer freezes."""
    frozen = {id(p) for module in chosen for p in module.parameters() if p.requires_grad}
    if frozen & kept:
        named = model.named_parameters(remove_duplicate=False)
        names = [name for name, p in named if id(p) in frozen & kept]
        raise ValueError(
            "exclude, heads: expected modules that share no trainable parameter with an adapted layer, got one named "
            f"{names}; name all of them, or freeze it first"
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


def _check_targets(
    targets: tuple[str, ...],
    named: Mapping[str, nn.Module],
    left_alone: set[nn.Module],
    heads: set[nn.Module],
    kinds: Sequence[type[nn.Module]],
) -> None:
    """Raise ValueError for a target that selects nothing that can be adapted."""
    for pattern in targets:
        selected = {name: module for name, module in named.items() if matches(name, pattern)}
        adaptable = {module for module in selected.values() if isinstance(module, tuple(kinds))}
        if adaptable - left_alone - heads:
            continue
        if adaptable:
            what = "heads, which train in full" if adaptable & heads else "what exclude= leaves alone"
            raise ValueError(f"targets: {pattern!r} selects nothing but {what}")
        if any(isinstance(module, nn.Conv2d) for module in selected.values()):
            raise ValueError(f"targets: {pattern!r} selects convolutions, which are adapted with convolutions=True")
        raise ValueError(
            f"targets: {pattern!r} selects no {_wanted(kinds)}, which is what can be adapted, but {describe(selected)}"
        )


def _warn_of_unadaptable(
    named: Mapping[str, nn.Module], kinds: Sequence[type[nn.Module]], read: Container[nn.Module]
) -> None:
    """Warn of linear weights that stay frozen although the caller did not ask for that."""
    found = unadaptable(named, kinds, read)
    if found:
        warnings.warn(
            f"inject: {len(found)} modules with linear weights cannot be adapted and stay frozen: "
            f"{describe({name: named[name] for name in found})}; glora.summary(model) tells why",
            stacklevel=3,
        )


def _check_matched(argument: str, patterns: tuple[str, ...], names: list[str]) -> None:
    missing = [pattern for pattern in patterns if not any(matches(name, pattern) for name in names)]
    if missing:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names} - {str(i) for i in range(1000)})
        raise ValueError(f"{argument}: {missing} match no module; components of this model's names: {leaves}")
