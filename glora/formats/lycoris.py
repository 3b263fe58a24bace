"""Adapters of LyCORIS, ComfyUI and A1111: safetensors in the matmul product, A and B of low rank.

Layer ``blocks.0.fc1`` is ``<prefix>_blocks_0_fc1`` in the file. With s = alpha / R, its effective weight is

    new (LyCORIS from 3.0 on)     W0 + s (W0 a1 a2 + b1 b2)    a1 (K, R), a2 (R, K), b1 (N, R), b2 (R, K)
    old (LyCORIS up to 2, A1111)  W0 + s (W0 a2 a1 + b2 b1)    a1 (R, K), a2 (K, R), b1 (R, K), b2 (N, R)

ComfyUI reads both (its issue 4755) and tells them apart by these shapes, as is done here.

A convolution of I channels and a kernel of P = kh kw positions has K = I P columns. The file's B is ours, as kernels:
``b1 (N, R, 1, 1)``, ``b2 (R, I, kh, kw)``. Its A is not: ``a1 (I, R, 1, 1)`` and ``a2 (R, I, 1, 1)`` mix channels in
the same way at every position p,

    (W0 a1 a2)[n, j, p] = sum_i W0[n, i, p] (a1 a2)[i, j],    in our form A = (a1 x 1) (a2 x 1),

x the Kronecker product with the identity of size P. So a file's A of rank R is ours of rank R P, exactly. Ours of
P > 1 can be written only if it has this form, which training does not preserve. The old layout has only P = 1. With
groups there is no common form: a1, a2 and b2 span the channels of all groups, where our W_eff has those of one.

Sources: ``lycoris/modules/glora.py`` of LyCORIS 2.2 and 4.1, ``comfy/weight_adapter/glora.py`` of ComfyUI,
``network_glora.py`` of A1111's web interface (linear layers only).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import PathConfig
from ..distributed import require_whole
from ..files import require_file, write_atomically
from ..injection import adapt
from ..layers.base import GLoRALayer
from ..layers.conv2d import GLoRAConv2d
from ..layers.linear import GLoRALinear
from ..layers.plain import qualified_name
from ..models.contents import check_written, require_floating, require_same_layers, warn_of_buffers
from ..models.modules import glora_layers, require_layers, require_real
from ..models.wrappers import key_in, modules_by_name, named_modules, named_parameters
from ..parameters import trained_beside
from ..paths import require_unused, set_paths

# Which of the file's factors are Ad, Au, Bd and Bu.
LAYOUTS = {"new": ("a1", "a2", "b1", "b2"), "old": ("a2", "a1", "b2", "b1")}
# The prefixes of LyCORIS' wrapper for any model, and of its networks for kohya's trainers.
PREFIXES = ("lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2")
ENTRIES = ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha")


def save_lycoris(
    model: nn.Module,
    file: str | os.PathLike,
    *,
    prefix: str = "lycoris",
    layout: str = "new",
    adapters_only: bool = False,
) -> None:
    """Write what the current paths read of A and B, at alpha = R.

    R is the larger rank of a layer's A and B (1 if both are ``none``); the smaller one is padded with zeros.
    A square layer whose rank is its full width has the same shapes in both layouts: ComfyUI reads it as old. For a
    convolution the file says what its weights become (until they are merged, LyCORIS' own layers pad the adapter's
    part with zeros, whatever the ``padding_mode``).

    Args:
        prefix: ``"lycoris"`` for LyCORIS' own wrapper, ``"lora_unet"`` and the like for image generators.
        layout: ``"new"``, or ``"old"`` for A1111 and LyCORIS before 3.0.
        adapters_only: leave out other trained parameters, such as a classifier head, which the format cannot hold.

    Raises:
        ValueError: no adapted layer; layers that LyCORIS cannot express, with the reason for each: neither linear nor
            a convolution without groups; a path with C, D or E, or with A or B neither low rank (A in the matmul
            product) nor ``none``; an A of a kernel above 1 x 1 that is not the same at every position, as after
            training here (see the equation at the top of this module); any path of such a kernel in the old layout;
            two layers of one name in the file; other trained parameters, without ``adapters_only``; a file name that
            does not end in ``.safetensors``. Nothing is written then.

    Warns:
        UserWarning: statistics of norm layers and other buffers, which the format has no place for; parameters that
            are not finite.
    """
    from safetensors.torch import save

    _check_options(prefix, layout)
    if not os.fspath(file).endswith(".safetensors"):
        raise ValueError(f"file: expected a name in .safetensors, by which LyCORIS knows it, got {os.fspath(file)!r}")
    require_whole(model)
    require_file("file", file)
    layers = require_layers(model)
    unfit = [f"{name} ({what})" for name, layer in layers.items() if (what := _inexpressible(layer, layout))]
    if unfit:
        raise ValueError(
            "model: expected linear layers and convolutions, A of low rank in the matmul product or none, B of low "
            f"rank or none, and C, D and E none, which is what LyCORIS can express; got {unfit}"
        )
    if not adapters_only:
        _refuse_other_trained(model, layers)
    tensors = {}
    for name, key in _keys(layers, prefix).items():
        tensors.update({f"{key}.{entry}": tensor for entry, tensor in _entries(layers[name], layout).items()})
    check_written(tensors)
    warn_of_buffers(model, layers.values())
    content = save(tensors)
    write_atomically(file, lambda stream: stream.write(content))


def load_lycoris(
    model: nn.Module, file: str | os.PathLike, *, prefix: str | None = None, layout: str | None = None
) -> nn.Module:
    """Load a GLoRA of LyCORIS or :func:`save_lycoris`; a model without GLoRA gets it injected into the file's layers.

    These are linear layers and ``nn.Conv2d`` without groups. A of rank R in a convolution of P = kh kw positions is
    read as one of rank R P (:mod:`glora.formats.lycoris`); a layer is injected with the rank that it needs.

    s = alpha / R is folded into Ad and Bd: exactly if it is a power of two, else with one rounding of each value. A
    file without alpha has s = 1, as in ComfyUI; one of rank-stabilised training does not say so and is read with
    alpha / R, as LyCORIS and ComfyUI do. The path's rank of A or B ends at the last component that is not zero in both
    factors. Support tensors that the file does not hold are reset. Everything is checked before anything is changed.

    Args:
        prefix: what the file's names begin with; None finds it among "lycoris", "lora_unet", "lora_te", "lora_te1" and
            "lora_te2". A file for several models is loaded once for each: a given prefix leaves all
            other names alone.
        layout: ``"new"`` or ``"old"``; None to tell from the shapes.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no LyCORIS GLoRA of linear layers and 2-D convolutions, damaged, or made for another model; names
            that fit several layers, several prefixes, or shapes that fit both layouts; convolutions with groups, by
            name; an alpha of 0, which LyCORIS reads as s = 1 and ComfyUI as s = 0; factors that are not finite or
            cease to be when s is folded in.
        TypeError: a layer of a subclass of ``nn.Linear`` or ``nn.Conv2d``, or that cannot be replaced; see
            :func:`glora.inject`.
    """
    _check_options("lycoris" if prefix is None else prefix, "new" if layout is None else layout)
    require_real(model)
    require_whole(model)
    layers, modules = glora_layers(model), modules_by_name(model)
    require_unused(layers.values())
    found = _resolve(model, _read(file), prefix, file)
    used = _layout(modules, found, layout, file)
    adapters = {
        name: _folded(name, entries, used, _form(modules[name]).positions, file) for name, entries in found.items()
    }
    _check_fit(modules, layers, adapters, file)
    if not layers:
        ranks = {modules[name]: adapter.storage_rank for name, adapter in adapters.items()}
        adapt(model, ranks, "matmul", kept=set())
        layers = glora_layers(model)
    for name, layer in layers.items():
        adapters[name].copy_into(layer)
    set_paths(model, {name: adapters[name].path for name in layers})
    return model


class _Form(NamedTuple):
    """What the shapes of a layer's factors depend on; the kernel of a linear layer is ``()``."""

    outputs: int
    channels: int
    kernel: tuple[int, ...]

    @property
    def positions(self) -> int:
        return math.prod(self.kernel)

    def shapes(self, rank: int) -> list[tuple[int, ...]]:
        """The shapes of Ad, Au, Bd and Bu in a file."""
        point = (1,) * len(self.kernel)
        sides = [(self.channels, rank), (rank, self.channels), (self.outputs, rank)]
        return [*((*side, *point) for side in sides), (rank, self.channels, *self.kernel)]


