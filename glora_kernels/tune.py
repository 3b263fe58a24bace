"""Measures tile settings on this machine's GPU and writes them down, to be committed.

    python -m glora_kernels.tune [--kernels fused token_pass] [--missing] [--seconds 600] [--out settings.json]

Nothing here runs automatically: production reads ``planning/settings.json`` and never measures. For every rule of the
architecture the candidates are run on layers of a ViT-B and of a 7B LLaMA, with as many tokens and as large a rank as
the rule is meant for. Kernels that spill or do not fit are left out. Each median is divided by the best of its shape;
the tile with the least sum is taken. The rules themselves (up to how many tokens, which rank) stay as they are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ._triton.device import architecture
from ._triton.kernels.contract import contract_kernel
from ._triton.launch import Launch, compile_for, launch, spills
from ._triton.recording import launches_of
from .planning.cases import Layer, cases
from .planning.problem import CONSTANT, LOW_RANK, VECTOR
from .planning.settings import FILE, KERNELS, Rule, Tile, forced_tiles, load, rules

SHAPES = ((768, 768), (3072, 768), (4096, 4096))  # N, K
TOKENS = 12608  # if a rule has no limit: ViT-B at batch 64
RANK = 64

Measure = Callable[[Launch], float | None]


def candidates(kernel: str, tile: Tile) -> Iterator[Tile]:
    """The tile itself and its neighbours: blocks halved and doubled, other warps and stages, swapped."""
    yield tile
    scales = (0.5, 1, 2)
    tokens = scales if tile.tokens else (1,)
    columns = scales if tile.columns else (1,)
    swaps = (False, True) if kernel == "fused" else (False,)
    for t, r, c, warps, stages, swap in itertools.product(tokens, scales, columns, (4, 8), (2, 3, 4), swaps):
        blocks = int(tile.tokens * t), int(tile.rows * r), int(tile.columns * c)
        if all(block == 0 or 16 <= block <= 256 for block in blocks):
            yield Tile(*blocks, warps, stages, swap)


def problems(kernel: str, rule: Rule, element: int) -> Iterator[list[Launch]]:
    """For each shape, the kernel's launches in a layer that the rule is meant for; all terms are low rank."""
    dtype = torch.bfloat16 if element == 2 else torch.float32
    strategy = "fused" if kernel in ("fused", "gemm_contract") else "assemble"
    product = "matmul" if kernel == "token_pass" else "hadamard"  # there A has gradients of its own in that pass
    rank = rule.max_rank or RANK
    path = (*[(LOW_RANK, rank)] * 3, (VECTOR, 0), (CONSTANT, 0))
    for case in cases(
        [(Layer(*size), rule.max_tokens or TOKENS) for size in SHAPES],
        [path],
        [strategy],
        rank=rank,
        product=product,
        dtype=dtype,
        factors=torch.float32,
        architecture=architecture(torch.device("cuda")),
    ):
        forward, backward = launches_of(case, "cuda")
        yield [one for one in (*forward, *backward) if _serves(one, kernel)]


def _serves(launch: Launch, kernel: str) -> bool:
    if launch.kernel is contract_kernel:
        return kernel == ("gemm_contract" if launch.arguments["GEMM"] else "contract")
    return launch.kernel.fn.__name__ == f"{kernel}_kernel"


def best_tile(kernel: str, rule: Rule, measure: Measure, tiles: Sequence[Tile], deadline: float = math.inf) -> Tile:
    """The tile with the least time, summed over shapes relative to the best of each; the present one if none runs.

    Args:
        deadline: by ``time.monotonic``; tiles whose turn comes later are left out.
    """
    times: dict[Tile, list[float]] = {}
    for tile in tiles:
        if time.monotonic() >= deadline:
            break
        with forced_tiles({kernel: tile}):
            measured = [measure(one) for each in problems(kernel, rule, rule.elements[0]) for one in each]
        if measured and all(value is not None for value in measured):
            times[tile] = [value for value in measured if value is not None]
    if not times:
        return rule.tile
    least = [min(values) for values in zip(*times.values())]
    return min(times, key=lambda tile: sum(value / low for value, low in zip(times[tile], least)))


