"""``python -m tests.compiled.profile``: count what the compiled kernels of a layer execute, without a GPU.

Some programs of each launch are executed, evenly spread over the grid. The rest of the memory is zero.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from glora_kernels import glora_linear, use_backend
from tests.helpers import make_call, upstream

from .counting import CLASSES, Counters, Requests
from .driver import library
from .driver.device import Launch, absent_gpu
from .machine.program import Instruction, Program
from .running import decoded, execute

BAD = 1.3  # times the fewest sectors or waves
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("lora_8", "lora_8", "lora_8", "vector", "constant")


class Profile(NamedTuple):
    """A launch whose programs were counted.

    Attributes:
        programs: of the grid; ``executed`` of them were counted.
    """

    kernel: str
    program: Program
    programs: int
    executed: int
    counters: Counters


def profiled(
    architecture: str, strategy: str, kinds: Sequence[str], shape: tuple[int, int, int], programs: int, **options: Any
) -> list[Profile]:
    """The launches of forward and backward of a layer; ``options`` are those of ``make_call``."""
    found: list[Profile] = []

    def run(launch: Launch) -> None:
        code = decoded(launch.kernel.asm["ptx"])
        grid = launch.grid[0]
        taken = sorted({grid * number // programs for number in range(programs)})
        counters = Counters(code.program)
        execute(code, grid, launch.values, launch.shared, launch.tensors, ctas=taken, watch=counters)
        found.append(Profile(launch.name, code.program, grid, len(taken), counters))

    x, weight, bias, terms = make_call(tuple(kinds), shape, **options)
    dy = upstream((x, weight))
    zeros = patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    with zeros, absent_gpu(architecture, run, strategy), use_backend("triton", strategy=strategy):
        glora_linear(x, weight, bias, terms).backward(dy)
    return found


def total(requests: dict[Instruction, Requests]) -> Requests:
    found = Requests()
    for one in requests.values():
        found.add(one)
    return found


def looped(program: Program) -> set[Instruction]:
    """The instructions that stand in loops."""
    return {found for loop in program.loops for number in loop for found in program.blocks[number]}


def row(call: str, profile: Profile) -> dict[str, Any]:
    counters, each = profile.counters, profile.executed
    to_global, to_shared = total(counters.to_global), total(counters.to_shared)
    return {
        "call": call,
        "kernel": profile.kernel,
        "programs": profile.programs,
        **{name: counters.warps[name] / each for name in CLASSES},
        "all": sum(counters.warps.values()) / each,
        "kilobytes": to_global.bytes / each / 1024,
        "sectors": to_global.passes / each,
        "of fewest sectors": to_global.ratio,
        "waves": to_shared.passes / each,
        "of fewest waves": to_shared.ratio,
    }


def bad(call: str, profile: Profile) -> Iterator[dict[str, Any]]:
    """Instructions in loops with too many sectors or waves."""
    inside = looped(profile.program)
    for where, requests in (("sectors", profile.counters.to_global), ("waves", profile.counters.to_shared)):
        for instruction, one in requests.items():
            if instruction in inside and one.ratio > BAD:
                share = one.passes / total(requests).passes
                place = {"call": call, "kernel": profile.kernel, "statement": instruction.shown}
                yield {**place, "what": where, "ratio": one.ratio, "share": share}


def markdown(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    counts = ("programs", "all", *CLASSES, "kilobytes", "sectors", "waves")
    ratios = ("of fewest sectors", "of fewest waves")
    yield "| " + " | ".join(("call", "kernel", *counts, *ratios)) + " |"
    yield "|---" * (2 + len(counts) + len(ratios)) + "|"
    for one in rows:
        numbers = [*(f"{one[name]:,.0f}" for name in counts), *(f"{one[name]:.2f}" for name in ratios)]
        yield "| " + " | ".join([one["call"], one["kernel"], *numbers]) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.compiled.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--strategy", nargs="+", choices=("assemble", "fused"), default=["assemble", "fused"])
    parser.add_argument("--product", nargs="+", choices=("hadamard", "matmul"), default=["hadamard", "matmul"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--kinds", nargs=5, default=KINDS, metavar="KIND", help="of A to E, such as lora_8 or vector")
    parser.add_argument("--shape", nargs=3, type=int, metavar=("M", "N", "K"), default=(12608, 768, 768))
    parser.add_argument("--programs", type=int, default=4, help="to execute of each launch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and instructions that stand out there")
    options = parser.parse_args(arguments)
    if options.programs < 1 or min(options.shape) < 1:
        parser.error("--programs and --shape: expected at least 1")
    if (reason := library.fault()) is not None:
        parser.exit(1, f"no launches here: {reason}\n")
    ranks = [int(kind[5:]) for kind in options.kinds if kind.startswith("lora_")]
    types = {"dtype": DTYPES[options.dtype], "terms_dtype": torch.float32, "storage_rank": max(ranks, default=1)}
    rows, out = [], []
    for architecture, strategy, product in itertools.product(options.architecture, options.strategy, options.product):
        call, shape = f"{architecture} {strategy} {product}", tuple(options.shape)
        launches = profiled(architecture, strategy, options.kinds, shape, options.programs, product=product, **types)
        for one in launches:
            rows.append(row(call, one))
            out.extend(bad(call, one))
    print("\n".join(markdown(rows)))
    for one in out:
        found = f"{one['what']} {one['ratio']:.2f}, {one['share']:.0%} of those of the launch"
        print(f"{found}: {one['call']} {one['kernel']}: {one['statement']}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "bad": out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
