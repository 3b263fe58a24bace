"""One for all: other methods of parameter-efficient fine-tuning as single paths, initialised as those methods are.

Each preset is a path of :class:`glora.PathConfig` under which a layer computes what the method's own equation says,
outputs and gradients; ``docs/presets.md`` has the equations, what is not expressible, and the test of each claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from glora_kernels import LowRank, Vector

from .config import PathConfig
from .distributed import require_whole
from .layers.base import GLoRALayer
from .models.modules import require_layers
from .paths import Paths, set_paths
from .scales import Scales

Initialiser = Callable[[Tensor], object]
_AS_LINEAR: Initialiser = partial(nn.init.kaiming_uniform_, a=math.sqrt(5))  # uniform within 1/sqrt(K)
_XAVIER: Initialiser = nn.init.xavier_uniform_


@dataclass(frozen=True)
class Preset:
    """A method as one path, the same in every layer.

    Attributes:
        name: what :func:`preset_path` and :func:`apply_preset` know it by.
        method: what it is called in its paper, and its equation for one layer.
        kinds: the tensors that are not ``"none"``; ``"lora"`` stands for a low rank of the rank asked for.
        product: the one that the equation needs, ``"hadamard"`` or ``"matmul"``; None: either.
        source: where the method is published.
        exactness: how closely the path follows the method.
        right_factor: draws the right factor of a low rank ``(rank, K)`` in place, as the method does; left factors
            and vectors start at zero. None without a low rank.
        needs_bias: whether a layer without bias is left as it is, since the method has nothing to train there.
    """

    name: str
    method: str
    kinds: Mapping[str, str]
    product: str | None
    source: str
    exactness: str
    right_factor: Initialiser | None = None
    needs_bias: bool = False

    def path(self, rank: int = 8) -> PathConfig:
        """The path for low ranks of ``rank``. Raises ValueError for a rank below 1."""
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank: expected an integer from 1, got {rank!r}")
        return PathConfig(**{slot: f"lora_{rank}" if kind == "lora" else kind for slot, kind in self.kinds.items()})


_ALL = (
    Preset(
        name="lora",
        method="LoRA: (W0 + Bd Bu) x + b0",
        kinds={"B": "lora"},
        product=None,
        source="https://arxiv.org/abs/2106.09685",
        exactness="exact, with alpha = rank and no dropout",
        right_factor=_AS_LINEAR,
    ),
    Preset(
        name="hira",
        method="HiRA: (W0 + W0 * (Ad Au)) x + b0",
        kinds={"A": "lora"},
        product="hadamard",
        source="https://openreview.net/forum?id=TwJrTz9cRS",
        exactness="exact, without dropout",
        right_factor=_AS_LINEAR,
    ),
    Preset(
        name="bitfit",
        method="BitFit: W0 x + b, b = b0 + E",
        kinds={"E": "vector"},
        product=None,
        source="https://arxiv.org/abs/2106.10199",
        exactness="exact in the adapted layers; weight decay draws b to b0, not to 0; the biases of other "
        "modules stay frozen",
        needs_bias=True,
    ),
    Preset(
        name="ssf",
        method="SSF, linear part: g * (W0 x + b0) + E, g = 1 + A = 1 + D",
        kinds={"A": "vector", "D": "vector", "E": "vector"},
        product="hadamard",
        source="https://arxiv.org/abs/2210.08823",
        exactness="contains it: the scales of weight and bias are trained apart; g starts at 1, E at 0, not drawn; "
        "weight decay draws g to 1; other modules' scales and shifts stay frozen",
    ),
    Preset(
        name="prompt",
        method="a prompt added to every token, in front of each layer: W0 (x + C) + b0",
        kinds={"C": "vector"},
        product=None,
        source="https://arxiv.org/abs/2203.12119",
        exactness="exact for an added prompt, which starts at zero; the tokens that VPT-Deep inserts attend: they are "
        "not expressible",
    ),
    Preset(
        name="ia3",
        method="(IA)3 on outputs: l * (W0 x + b0), l = 1 + A = 1 + D",
        kinds={"A": "vector", "D": "vector"},
        product="hadamard",
        source="https://arxiv.org/abs/2205.05638",
        exactness="exact in layers without bias; in others it contains it: the scales of weight and bias are trained "
        "apart; weight decay draws l to 1",
    ),
    Preset(
        name="ia3-input",
        method="(IA)3 on inputs, as in fc2: W0 (l * x) + b0, l = 1 + A",
        kinds={"A": "vector"},
        product="matmul",
        source="https://arxiv.org/abs/2205.05638",
        exactness="exact; weight decay draws l to 1",
    ),
    Preset(
        name="repadapter",
        method="RepAdapter: W0 (x + Wu (Wd x + bd) + bu) + b0, Wu = Ad, Wd = Au, Wu bd + bu = C",
        kinds={"A": "lora", "C": "vector"},
        product="matmul",
        source="https://arxiv.org/abs/2302.08106",
        exactness="the same functions, with one group, scale 1 and no dropout; one vector C in place of two biases, of "
        "which bd is redundant; with groups RepAdapter is a subset",
        right_factor=_XAVIER,
    ),
    Preset(
        name="linear-probe",
        method="linear probe: W0 x + b0, a trained head",
        kinds={},
        product=None,
        source="https://arxiv.org/abs/1610.01644",
        exactness="exact",
    ),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in _ALL}


def preset_path(name: str, rank: int = 8) -> PathConfig:
    """The path of a preset, its low ranks of ``rank`` (ignored where it has none).

    Raises:
        ValueError: an unknown name (the presets are listed); a rank below 1.
    """
    return preset_named(name).path(rank)


def apply_preset(model: nn.Module, name: str, rank: int = 8, *, bias_free: bool = False) -> nn.Module:
    """Make an injected model train as a preset's method does: paths, and initial values of what they read.

    Every adapted layer takes the path. The parts of the storages that it reads start afresh, so outputs become those of
    the frozen model: left factors and vectors are zero, right factors are drawn from torch's global generator as the
    method draws them, and scales are 1. Everything else stays as it is, the classifier head and its flags included.

    Args:
        model: after :func:`glora.inject`, with the preset's product.
        name: one of :data:`PRESETS`.
        rank: of low-rank tensors, up to the storage's.
        bias_free: leave C, D and E out in layers without a bias, so that merging creates none (:func:`glora.merge`).

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an unknown name; no adapted layer, or none with a bias where the method trains biases alone; another
            product than the method's; a rank below 1 or above a layer's storage; sharded parameters. The model is
            unchanged then.
        RuntimeError: during a backward pass.
    """
    preset, layers = preset_named(name), require_layers(model)
    require_whole(model)
    set_paths(model, _fitting_paths(preset, rank, layers, bias_free))
    with torch.no_grad():
        for layer in layers.values():
            _start_afresh(layer, preset)
    return model


def preset_named(name: str, argument: str = "name") -> Preset:
    """The preset of that name; raises ValueError, listing the presets, if there is none."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"{argument}: expected one of {list(PRESETS)}, got {name!r}")
    return PRESETS[name]


