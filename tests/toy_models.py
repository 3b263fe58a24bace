"""Random small models with every kind of part that a user's model may have, adapted through the public API.

A drawn model is a description (:class:`Toy`): plain data that a failing test prints, and from which the same model can
be built any number of times. All parts map ``(tokens, WIDTH)`` to the same shape.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import glora
from glora.config import KINDS
from glora.models.modules import replace_modules
from tests.families import TRANSFORMERS, Family
from tests.glora.toys import generator, seeded
from tests.sweep import condition

WIDTH, HIDDEN, WORDS, CLASSES, SAMPLES, RANK = 6, 9, 5, 3, 7, 3


class Image(nn.Module):
    """``body`` on images of 3 x 3 pixels, whose channels are the token's features."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        pixels = torch.linspace(0.5, 1.5, 9).reshape(3, 3)
        self.register_buffer("pixels", pixels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, :, None, None] * self.pixels).mean((2, 3))


class Sound(nn.Module):
    """``body`` on sequences of four steps."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, :, None].expand(-1, -1, 4)).mean(2)


class Residual(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Moving(nn.Module):
    """A persistent buffer that training changes, like a codebook or a moving average."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.center.lerp_(x.mean(0), 0.5)
        return x - self.center


class Words(nn.Module):
    """An embedding, and an output layer whose weight is the same parameter."""

    def __init__(self):
        super().__init__()
        self.words, self.logits = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.logits.weight = self.words.weight
        self.back = nn.Linear(WORDS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.logits(x + self.words(x.argmax(1) % WORDS)))


class In(nn.Module):
    """``body`` in its own dtype."""

    def __init__(self, body: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.body, self.dtype = body.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(self.dtype)).to(x.dtype)


def _twins() -> nn.Module:
    one, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), other)


def _shared() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(layer, nn.Tanh(), layer)


def _clash() -> nn.Module:
    """Modules ``a_b`` and ``a.b``, whose names are equal once dots become underscores."""
    part = nn.Sequential()
    part.add_module("a_b", nn.Linear(WIDTH, WIDTH))
    part.add_module("a", nn.Sequential())
    part.a.add_module("b", nn.Linear(WIDTH, WIDTH))
    return part


def _transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(WIDTH, WIDTH)


PARTS: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "bias-less": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "mlp": lambda: Residual(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))),
    "mlp bias-less": lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN, False), nn.GELU(), nn.Linear(HIDDEN, WIDTH, False)),
    "transposed": _transposed,
    "conv": lambda: Image(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)),
    "conv bias-less": lambda: Image(nn.Conv2d(WIDTH, WIDTH, 1, bias=False)),
    "conv depthwise": lambda: Image(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)),
    "conv norm": lambda: Image(nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))),
    "conv1d": lambda: Sound(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "batch norm, no affine": lambda: nn.BatchNorm1d(WIDTH, affine=False),
    "instance norm": lambda: Image(nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True)),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "moving buffer": Moving,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "words": Words,
    "twins": _twins,
    "shared": _shared,
    "clash": _clash,
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH), Residual(nn.Linear(WIDTH, WIDTH)))),
    "half": lambda: In(nn.Linear(WIDTH, WIDTH), torch.bfloat16),
    "double": lambda: In(nn.Linear(WIDTH, WIDTH), torch.float64),
}


