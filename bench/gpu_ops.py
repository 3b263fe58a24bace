"""Times on a GPU: every strategy of a layer step against the frozen layer, and every kernel against its own floor.

    python -m bench.gpu_ops --out results.json

The floor of a layer is the frozen linear layer: forward and dx, two dense products. The floor of a kernel is the time
its bytes take at the measured speed of a large copy, or its operations at that of a large product, whichever is longer.
Times are medians of CUDA events over interleaved rounds (``timing.py``); a path is checked against the fp64 formula
before it is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from glora_kernels import Constant, LowRank, Terms, Vector, glora_linear, reference, use_backend
from glora_kernels._triton.builds import Case, launches_of
from glora_kernels._triton.device import architecture
from glora_kernels._triton.launch import launch
from glora_kernels.cost import Problem, launches

from .timing import WHOLE, EventWatch, interleave, plain

SHAPES = {  # M, N, K
    "ViT-B bs 64 qkv": (12608, 2304, 768),
    "ViT-B bs 64 proj": (12608, 768, 768),
    "ViT-B bs 64 fc1": (12608, 3072, 768),
    "ViT-B bs 64 fc2": (12608, 768, 3072),
    "LLaMA-7B 2048": (2048, 4096, 4096),
    "LLaMA-7B 8192": (8192, 4096, 4096),
    "LLaMA-7B 8192 up": (8192, 11008, 4096),
    "few tokens 64": (64, 4096, 4096),
    "few tokens 256": (256, 4096, 4096),
}
PATHS = {"A lora, B lora": ("lora", "lora"), "A vector, B lora": ("vector", "lora"), "B lora": ("none", "lora")}
ENTRANTS: dict[str, tuple[str, str | None]] = {
    "assemble": ("triton", "assemble"),
    "fused": ("triton", "fused"),
    "as dispatched": ("triton", None),
    "torch backend": ("torch", None),
}
Call = tuple[Tensor, Tensor, Tensor, Terms]
RANK = 8
ROUNDOFF = 2.0**-8  # of bf16


def milliseconds(functions: Mapping[str, Callable[[], object]], rounds: int = 15, repeats: int = 1) -> dict[str, float]:
    """Median time of each.

    A kernel shorter than its own launch wants ``repeats`` between two events, back to back.
    """

    def repeated(function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats):
                function()

        return run

    timed = {name: plain(repeated(function)) for name, function in functions.items()}
    times = interleave(timed, rounds, warmup=3, watch=EventWatch())[WHOLE]
    return {name: 1e3 * statistics.median(found) / repeats for name, found in times.items()}


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, read and written; operations a second of a large bf16 product."""
    source = torch.randn(2**28, device="cuda").bfloat16()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    found = milliseconds({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return 2 * source.nbytes / found["copy"] * 1e3, 2 * 8192**3 / found["product"] * 1e3


def make(shape: tuple[int, int, int], kinds: tuple[str, str]) -> Call:
    tokens, outputs, inputs = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(size, device="cuda", generator=generator) * scale).to(dtype)

    def term(kind: str) -> LowRank | Vector | None:
        down = random(outputs, RANK, scale=0.05, dtype=torch.float32).requires_grad_()
        up = random(RANK, inputs, scale=0.05, dtype=torch.float32).requires_grad_()
        return {"lora": LowRank(down, up), "vector": Vector(down), "none": None}[kind]

    bias_terms = [random(outputs, scale=0.05, dtype=torch.float32).requires_grad_() for _ in range(2)]
    prompt = random(inputs, scale=0.05, dtype=torch.float32).requires_grad_()
    terms = Terms(term(kinds[0]), term(kinds[1]), Vector(prompt), Vector(bias_terms[0]), Constant(bias_terms[1]))
    x = random(tokens, inputs).requires_grad_()
    return x, random(outputs, inputs, scale=inputs**-0.5), random(outputs, scale=0.1), terms


def require_right(x: Tensor, weight: Tensor, bias: Tensor, terms: Terms, entrant: tuple[str, str | None]) -> None:
    """y of the first tokens against the fp64 formula; nothing wrong is timed."""
    with torch.no_grad(), use_backend(*entrant):
        got = glora_linear(x, weight, bias, terms)[:32].double()
    operands = [x[:32].detach().double(), weight.double(), bias.double()]
    wide = terms.map(lambda t: t.detach().double())
    want = reference.glora_linear(*operands, wide)
    scale = reference.glora_linear(*(t.abs() for t in operands), wide.map(torch.abs))
    excess = ((got - want).abs() / (ROUNDOFF * scale)).max().item()
    assert excess <= 3, f"{entrant}: y is off by {excess:.1f} u S"


def step_of(
    call: tuple[Tensor, Tensor, Tensor, Terms], dy: Tensor, entrant: tuple[str, str | None]
) -> Callable[[], None]:
    leaves = [call[0], *call[3].flatten()[0]]

    def step() -> None:
        with use_backend(*entrant):
            torch.autograd.grad(glora_linear(*call), leaves, dy)

    return step


def layers() -> list[dict[str, Any]]:
    """Every entrant's step over the frozen layer's, by shape and path."""
    rows = []
    for name, shape in SHAPES.items():
        for path, kinds in PATHS.items():
            call = make(shape, kinds)
            x, weight, bias, _ = call
            dy = torch.randn(shape[0], shape[1], device="cuda").bfloat16()
            for entrant in ENTRANTS.values():
                require_right(*call, entrant)
            functions = {label: step_of(call, dy, entrant) for label, entrant in ENTRANTS.items()}
            frozen = x.detach().requires_grad_()
            functions["frozen"] = lambda x=frozen, w=weight, b=bias, g=dy: torch.autograd.grad(F.linear(x, w, b), x, g)
            found = milliseconds(functions)
            rows.append({"shape": name, "path": path, "milliseconds": found})
    return rows


def kernels(bandwidth: float, rate: float) -> list[dict[str, Any]]:
    """Every kernel of a layer over its own floor, by shape and strategy."""
    rows = []
    for name, (tokens, outputs, inputs) in SHAPES.items():
        for strategy in ("assemble", "fused"):
            case = Case(torch.bfloat16, torch.float32, "hadamard", "lora", "lora", "vector", tokens, RANK, strategy)
            found = launches_of(case, (outputs, inputs), "cuda")
            floors = _floors(case, (outputs, inputs), bandwidth, rate)
            for direction, part in zip(("forward", "backward"), found):
                for one in part:
                    label = f"{direction} {one.kernel.fn.__name__}"
                    run = partial(launch, one.kernel, one.grid, one.tile, **one.arguments)
                    row = {"shape": name, "strategy": strategy, "kernel": label}
                    row |= {
                        "milliseconds": milliseconds({label: run}, repeats=20)[label],
                        "floor_milliseconds": floors.get(label),
                    }
                    rows.append(row)
    return rows


def _floors(case: Case, size: tuple[int, int], bandwidth: float, rate: float) -> dict[str, float]:
    """Milliseconds by the cost model's bytes and operations of each kernel, at the measured ceilings."""
    _, weight, _, terms = make((case.tokens, *size), (case.a, case.b))
    problem = Problem.of(case.tokens, weight, terms, architecture(weight.device))
    kernel_of = {"y": "fused_kernel", "dx": "fused_kernel"}
    return {
        f"{direction} {kernel_of.get(one.name, one.name + '_kernel')}": 1e3
        * max(one.bytes / bandwidth, one.flops / rate)
        for direction, part in zip(("forward", "backward"), launches(problem, case.strategy))
        for one in part
    }


def table(content: dict[str, Any]) -> str:
    """The short table: ratios to the frozen layer, and of kernels to their floors."""
    lines = ["step over the frozen layer's " + " ".join(f"{label:>14}" for label in ENTRANTS)]
    for row in content["layers"]:
        times = row["milliseconds"]
        ratios = " ".join(f"{times[label] / times['frozen']:14.2f}" for label in ENTRANTS)
        lines.append(f"{row['shape']:<18}{row['path']:<17} {ratios}")
    lines.append("kernel over its floor")
    for row in content["kernels"]:
        floor = row["floor_milliseconds"]
        over = "" if floor is None else f"{row['milliseconds'] / floor:6.2f}"
        lines.append(f"{row['shape']:<18}{row['strategy']:<9}{row['kernel']:<30}{row['milliseconds']:9.4f} ms {over}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.error("expected a GPU, found none")
    bandwidth, rate = ceilings()
    content = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bytes_per_second": bandwidth,
        "flops_per_second": rate,
        "layers": layers(),
        "kernels": kernels(bandwidth, rate),
    }
    out.write_text(json.dumps(content, indent=1))
    print(f"{content['device']}: copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    print(table(content))


if __name__ == "__main__":
    main()
