"""Times on a GPU: every strategy of a layer against the frozen layer, and every kernel against its own floor.

    python -m bench.gpu.ops --out kernels.json

All are replayed from CUDA graphs, many runs in each: on a fast GPU Python takes longer to launch most of them than they
take. The floor of a layer is the frozen linear layer, whose forward is one dense product and whose step is two; ratios
are of paired rounds (``timing.py``), with the seconds that the cost model has predicted beside them. The floor of a
kernel is the longer of two times: its bytes at the speed of a large copy, and its operations at the speed of a large
product, both measured at the start. y and every gradient are compared with the fp64 formula before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glora.files import write_text_atomically
from glora.graphs.capture import CudaGraphs
from glora_kernels import Constant, LowRank, Terms, Vector, glora_linear, reference, use_backend
from glora_kernels._triton.device import architecture
from glora_kernels._triton.launch import Launch, launch
from glora_kernels._triton.recording import launches_of
from glora_kernels.error_bound import PROMISED, largest_constant
from glora_kernels.planning.cases import Case, Layer
from glora_kernels.planning.prediction import STRATEGIES, predict
from glora_kernels.planning.problem import CONSTANT, LOW_RANK, NONE, VECTOR

from ..section import per_run
from ..timing import WHOLE, EventWatch, Times, interleave, plain, ratio
from ..workloads import BACKWARD, FORWARD
from .running import TOLD

SHAPES = {  # M, N, K
    "ViT-B bs 64 qkv": (12608, 2304, 768),
    "ViT-B bs 64 proj": (12608, 768, 768),
    "ViT-B bs 64 fc1": (12608, 3072, 768),
    "ViT-B bs 64 fc2": (12608, 768, 3072),
    "LLaMA-7B 2048": (2048, 4096, 4096),
    "LLaMA-7B 8192": (8192, 4096, 4096),
    "LLaMA-7B 8192 up": (8192, 11008, 4096),
    "few tokens 64": (64, 4096, 4096),
}
TINY = {"tiny": (32, 48, 64)}  # for rehearsals
PATHS = {"A lora, B lora": ("lora", "lora"), "A vector, B lora": ("vector", "lora"), "B lora": ("none", "lora")}
Shapes = Mapping[str, tuple[int, int, int]]
Entrant = tuple[str, str | None]  # a backend and a strategy
Calls = dict[str, Callable[[], Tensor]]  # by phase
ENTRANTS: dict[str, Entrant] = {
    "assemble": ("triton", "assemble"),
    "fused": ("triton", "fused"),
    "as dispatched": ("triton", None),
}
Call = tuple[Tensor, Tensor, Tensor, Terms]
RANK = 8
FROZEN = "frozen"


def replays(function: Callable[[], Tensor], repeats: int) -> Callable[[], None]:
    """So many runs of ``function`` from one CUDA graph: the GPU's time alone, whatever Python takes to launch."""

    def run() -> Tensor:
        for _ in range(repeats):
            found = function()
        return found

    graphs = CudaGraphs(torch.device("cuda"))
    graphs.warm_up(function)
    replay, _ = graphs.capture(run)
    return replay


def seconds(functions: Mapping[str, Callable[[], Tensor]], repeats: int = 10, rounds: int = 7) -> Times:
    """Seconds of each function in each round."""
    timed = {name: plain(replays(function, repeats)) for name, function in functions.items()}
    times = interleave(timed, rounds, warmup=2, watch=EventWatch())[WHOLE]
    return per_run(times, dict.fromkeys(times, repeats))


def medians(functions: Mapping[str, Callable[[], Tensor]], repeats: int = 10) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in seconds(functions, repeats).items()}