@dataclass(frozen=True)
class Toy:
    """A model and its adaptation.

    Attributes:
        parts: the parts of the body, by their names in :data:`PARTS`; a linear ``head`` follows.
        dtype: the dtype of the whole model, except parts with their own.
        product, rank, convolutions, exclude: as for :func:`glora.inject`.
        ranks: if not empty, layers are made one by one, each with the next rank (and the next of ``products``).
        frozen: whether only the support tensors are trained, not even the head.
        restrict: which paths are drawn: "any", "no bias" (no C and E in layers without bias), "lycoris", "peft".
        seed: the seed of weights, support tensors and paths.
    """

    parts: tuple[str, ...]
    dtype: str = "float32"
    product: str = "hadamard"
    rank: int = RANK
    convolutions: bool = False
    exclude: tuple[str, ...] = ("head",)
    ranks: tuple[int, ...] = ()
    products: tuple[str, ...] = ()
    frozen: bool = False
    restrict: str = "any"
    seed: int = 0

    def build(self) -> nn.Module:
        """The plain model, always with the same weights."""
        with seeded(self.seed):
            model = nn.Sequential()
            for i, part in enumerate(self.parts):
                model.add_module(f"part{i}", PARTS[part]())
            model.add_module("head", nn.Linear(WIDTH, CLASSES))
        own = [module for module in model.modules() if isinstance(module, In)]
        model.to(getattr(torch, self.dtype))
        for module in own:
            module.to(module.dtype)
        return model.eval()

    def adapt(self, model: nn.Module) -> nn.Module:
        """GLoRA put into the plain model, in place."""
        if self.ranks:
            self._adapt_each(model)
        else:
            options: dict[str, Any] = {"product": self.product, "convolutions": self.convolutions}
            glora.inject(model, self.rank, exclude=self.exclude, **options)
        if self.frozen:
            support = {p for layer in glora.glora_layers(model).values() for p in layer.support_parameters()}
            for parameter in model.parameters():
                parameter.requires_grad_(parameter in support)
        return model

    def _adapt_each(self, model: nn.Module) -> None:
        left_alone = {module for name in self.exclude for module in model.get_submodule(name).modules()}
        kept = {parameter for module in left_alone for parameter in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in kept)
        linears = [module for module in model.modules() if type(module) is nn.Linear and module not in left_alone]
        made = {
            linear: glora.GLoRALinear.from_linear(linear, _turn(self.ranks, i), _turn(self.products, i))
            for i, linear in enumerate(linears)
            if not hasattr(linear, "parametrizations")
        }
        replace_modules(model, made)

    def inputs(self) -> dict[str, Tensor]:
        x = torch.randn(SAMPLES, WIDTH, generator=generator(self.seed))
        return {"input": x.to(getattr(torch, self.dtype))}

    @property
    def coarsest(self) -> str:
        """The dtype in which outputs are rounded most."""
        return "bfloat16" if "half" in self.parts else self.dtype

    def paths(self, model: nn.Module) -> dict[str, glora.PathConfig]:
        """A path for every layer that ``restrict`` allows."""
        rng = random.Random(self.seed)
        common = {slot: rng.choice(KINDS[slot]) for slot in "ACD"}
        rank = rng.randint(1, min((layer.rank for layer in glora.glora_layers(model).values()), default=1))
        return {name: self._path(rng, layer, common, rank) for name, layer in glora.glora_layers(model).items()}

    def _path(
        self, rng: random.Random, layer: glora.GLoRALayer, common: Mapping[str, str], rank: int
    ) -> glora.PathConfig:
        def spelled(kind: str, rank: int | None = None) -> str:
            return f"lora_{rank or rng.randint(1, layer.rank)}" if kind == "lora" else kind

        if self.restrict == "lycoris":
            a, b = (spelled(rng.choice(("lora", "none"))) for _ in "AB")
            return glora.PathConfig(a, b)
        if self.restrict == "peft":
            a, c, d = (spelled(common[slot], rank) for slot in "ACD")
            return glora.PathConfig(a, a, c, d, d) if layer.bias is not None else glora.PathConfig(a, a)
        path = glora.PathConfig(*(spelled(rng.choice(KINDS[slot])) for slot in "ABCDE"))
        return replace(path, C="none", E="none") if self.restrict == "no bias" and layer.bias is None else path


def _turn(values: tuple, index: int) -> Any:
    return values[index % len(values)]


@dataclass(frozen=True)
class Tiny:
    """A tiny model of Transformers and its adaptation; see :class:`Toy`."""

    family: str
    product: str = "hadamard"
    rank: int = RANK
    exclude: tuple[str, ...] = ()
    restrict: str = "any"
    seed: int = 0

    def build(self) -> nn.Module:
        model = self._of_list().build()
        condition(model, self.inputs())
        return model

    def _of_list(self) -> Family:
        return next(family for family in TRANSFORMERS if family.name == self.family)

    def adapt(self, model: nn.Module) -> nn.Module:
        return glora.inject(
            model, self.rank, product=self.product, **({"exclude": self.exclude} if self.exclude else {})
        )

    def inputs(self) -> dict[str, Tensor]:
        family = self._of_list()
        return family.inputs(family.build())

    coarsest = "float32"
    paths, _path = Toy.paths, Toy._path


TINY = {"llama": "lm_head", "llama, tied": "lm_head", "gpt2": "lm_head", "bert": "classifier", "t5": "lm_head"}


def draw_tiny(rng: random.Random, restrict: str = "any") -> Tiny:
    """A random description of a model of Transformers, its head adapted by default or excluded."""
    name = rng.choice(list(TINY))
    product = rng.choice(("hadamard", "matmul"))
    exclude = (TINY[name],) if rng.random() < 0.5 else ()
    return Tiny(name, product, rng.randint(1, RANK), exclude, restrict, rng.randrange(1000))


def draw(rng: random.Random, restrict: str = "any", linear: bool = False) -> Toy:
    """A random description; with ``linear`` one that fits a format for linear layers only."""
    suited = [part for part in PARTS if "conv" not in part and part != "transposed"]
    names = suited if linear else list(PARTS)
    parts = tuple(rng.choice(names) for _ in range(rng.randint(0, 3)))
    adapted = rng.choice([p for p in ("linear", "bias-less", "mlp", "nested", "conv", "words") if p in names])
    place = rng.randint(0, len(parts))
    parts = (*parts[:place], adapted, *parts[place:])
    manual = not linear and rng.random() < 0.15 and adapted != "conv"
    excluded = ("head",) if linear or rng.random() < 0.7 else ("head", f"part{rng.randint(0, len(parts) - 1)}")
    if f"part{place}" in excluded:
        excluded = ("head",)
    products = ("hadamard", "matmul")
    return Toy(
        parts,
        dtype=rng.choice(("float32", "float32", "float64", "bfloat16")),
        product={"lycoris": "matmul", "peft": "hadamard"}.get(restrict, rng.choice(products)),
        rank=rng.randint(1, RANK),
        convolutions=adapted == "conv" or (not linear and rng.random() < 0.5),
        exclude=excluded,
        ranks=tuple(rng.randint(1, RANK) for _ in range(rng.randint(1, 2))) if manual else (),
        products=tuple(rng.choice(products) for _ in range(2)) if manual else (),
        frozen=restrict == "lycoris" or rng.random() < 0.1,
        restrict=restrict,
        seed=rng.randrange(1000),
    )
