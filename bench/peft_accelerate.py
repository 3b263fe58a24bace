"""PEFT's GLoRA, all low rank, before and after :func:`glora.peft.accelerate`: time, and bytes kept for backward.

    python -m bench.peft_accelerate

One layer of a ViT-B/16 and a whole block of it, in fp32, on one thread, interleaved; seconds are CPU time. Both are
compared with the formula in fp64 first. The floor is the same model with no adapter and three dense products for every
layer (y, dx and the dW that a hadamard low rank needs): better kernels could win no more than the time above it.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glora.peft import accelerate

from .agreement import Truth, require_agreement, results
from .counting import saved_bytes
from .entrants import make_field
from .entrants.names import GLORA, OURS, all_low_rank
from .entrants.peft_models import GLORA_NAMES
from .environment import environment
from .oracle import oracle_model
from .section import RELATIVE, Comparison, Section
from .settings import SEED, Settings
from .timing import WHOLE, interleave, ratio
from .workloads import LayerWorkload, step

BEFORE, AFTER, FLOOR = "PEFT GLoRA", "PEFT GLoRA, accelerated", "three dense products"
RANK = 8
TOKENS, WIDTH, HIDDEN = 197, 768, 3072  # tokens per image
TOLERANCE = 1e-5  # of every tensor, relative, in the 2-norm
AT_MOST = {"time": 0.55, "saved_bytes": 0.60}


def layer(images: int) -> tuple[nn.Module, LayerWorkload]:
    """The first layer of an MLP."""
    x, dy = torch.randn(images * TOKENS, WIDTH), torch.randn(images * TOKENS, HIDDEN)
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN)), LayerWorkload(x.requires_grad_(), dy)


def block(images: int) -> tuple[nn.Module, LayerWorkload]:
    """Attention and MLP with norms and residuals: four layers."""
    from timm.models.vision_transformer import Block

    model = nn.Sequential(Block(WIDTH, num_heads=12, qkv_bias=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # away from the zeros and ones that biases and norms start with
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    size = (images, TOKENS, WIDTH)
    return model, LayerWorkload(torch.randn(size).requires_grad_(), torch.randn(size))


MEASURED = ((layer, 8), (block, 8), (block, 4))


class _ThreeProducts(torch.autograd.Function):
    """``y = x W0^T + b0``; its backward forms dx and a dW that is thrown away."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        torch.mm(dy.flatten(0, -2).T, x.flatten(0, -2))
        return dy @ weight, None, None


class ThreeProducts(nn.Linear):
    """The floor of a layer: replaces the class of an ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return _ThreeProducts.apply(x, self.weight, self.bias)


def floor_model(backbone: nn.Module, names: list[str]) -> nn.Module:
    model = copy.deepcopy(backbone).requires_grad_(False)
    for name in names:
        model.get_submodule(name).__class__ = ThreeProducts
    return model


def measure(make: Callable[[int], tuple[nn.Module, LayerWorkload]], images: int, settings: Settings) -> Section:
    """Check both, time them, and count the bytes that they keep apart from parameters."""
    torch.manual_seed(SEED)
    backbone, workload = make(images)
    names = [name for name, module in backbone.named_modules() if type(module) is nn.Linear]
    field = make_field(backbone, names, RANK, [GLORA])
    models = {BEFORE: field.models[GLORA], AFTER: copy.deepcopy(field.models[GLORA])}
    served = accelerate(models[AFTER]).served
    if list(served) != names:
        raise ValueError(f"accelerate: expected it to serve {names}, got {served}")

    field.set_path(all_low_rank(RANK))
    want = Truth(results(workload.double(), oracle_model(field.models[OURS])), None)
    theirs = {f"{name}.{own}": f"{name}.{other}" for name in names for own, other in GLORA_NAMES.items()}
    errors = {who: require_agreement(who, results(workload, m), want, TOLERANCE, theirs) for who, m in models.items()}
    models[FLOOR] = floor_model(backbone, names)
    steps = {who: step(workload, model) for who, model in models.items()}
    return Section(
        "peft_accelerate",
        f"{make.__name__}, {images} images",
        f"{make.__name__} of ViT-B/16, {images} x {TOKENS} tokens, rank {RANK}",
        TOLERANCE,
        errors,
        unit=RELATIVE,
        phases=interleave(steps, settings.rounds, watch=settings.watch()),
        comparisons=(Comparison(AFTER, BEFORE), Comparison(FLOOR, BEFORE), Comparison(AFTER, FLOOR)),
        facts={
            who: {"saved_bytes": saved_bytes(partial(workload.forward, m), (workload.x,), "cpu")}
            for who, m in models.items()
        },
    )


def summary(section: Section) -> str:
    """The section in a few lines of text."""
    lines = [f"{section.title}: accelerated / before"]
    found, floor = (ratio(section.phases[WHOLE], who, BEFORE) for who in (AFTER, FLOOR))
    spread = f"[{found.low:.3f}, {found.high:.3f}] in {found.rounds} rounds"
    seconds = f"{found.candidate_seconds:.4f} / {found.baseline_seconds:.4f} s"
    lines.append(f"  time   {found.median:.3f} {spread}, {seconds}; {_verdict('time', found.median, floor.median)}")
    before, after, least = (section.facts[who]["saved_bytes"] for who in (BEFORE, AFTER, FLOOR))
    mib = f"{after / 2**20:.1f} / {before / 2**20:.1f} MiB"
    lines.append(f"  saved  {after / before:.3f}, {mib}; {_verdict('saved_bytes', after / before, least / before)}")
    errors = f"{section.errors[AFTER]:.1e} / {section.errors[BEFORE]:.1e}"
    lines.append(f"  relative error against fp64 {errors}, allowed {section.tolerance:.0e}")
    return "\n".join(lines)


def _verdict(quantity: str, found: float, floor: float) -> str:
    met = "met" if found <= AT_MOST[quantity] else "MISSED"
    return f"floor {floor:.3f}; at most {AT_MOST[quantity]:.2f}: {met}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peft_accelerate", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: 9)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    settings = Settings(rounds=options.rounds, clock="cpu")
    sections = []
    for make, images in MEASURED:
        sections.append(measure(make, images, settings))
        print(summary(sections[-1]), flush=True)
    if options.out is not None:
        content = {"environment": environment("cpu"), "sections": [section.to_dict() for section in sections]}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
