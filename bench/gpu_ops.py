"""Times on a GPU: every strategy of a layer step against the frozen layer, and every kernel against its own floor.

    python -m bench.gpu_ops --out results.json

The floor of a layer is the frozen linear layer: forward and dx, two dense products; ratios are of paired rounds
(``timing.py``). The floor of a kernel is the longer of two times: its bytes at the speed of a large copy, and its
operations at the speed of a large product, both measured at the start. y and every gradient are compared with the
fp64 formula before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from glora_kernels import Constant, LowRank, Terms, Vector, glora_linear, reference, use_backend
from glora_kernels._triton.device import architecture
from glora_kernels._triton.launch import launch
from glora_kernels._triton.recording import launches_of
from glora_kernels.error_bound import PROMISED, largest_constant
from glora_kernels.planning.cases import Case, Layer
from glora_kernels.planning.prediction import STRATEGIES, predict
from glora_kernels.planning.problem import CONSTANT, LOW_RANK, VECTOR

from .timing import WHOLE, EventWatch, interleave, plain, ratio

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


def milliseconds(functions: Mapping[str, Callable[[], object]], rounds: int = 15, repeats: int = 1) -> dict[str, float]:
    """The median time of each function.

    A kernel shorter than its own launch needs ``repeats`` calls, back to back, between two events.
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
    """Bytes per second of a large copy, read and written; operations per second of a large bf16 product."""
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


def results_of(function: Callable[..., Tensor], call: Call, dy: Tensor) -> list[Tensor]:
    """y and every gradient."""
    y = function(*call)
    return [y.detach(), *torch.autograd.grad(y, [call[0], *call[3].flatten()[0]], dy)]


def in_dtype(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The same call on changed leaves."""
    x, weight, bias, terms = call

    def leaf(tensor: Tensor) -> Tensor:
        return change(tensor.detach()).requires_grad_()

    return leaf(x), change(weight), change(bias), terms.map(leaf)


def require_right(call: Call, dy: Tensor) -> None:
    """Compare y and every gradient of every entrant with the fp64 formula, element by element; nothing wrong is timed.

    Raises:
        ValueError: an element is too far off.
    """
    want = results_of(reference.glora_linear, in_dtype(call, Tensor.double), dy.double())
    scale = results_of(reference.glora_linear, in_dtype(call, lambda t: t.float().abs()), dy.float().abs())
    for label, entrant in ENTRANTS.items():
        with use_backend(*entrant):
            got = results_of(glora_linear, call, dy)
        errors = [largest_constant(*three, torch.bfloat16) for three in zip(got, want, scale)]
        if not all(error <= PROMISED[torch.bfloat16] for error in errors):
            raise ValueError(f"{label}: not timed, errors of y and the gradients over u S: {errors}")


def step_of(
    call: tuple[Tensor, Tensor, Tensor, Terms], dy: Tensor, entrant: tuple[str, str | None]
) -> Callable[[], None]:
    leaves = [call[0], *call[3].flatten()[0]]

    def step() -> None:
        with use_backend(*entrant):
            torch.autograd.grad(glora_linear(*call), leaves, dy)

    return step


def layers() -> Iterator[dict[str, Any]]:
    """The time of every entrant's step over the frozen layer's, by shape and path."""
    for name, shape in SHAPES.items():
        for path, kinds in PATHS.items():
            call = make(shape, kinds)
            x, weight, bias, _ = call
            dy = torch.randn(shape[0], shape[1], device="cuda").bfloat16()
            require_right(call, dy)
            functions = {label: step_of(call, dy, entrant) for label, entrant in ENTRANTS.items()}
            frozen = x.detach().requires_grad_()
            functions["frozen"] = lambda x=frozen, w=weight, b=bias, g=dy: torch.autograd.grad(F.linear(x, w, b), x, g)
            timed = {label: plain(function) for label, function in functions.items()}
            times = interleave(timed, 15, warmup=3, watch=EventWatch())[WHOLE]
            found = {label: asdict(ratio(times, label, "frozen")) for label in ENTRANTS}
            yield {"shape": name, "path": path, "over_frozen": found}


def kernels(bandwidth: float, rate: float) -> Iterator[dict[str, Any]]:
    """The time of every kernel of a layer over its own floor, by shape and strategy."""
    here = architecture(torch.device("cuda"))
    path = (LOW_RANK, RANK), (LOW_RANK, RANK), (VECTOR, 0), (VECTOR, 0), (CONSTANT, 0)
    for name, (tokens, outputs, inputs) in SHAPES.items():
        for strategy in STRATEGIES:
            layer, types = Layer(outputs, inputs), (torch.bfloat16, torch.float32)
            case = Case(layer, path, RANK, "hadamard", *types, tokens, strategy, True, True, here)
            found, floors = launches_of(case, "cuda"), _floors(case, bandwidth, rate)
            for direction, part in zip(("forward", "backward"), found):
                for one in part:
                    label = f"{direction} {one.kernel.fn.__name__}"
                    run = partial(launch, one.kernel, one.grid, one.tile, **one.arguments)
                    row = {"shape": name, "strategy": strategy, "kernel": label}
                    row |= {
                        "milliseconds": milliseconds({label: run}, repeats=20)[label],
                        "floor_milliseconds": floors.get(label),
                    }
                    yield row


def _floors(case: Case, bandwidth: float, rate: float) -> dict[str, float]:
    """Milliseconds of each kernel: the cost model's bytes and operations at the measured ceilings."""
    way = predict(case.problem, case.tokens, case.strategy)
    kernel_of = {"y": "fused_kernel", "dx": "fused_kernel"}
    return {
        f"{direction} {kernel_of.get(one.name, one.name + '_kernel')}": 1e3
        * max(one.bytes / bandwidth, one.flops / rate)
        for direction, part in zip(("forward", "backward"), (way.forward, way.backward))
        for one in part
    }


def table(content: dict[str, Any]) -> str:
    """The short table: ratios to the frozen layer, and of kernels to their floors."""
    lines = ["step over the frozen layer's " + " ".join(f"{label:>14}" for label in ENTRANTS)]
    for row in content["layers"]:
        ratios = " ".join(f"{row['over_frozen'][label]['median']:14.2f}" for label in ENTRANTS)
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
    content: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bytes_per_second": bandwidth,
        "flops_per_second": rate,
        "layers": [],
        "kernels": [],
    }
    for key, rows in (("layers", layers()), ("kernels", kernels(bandwidth, rate))):
        for row in rows:
            content[key].append(row)
            out.write_text(json.dumps(content, indent=1))  # after each part: the time may run out
    print(f"{content['device']}: copy {bandwidth / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    print(table(content))


if __name__ == "__main__":
    main()
