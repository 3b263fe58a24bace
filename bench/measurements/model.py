"""A training step of a whole timm model: forward, cross-entropy and backward, AdamW; new random paths every round."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

import glora
from glora import SearchSpace
from glora.paths import Paths
from glora.sampling import PathSampler

from .. import counting
from ..entrants import ENTRANTS, Field, make_field
from ..entrants import names as who
from ..section import RELATIVE, Comparison, Section, against
from ..settings import SEED, Settings
from ..shapes import Model
from ..timing import Timed, Watch, interleave
from ..workloads import ClassifierWorkload, step

OPTIMIZER = "optimizer"
WARMUP = 5  # rounds on a GPU, where every new combination of kinds is compiled at its first use
ENTRIES = (
    who.FROZEN,
    who.LORA,
    who.OURS,
    who.ASSEMBLED,
    who.OFFICIAL,
    who.HIRA,
    who.OURS_MATMUL,
    who.LYCORIS_BYPASS,
    who.LYCORIS,
    who.GLORA,
)
COMPARISONS = (
    *(Comparison(who.OURS, name) for name in (who.OFFICIAL, who.ASSEMBLED, who.GLORA, who.LORA, who.FROZEN)),
    Comparison(who.OURS_MATMUL, who.LYCORIS_BYPASS),
    Comparison(who.OURS_MATMUL, who.LYCORIS),
    *against(
        (who.FROZEN,), (who.LORA, who.HIRA, who.GLORA, who.LYCORIS_BYPASS, who.LYCORIS, who.ASSEMBLED, who.OFFICIAL)
    ),
)


def measure(shape_set: str, model: Model, settings: Settings) -> Section:
    """Check and time every entrant; in each round, those that take any path get the same new path for every layer."""
    field, workload, sampler, _ = make_checked(model, settings)
    generator = torch.Generator().manual_seed(SEED)
    functions = {name: training_step(workload, field.models[name]) for name in ENTRIES if name in field.models}
    phases = interleave(
        functions,
        settings.rounds,
        warmup=1 if settings.device == "cpu" else WARMUP,
        prepare=lambda: field.set_paths(sampler.sample(generator)),
        watch=settings.watch(),
    )
    field.set_paths(sampler.sample(torch.Generator().manual_seed(SEED)))
    return Section(
        "model",
        f"{shape_set} step",
        f"training step of {model.name}, batch {model.batch_on(settings.device)}, rank {model.rank}, random paths",
        settings.step_tolerance,
        field.errors,
        field.refused,
        field.missing,
        phases,
        COMPARISONS,
        {name: _count(workload, field.models[name], settings.device) for name in functions},
        {"images": model.batch_on(settings.device)},
        unit=RELATIVE,
        uncompared=(OPTIMIZER,),  # the frozen model has none
    )


def make_checked(
    model: Model, settings: Settings, entrants: Iterable[str] = ENTRANTS, count: int = 1
) -> tuple[Field, ClassifierWorkload, PathSampler, list[Paths]]:
    """As :func:`make_model`, those that are wrong refused; what draws paths; the ``count`` paths of the check."""
    field, workload = make_model(model, settings, entrants)
    shapes = {name: layer.shape for name, layer in glora.glora_layers(field.models[who.OURS]).items()}
    # Left out: constants, and a vector as B. Their gradients are sums that cancel, so that in bf16 they were off by up
    # to 1.3 where all others are right to 0.03: the layers check them.
    kinds = {"A": ("lora", "vector", "none"), "B": ("lora", "none"), "D": ("vector", "none"), "E": ("vector", "none")}
    checked, generator = PathSampler(shapes, SearchSpace((model.rank,), **kinds)), torch.Generator().manual_seed(SEED)
    paths = [checked.sample(generator) for _ in range(count)]
    field.check(workload, paths, settings.step_tolerance)
    if settings.dtype != torch.float32:
        wide, wide_workload = make_model(model, settings.in_fp32(), entrants)
        wide.check(wide_workload, paths, settings.in_fp32().step_tolerance)
        field.refuse(wide.refused)
    return field, workload, PathSampler(shapes, SearchSpace((model.rank,))), paths


def make_model(
    model: Model, settings: Settings, entrants: Iterable[str] = ENTRANTS
) -> tuple[Field, ClassifierWorkload]:
    """The ``entrants`` in the same linear layers of a randomly initialised model, and random images for it."""
    backbone = make_backbone(model, settings)
    batch, size = model.batch_on(settings.device), backbone.default_cfg["input_size"]
    images, labels = settings.randn(batch, *size), torch.randint(1000, (batch,), device=settings.device)
    names = linear_names(backbone, model.linears)
    return make_field(backbone, names, model.rank, entrants), ClassifierWorkload(images, labels)


def make_backbone(model: Model, settings: Settings) -> nn.Module:
    """A timm model, initialised at random (always the same) and without anything random in forward.

    Biases and norms are moved away from the zeros and ones that they start with.
    """
    import timm

    torch.manual_seed(SEED)
    backbone = timm.create_model(model.name, drop_path_rate=0.0).train()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return backbone.to(settings.device, settings.dtype)


def linear_names(backbone: nn.Module, expected: int) -> list[str]:
    """The names of all linear layers with a bias, except the head's. Without a bias, PEFT GLoRA drops C, D and E.

    Raises:
        ValueError: their number is not ``expected``: this timm builds another model.
    """
    modules = backbone.named_modules()
    linears = {name: module for name, module in modules if type(module) is nn.Linear and name.split(".")[0] != "head"}
    names = [name for name, linear in linears.items() if linear.bias is not None]
    if len(names) != expected:
        raise ValueError(f"model: expected {expected} linear layers with a bias beside the head, got {len(names)}")
    return names


def training_step(workload: ClassifierWorkload, model: nn.Module) -> Timed:
    parameters = glora.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4) if parameters else None
    passes = step(workload, model)

    def timed(watch: Watch) -> None:
        passes(watch)
        with watch(OPTIMIZER):
            if optimizer is not None:
                optimizer.step()

    return timed


def _count(workload: ClassifierWorkload, model: nn.Module, device: str) -> dict[str, float]:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {**counting.memory(workload, model, (workload.images,), device), "parameters": trained}