def _form(module: Any) -> _Form:
    if isinstance(module, (nn.Conv2d, GLoRAConv2d)):
        return _Form(module.out_channels, module.in_channels, tuple(module.kernel_size))
    return _Form(module.out_features, module.in_features, ())


class _Adapter(NamedTuple):
    """A layer's factors in fp64, s folded in, and the path that reads them."""

    Ad: Tensor  # (I, R): K / positions rows
    Au: Tensor  # (R, I)
    Bd: Tensor  # (N, R)
    Bu: Tensor  # (R, K)
    positions: int
    path: PathConfig

    @property
    def storage_rank(self) -> int:
        return max(self.Ad.shape[1], self.path.rank)

    @torch.no_grad()
    def copy_into(self, layer: GLoRALayer) -> None:
        layer.reset_support()
        factors = (_everywhere(self.Ad, self.positions), _everywhere(self.Au, self.positions), self.Bd, self.Bu)
        for slot, down, up in zip("AB", factors[::2], factors[1::2]):
            rank = self.path.choices[slot].rank
            getattr(layer, f"{slot}d")[:, :rank] = down[:, :rank]
            getattr(layer, f"{slot}u")[:rank] = up[:rank]


def _everywhere(factor: Tensor, positions: int) -> Tensor:
    """The factor that mixes channels like ``factor``, at every position of a kernel separately."""
    return torch.kron(factor, torch.eye(positions, dtype=factor.dtype, device=factor.device))