class Ceilings(NamedTuple):
    """What this machine reaches: see :class:`glora_kernels.planning.machines.Machine`."""

    half: float
    single: float
    bandwidth: float
    cache_bandwidth: float
    overhead: float

    @classmethod
    def measured(cls, size: int = 8192) -> Ceilings:
        """Of large and of small copies (bytes read and written), large products, and of launches in a CUDA graph."""

        def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(rows, columns, device="cuda").to(dtype)

        a, b, c, d = matrix(size, size), matrix(size, size), *(matrix(size, size, torch.float32) for _ in range(2))
        large, small = matrix(4 * size, size), matrix(size // 4, size // 2)  # 512 MiB; 16 MiB, and as much again
        targets = torch.empty_like(large), torch.empty_like(small)
        tiny = torch.zeros(1, device="cuda")
        found = medians(
            {
                "half": lambda: a @ b,
                "single": lambda: c @ d,
                "large": lambda: targets[0].copy_(large),
                "small": lambda: targets[1].copy_(small),
            }
        )
        launch_seconds = medians({"launch": lambda: tiny.add_(1)}, repeats=500)["launch"]
        return cls(
            2 * size**3 / found["half"],
            2 * size**3 / found["single"],
            2 * large.nbytes / found["large"],
            2 * small.nbytes / found["small"],
            launch_seconds,
        )


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
    scale = results_of(reference.glora_linear, in_dtype(call, lambda t: t.double().abs()), dy.double().abs())
    for label, entrant in ENTRANTS.items():
        with use_backend(*entrant):
            got = results_of(glora_linear, call, dy)
        errors = [largest_constant(*three, torch.bfloat16) for three in zip(got, want, scale)]
        if not all(error <= PROMISED[torch.bfloat16] for error in errors):
            raise ValueError(f"{label}: not timed, errors of y and the gradients over u S: {errors}")


def calls_of(function: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor, entrant: Entrant) -> Calls:
    """The forward pass, and the whole step, which returns the gradient of x."""

    def forward() -> Tensor:
        with use_backend(*entrant):
            return function()

    return {FORWARD: forward, WHOLE: lambda: torch.autograd.grad(forward(), leaves, dy)[0]}


def layers(shapes: Shapes) -> Iterator[dict[str, Any]]:
    """The times of every entrant over the frozen layer's, by shape and path; of strategies, what was predicted too."""
    for name, shape in shapes.items():
        for path, kinds in PATHS.items():
            call = make(shape, kinds)
            x, weight, bias, _ = call
            dy = torch.randn(shape[0], shape[1], device="cuda").bfloat16()
            require_right(call, dy)
            leaves = [x, *call[3].flatten()[0]]
            calls = {who: calls_of(partial(glora_linear, *call), leaves, dy, one) for who, one in ENTRANTS.items()}
            frozen = x.detach().requires_grad_()
            calls[FROZEN] = calls_of(partial(F.linear, frozen, weight, bias), [frozen], dy, ("auto", None))
            ratios = {}
            for phase in (FORWARD, WHOLE):
                times = seconds({who: own[phase] for who, own in calls.items()})
                ratios[phase] = {label: asdict(ratio(times, label, FROZEN)) for label in ENTRANTS}
            predicted = {one: _predicted(shape, kinds, one) for one in STRATEGIES}
            yield {"shape": name, "path": path, "over_frozen": ratios, "predicted_seconds": predicted}


def case_of(shape: tuple[int, int, int], kinds: tuple[str, str], strategy: str, architecture: str) -> Case:
    """The call that :func:`make` makes."""
    tokens, outputs, inputs = shape
    places = {"lora": (LOW_RANK, RANK), "vector": (VECTOR, 0), "none": (NONE, 0)}
    path = places[kinds[0]], places[kinds[1]], (VECTOR, 0), (VECTOR, 0), (CONSTANT, 0)
    types = torch.bfloat16, torch.float32
    return Case(Layer(outputs, inputs), path, RANK, "hadamard", *types, tokens, strategy, True, True, architecture)


def _here() -> str:
    return architecture(torch.device("cuda"))


def _predicted(shape: tuple[int, int, int], kinds: tuple[str, str], strategy: str) -> dict[str, float]:
    case = case_of(shape, kinds, strategy, _here())
    found = predict(case.problem, case.tokens, strategy)
    return {FORWARD: found.forward_seconds, WHOLE: found.seconds}


def kernels(shapes: Shapes, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """The time of every kernel of a layer over its own floor, by shape and strategy."""
    for name, shape in shapes.items():
        for strategy in STRATEGIES:
            case = case_of(shape, ("lora", "lora"), strategy, _here())
            floors = _floors(case, ceilings)
            runs = {
                f"{direction} {one.kernel.fn.__name__}": partial(_launched, one)
                for direction, part in zip((FORWARD, BACKWARD), launches_of(case, "cuda"))
                for one in part
            }
            for label, found in medians(runs).items():
                row = {"shape": name, "strategy": strategy, "kernel": label, "milliseconds": 1e3 * found}
                yield row | {"floor_milliseconds": floors.get(label)}


def _launched(one: Launch) -> Tensor:
    """A tensor of the launch, once it is launched."""
    launch(one.kernel, one.grid, one.tile, **one.arguments)
    return next(value for value in one.arguments.values() if isinstance(value, Tensor))


def _floors(case: Case, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds of each kernel: the cost model's bytes and operations at the measured ceilings."""
    way = predict(case.problem, case.tokens, case.strategy)
    kernel_of = {"y": "fused_kernel", "dx": "fused_kernel"}
    return {
        f"{direction} {kernel_of.get(one.name, one.name + '_kernel')}": 1e3
        * max(one.bytes / ceilings.bandwidth, one.flops / ceilings.half)
        for direction, part in zip((FORWARD, BACKWARD), (way.forward, way.backward))
        for one in part
    }


def table(content: dict[str, Any]) -> str:
    """The short table: ratios to the frozen layer, and of kernels to their floors."""
    lines = ["forward, step over the frozen layer's " + " ".join(f"{label:>14}" for label in ENTRANTS)]
    for row in content["layers"]:
        ratios = " ".join(
            f"{row['over_frozen'][FORWARD][label]['median']:7.2f}{row['over_frozen'][WHOLE][label]['median']:7.2f}"
            for label in ENTRANTS
        )
        lines.append(f"{row['shape']:<18}{row['path']:<19} {ratios}")
    lines.append("kernel over its floor")
    for row in content["kernels"]:
        floor = row["floor_milliseconds"]
        over = "" if floor is None else f"{row['milliseconds'] / floor:6.2f}"
        lines.append(f"{row['shape']:<18}{row['strategy']:<9}{row['kernel']:<30}{row['milliseconds']:9.4f} ms {over}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ops", description="Times on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--shapes", choices=("all", "tiny"), default="all")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a GPU, found none")
    shapes, ceilings = (SHAPES, Ceilings.measured()) if options.shapes == "all" else (TINY, Ceilings.measured(64))
    content: dict[str, Any] = {"ceilings": ceilings._asdict(), "layers": [], "kernels": []}
    for key, rows in (("layers", layers(shapes)), ("kernels", kernels(shapes, ceilings))):
        for row in rows:
            content[key].append(row)
            write_text_atomically(options.out, json.dumps(content, indent=1))  # after each: the time may run out
    rate, bandwidth = ceilings.half / 1e12, ceilings.bandwidth / 1e12
    print(f"{TOLD}product {rate:.0f} TFLOP/s, copy {bandwidth:.2f} TB/s, a launch {ceilings.overhead * 1e6:.2f} us")
    print(table(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