def require_bias_for(preset: Preset, any_bias: bool, bias_free: bool = False) -> None:
    """Raise ValueError if the method trains biases alone, and no adapted layer has one."""
    path = preset.path()
    nothing = path != PathConfig() and _unbiased(preset, path, bias_free) == PathConfig()
    if nothing and not any_bias:
        raise ValueError(f"model: expected an adapted layer with a bias for {preset.name!r}, found none")


def _unbiased(preset: Preset, path: PathConfig, bias_free: bool) -> PathConfig:
    """The path of layers without a bias."""
    return path.without_bias() if preset.needs_bias or bias_free else path


def _fitting_paths(preset: Preset, rank: int, layers: Mapping[str, GLoRALayer], bias_free: bool) -> Paths:
    """The path of every layer; raises ValueError where a layer does not fit."""
    path = preset.path(rank)
    misfits = [name for name, layer in layers.items() if layer.product != (preset.product or layer.product)]
    if misfits:
        raise ValueError(
            f"model: expected layers of the {preset.product} product for {preset.name!r}, others are {misfits}; "
            f"glora.inject(..., product={preset.product!r}) makes them"
        )
    for name, layer in layers.items():
        if path.rank > layer.rank:
            raise ValueError(f"rank: expected at most {layer.rank} (storage of layer {name!r}), got {rank}")
    require_bias_for(preset, any(layer.bias is not None for layer in layers.values()), bias_free)
    unbiased = _unbiased(preset, path, bias_free)
    return {name: unbiased if layer.bias is None else path for name, layer in layers.items()}


def _start_afresh(layer: GLoRALayer, preset: Preset) -> None:
    """Initialise exactly what the layer's path reads, so that it computes what the frozen layer does."""
    layer.scales = Scales()
    for _, term in layer.terms().active:
        if isinstance(term, LowRank):
            left, right = term.factors
            assert preset.right_factor is not None
            left.zero_()
            preset.right_factor(right)
        else:
            assert isinstance(term, Vector)
            term.entries.zero_()