def time_launch(one: Launch) -> float | None:
    """Median milliseconds of a launch on this GPU; None if it does not fit or spills."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        compiled = compile_for(one.kernel, tuple(one.arguments.values()), one.tile)
        if spills(compiled):
            return None
        return do_bench(lambda: launch(one.kernel, one.grid, one.tile, **one.arguments), return_mode="median")
    except (OutOfResources, CompilationError):
        return None


def tune(name: str, kernels: Sequence[str], measure: Measure, seconds: float = math.inf) -> dict[str, list[Rule]]:
    """The rules of architecture ``name`` with the fastest tiles; rules not reached in time stay the same."""
    deadline = time.monotonic() + seconds
    table = rules(name)
    todo = [(kernel, rule) for kernel in kernels for rule in table[kernel]]
    tuned: dict[str, list[Rule]] = {kernel: [] for kernel in kernels}
    for kernel, rule in tqdm(todo, desc="tune", unit="rule", disable=None):
        tiles = list(dict.fromkeys(candidates(kernel, rule.tile)))
        best = best_tile(kernel, rule, measure, tiles, deadline)
        tuned[kernel].append(replace(rule, tile=best))
    return tuned


def write(name: str, tuned: dict[str, list[Rule]], file: Path) -> None:
    """Write the settings in force to ``file``, with the tuned rules in place of those of architecture ``name``."""
    content = json.loads(FILE.read_text())
    table = {**rules(name), **tuned}
    content["architectures"][name] = {kernel: [_entry(rule) for rule in table[kernel]] for kernel in KERNELS}
    file.write_text(render(content))


def render(content: dict) -> str:
    """The settings as JSON, one rule per line."""
    blocks = []
    for name, table in content["architectures"].items():
        if isinstance(table, str):
            blocks.append(f"    {json.dumps(name)}: {json.dumps(table)}")
            continue
        kernels = [
            f"      {json.dumps(kernel)}: [\n"
            + ",\n".join(f"        {json.dumps(rule)}" for rule in found)
            + "\n      ]"
            for kernel, found in table.items()
        ]
        blocks.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(kernels) + "\n    }")
    body = ",\n".join(blocks)
    return f'{{\n  "version": {content["version"]},\n  "architectures": {{\n{body}\n  }}\n}}\n'


def _entry(rule: Rule) -> dict:
    tile = rule.tile
    entry: dict = {"elements": list(rule.elements)}
    entry |= {"max_tokens": rule.max_tokens} if rule.max_tokens is not None else {}
    entry |= {"max_rank": rule.max_rank} if rule.max_rank is not None else {}
    entry |= {"block": [tile.tokens, tile.rows, tile.columns], "warps": tile.warps, "stages": tile.stages}
    return entry | ({"swap": True} if tile.swap else {})


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if the file was written, 2 if there is nothing to measure on."""
    parser = argparse.ArgumentParser(prog="python -m glora_kernels.tune", description="Measure tile settings.")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS, metavar="KERNEL")
    parser.add_argument("--out", type=Path, default=FILE, help="the file to write (default: the one that is shipped)")
    parser.add_argument("--missing", action="store_true", help="do nothing where this GPU has settings of its own")
    parser.add_argument("--seconds", type=float, default=math.inf, help="try no further tile after so long")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("expected a GPU to measure on, found none")
    name = architecture(torch.device("cuda", torch.cuda.current_device()))
    if arguments.missing and name in load():
        print(f"{name} has settings of its own")
        return 0
    write(name, tune(name, arguments.kernels, time_launch, arguments.seconds), arguments.out)
    print(f"{arguments.out}: wrote {', '.join(arguments.kernels)} for {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