def _live_rank(down: Tensor, up: Tensor) -> int:
    """The number of ranks up to the last one in use. A rank whose two factors are zero gets no gradient."""
    live = ((down != 0).any(0) | (up != 0).any(1)).nonzero()
    return int(live.max()) + 1 if live.numel() else 0


# -- writing -----------------------------------------------------------------------------------------


def _inexpressible(layer: GLoRALayer, layout: str) -> str:
    """What LyCORIS has no place for in a layer; empty if it can hold everything."""
    if not isinstance(layer, (GLoRALinear, GLoRAConv2d)):
        return type(layer).__name__
    path, positions = layer.path, _form(layer).positions
    lost = [slot for slot in "AB" if path.choices[slot].kind not in ("lora", "none")]
    # D scales a bias: without one it has no effect
    lost += [slot for slot in "CDE" if path.choices[slot].kind != "none" and (slot != "D" or layer.bias is not None)]
    reasons = [f"{slot}={getattr(path, slot)}" for slot in lost]
    if path.choices["A"].kind == "lora":
        if layer.product != "matmul":
            reasons.append(f"A={path.A} in the {layer.product} product")
        elif positions > 1 and not _alike_everywhere(layer, positions):
            reasons.append(f"A={path.A} that is not the same at each of the {positions} positions of the kernel")
    if isinstance(layer, GLoRAConv2d) and layer.groups > 1:
        reasons.append(f"groups={layer.groups}")
    if layout == "old" and positions > 1:
        reasons.append(f"a kernel of {positions} positions in the old layout")
    return ", ".join(reasons)


def _alike_everywhere(layer: GLoRALayer, positions: int) -> bool:
    """Whether A mixes channels in the same way at every position, and so comes from factors without positions."""
    rank = layer.path.choices["A"].rank
    storages = layer.folded()
    factors = storages["Ad"].detach()[:, :rank], storages["Au"].detach()[:rank]
    return rank % positions == 0 and all(
        torch.equal(factor, _everywhere(factor[::positions, ::positions], positions)) for factor in factors
    )


def _refuse_other_trained(model: nn.Module, layers: dict[str, GLoRALayer]) -> None:
    trained = trained_beside(model, layers)
    others = [name for name, p in named_parameters(model) if id(p) in trained]
    if others:
        raise ValueError(
            f"model: expected nothing trained beside the adapters, got {others}, which the format cannot hold; "
            "save them elsewhere and pass adapters_only=True"
        )


def _keys(layers: dict[str, GLoRALayer], prefix: str) -> dict[str, str]:
    keys = {name: _key(prefix, name) for name in layers}
    counts = Counter(keys.values())
    repeated = sorted(name for name, key in keys.items() if counts[key] > 1)
    if repeated:
        raise ValueError(f"model: expected names that differ when dots become underscores, got {repeated}")
    return keys


def _key(prefix: str, name: str) -> str:
    return f"{prefix}_{name}".replace(".", "_")


def _entries(layer: GLoRALayer, layout: str) -> dict[str, Tensor]:
    form, choices = _form(layer), layer.path.choices
    step, read_A, read_B = form.positions, choices["A"].rank, choices["B"].rank
    Ad, Au, Bd, Bu, *_ = layer.folded().values()
    read = [Ad[::step, :read_A:step], Au[:read_A:step, ::step], Bd[:, :read_B], Bu[:read_B]]
    rank = max(read_A // step, read_B, 1)
    entries = {"alpha": torch.tensor(float(rank))}
    for name, part, shape in zip(LAYOUTS[layout], read, form.shapes(rank)):
        entries[f"{name}.weight"] = factor = part.detach().new_zeros(shape)
        if part.numel():
            factor.flatten(1)[: part.shape[0], : part.shape[1]] = part.detach()
    return entries


# -- reading -----------------------------------------------------------------------------------------


def _check_options(prefix: str, layout: str) -> None:
    if not isinstance(prefix, str) or not prefix or "." in prefix:
        raise ValueError(f"prefix: expected a text without dots such as 'lycoris', got {prefix!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {list(LAYOUTS)}, got {layout!r}")


def _read(file: str | os.PathLike) -> dict[str, dict[str, Tensor]]:
    """The file's tensors by their layer's name in it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not os.path.isfile(file):
        raise FileNotFoundError(f"file: expected a LyCORIS file, found none at {os.fspath(file)!r}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, it is damaged or something else ({error})") from None
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, entry = name.partition(".")
        found.setdefault(layer, {})[entry] = tensor
    return found


def _resolve(
    model: nn.Module, found: dict[str, dict[str, Tensor]], prefix: str | None, file: str | os.PathLike
) -> dict[str, dict[str, Tensor]]:
    """``found`` by the model's own names, each entry checked to be a complete GLoRA of one layer."""
    if prefix is None:
        prefix = _only_prefix(found, file)
    else:
        found = {key: entries for key, entries in found.items() if key.startswith(f"{prefix}_")}
        if not found:
            raise ValueError(f"prefix: expected one that {file} has, got {prefix!r}")
    _check_entries(found, file)
    factors = {f"{key}.{entry}": t for key, entries in found.items() for entry, t in entries.items()}
    require_floating(file, {name: t for name, t in factors.items() if not name.endswith("alpha")})
    names: dict[str, list[str]] = {}
    others: dict[str, str] = {}
    for name, module in named_modules(model):
        # the model itself cannot be replaced
        if isinstance(module, (GLoRALinear, GLoRAConv2d)) or (name and isinstance(module, (nn.Linear, nn.Conv2d))):
            names.setdefault(_key(prefix, name), []).append(name)
        else:
            others[_key(prefix, name)] = f" (a {qualified_name(type(module))})"
    found = {key_in(names, prefix, key): entries for key, entries in found.items()}
    unknown = sorted(key for key in found if key not in names)
    if unknown:
        called = [f"{key}{others.get(key, '')}" for key in unknown]
        raise ValueError(
            f"{file}: made for another model: no linear layer or nn.Conv2d is called {called} (prefix {prefix!r})"
        )
    ambiguous = [names[key] for key in found if len(names[key]) > 1]
    if ambiguous:
        raise ValueError(f"{file}: expected names that fit one layer, these layers share theirs: {ambiguous}")
    resolved = {names[key][0]: entries for key, entries in found.items()}
    modules = modules_by_name(model)
    grouped = [name for name in resolved if getattr(modules[name], "groups", 1) > 1]
    if grouped:
        raise ValueError(
            f"{file}: expected convolutions without groups, since a1, a2 and b2 of LyCORIS span the channels of all "
            f"groups; got {grouped}"
        )
    return resolved


def _only_prefix(found: dict[str, dict[str, Tensor]], file: str | os.PathLike) -> str:
    present = [prefix for prefix in PREFIXES if any(key.startswith(f"{prefix}_") for key in found)]
    if len(present) != 1:
        raise ValueError(f"prefix: {file} has {present} of {list(PREFIXES)}, expected one; give the one to load")
    return present[0]


def _check_entries(found: dict[str, dict[str, Tensor]], file: str | os.PathLike) -> None:
    unknown = sorted(f"{key}.{entry}" for key, entries in found.items() for entry in entries if entry not in ENTRIES)
    missing = sorted(
        f"{key}.{entry}" for key, entries in found.items() for entry in ENTRIES[:4] if entry not in entries
    )
    if unknown or missing:
        raise ValueError(
            f"{file}: expected the GLoRA of layers with {list(ENTRIES)} each; missing {missing}, unknown {unknown}"
        )


def _layout(
    modules: Mapping[str, nn.Module], found: dict[str, dict[str, Tensor]], asked: str | None, file: str | os.PathLike
) -> str:
    """The one layout that the shapes of every layer fit."""
    forms = {name: _form(modules[name]) for name in found}
    fits = {name: _fitting(forms[name], entries) for name, entries in found.items()}
    unfit = [
        f"{name}: weight {(form.outputs, form.channels, *form.kernel)}, "
        + ", ".join(f"{entry} {tuple(found[name][entry].shape)}" for entry in ENTRIES[:4])
        for name, form in forms.items()
        if not fits[name] or (asked is not None and asked not in fits[name])
    ]
    if unfit:
        wanted = "a layout" if asked is None else f"the {asked} layout"
        raise ValueError(f"{file}: made for another model: expected shapes of {wanted}, got {unfit}")
    if asked is not None:
        return asked
    common = [layout for layout in LAYOUTS if all(layout in layouts for layouts in fits.values())]
    if len(common) != 1:
        got = "fit both" if common else f"mix them: {fits}"
        raise ValueError(f"layout: expected shapes that fit one of {list(LAYOUTS)}, those of {file} {got}; give one")
    return common[0]


def _fitting(form: _Form, entries: dict[str, Tensor]) -> list[str]:
    fitting = []
    for layout, factors in LAYOUTS.items():
        shapes = [tuple(entries[f"{factor}.weight"].shape) for factor in factors]
        rank = shapes[0][1] if len(shapes[0]) > 1 else 0
        if rank and shapes == form.shapes(rank) and (layout == "new" or form.positions == 1):
            fitting.append(layout)
    return fitting


def _folded(name: str, entries: dict[str, Tensor], layout: str, positions: int, file: str | os.PathLike) -> _Adapter:
    Ad, Au, Bd, Bu = (entries[f"{factor}.weight"].double().flatten(1) for factor in LAYOUTS[layout])
    scale = _scale(name, entries.get("alpha"), Ad.shape[1], file)
    ranks = [_live_rank(Ad, Au) * positions, _live_rank(Bd, Bu)]
    path = PathConfig(*(f"lora_{rank}" if rank else "none" for rank in ranks))
    return _Adapter(Ad * scale, Au, Bd * scale, Bu, positions, path)


def _scale(name: str, alpha: Tensor | None, rank: int, file: str | os.PathLike) -> float:
    if alpha is None:
        return 1.0
    value = float(alpha) if alpha.numel() == 1 else math.nan
    if not math.isfinite(value) or value == 0:
        raise ValueError(f"{file}: expected alpha of layer {name!r} to be one finite number but 0, got {alpha}")
    return value / rank


def _check_fit(
    modules: Mapping[str, Any], layers: dict[str, GLoRALayer], adapters: dict[str, _Adapter], file: str | os.PathLike
) -> None:
    """Raise if the layers differ from those of an adapted model, or if the values do not fit the storages."""
    if layers:
        ranks = {name: adapter.path.rank for name, adapter in adapters.items()}
        require_same_layers(file, layers, ranks, "matmul")
    infinite = []
    for name, adapter in adapters.items():
        module = modules[name]
        dtype = module.Ad.dtype if layers else torch.promote_types(module.weight.dtype, torch.float32)
        if not all(factor.to(dtype).isfinite().all() for factor in adapter[:4]):
            infinite.append(name)
    if infinite:
        raise ValueError(f"{file}: expected finite factors, with alpha / rank folded in too; not so in {infinite}")
