"""Measures tile settings on this machine's GPU and writes them down, to be committed.

    python -m glora_kernels.tune [--kernels fused token_pass] [--seconds 600] [--out settings.json] [--log tiles.jsonl]

Nothing here runs automatically: production reads ``planning/settings.json`` and never measures. For every rule of the
architecture the descent begins at its tile: all neighbours are run, then those of the best of them, until none is 2 %
faster. A tile's time is the geometric mean over layers of a ViT-B and of a 7B LLaMA, with as many tokens and as large a
rank as the rule is meant for. Kernels that spill or fail in any way are left out, and the log says why. The rules
themselves (up to how many tokens, which rank) stay as they are.

    python -m glora_kernels.tune --compile cuda:90 --log candidates.jsonl

needs no GPU: it compiles the tiles of every rule and all their neighbours into Triton's cache, under the keys that the
run on the GPU looks for. With ``--candidates candidates.jsonl`` that run leaves out what does not compile or would fail
the gate (``glora_kernels/aot.py``), as kernels that spill do.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from tqdm.auto import tqdm
from triton import knobs

from ._aot.targets import Target, architecture_of, target_named
from ._aot.verdict import failures
from ._aot.work import Job, line_of, measured, workers
from ._triton.builds import Build, builds_of
from ._triton.device import architecture
from ._triton.launch import Launch, compile_for, launch, spills
from ._triton.recording import launches_of
from .planning.cases import Case, Layer, cases
from .planning.problem import CONSTANT, LOW_RANK, VECTOR
from .planning.settings import FILE, KERNELS, Rule, Tile, forced_tiles, rule_of, rules
from .planning.settings_file import calls_of, entry_of, write

SHAPES = ((768, 768), (3072, 768), (4096, 4096))  # N, K
TOKENS = 12608  # if a rule has no limit: ViT-B at batch 64
RANK = 64
STEP = 0.02  # what a tile has to gain over another
WARM_UP, REPEATS = 5, 25  # milliseconds for one launch of one tile
COMPILING = 120.0  # seconds for one build, where compiling is all that is done

Shapes = Sequence[tuple[int, int]]
Measure = Callable[[Launch], float]  # milliseconds
Times = dict[str, list[float]]  # milliseconds of each launch, by problem


def candidates(kernel: str, tile: Tile) -> Iterator[Tile]:
    """The tile itself, and its neighbours, which differ in one thing: a block, warps, stages, or the swap."""
    yield tile
    for name in ("tokens", "rows", "columns"):
        for block in (getattr(tile, name) // 2, getattr(tile, name) * 2):
            if 16 <= block <= 256:
                yield replace(tile, **{name: block})
    yield replace(tile, warps=12 - tile.warps)
    for stages in (tile.stages - 1, tile.stages + 1):
        if 2 <= stages <= 4:
            yield replace(tile, stages=stages)
    if kernel == "fused":
        yield replace(tile, swap=not tile.swap)


def problems(kernel: str, rule: Rule, name: str, shapes: Shapes = SHAPES) -> Iterator[Case]:
    """For each shape, a call that the rule of architecture ``name`` is meant for; all terms are low rank."""
    rank = rule.max_rank or RANK
    return cases(
        [(Layer(*size), rule.max_tokens or TOKENS) for size in shapes],
        [(*[(LOW_RANK, rank)] * 3, (VECTOR, 0), (CONSTANT, 0))],
        ["fused" if kernel in ("fused", "gemm_contract") else "assemble"],
        rank=rank,
        product="matmul" if kernel in ("token_pass", "weight_pass") else "hadamard",  # these passes have da there
        dtype=torch.bfloat16 if rule.elements[0] == 2 else torch.float32,
        factors=torch.float32,
        architecture=name,
    )


def _serves(kernel: str, name: str, constants: Mapping[str, Any]) -> bool:
    """Whether the tile of ``kernel`` is that of a launch or build: the settings know two kinds of ``contract``."""
    return kernel == ("gemm_contract" if name == "contract" and constants["GEMM"] else name)


# -- on the GPU --------------------------------------------------------------------------------------------------------


def better_tiles(kernel: str, tile: Tile, cost: Callable[[Tile], float], deadline: float = math.inf) -> Iterator[Tile]:
    """Every tile that is better than all before, ``tile`` first: neighbours of the best, then those of the new best.

    Args:
        cost: is asked for no tile twice.
        deadline: by ``time.monotonic``; no tile is tried later.
    """
    costs: dict[Tile, float] = {}
    center = best = tile
    while True:
        for candidate in candidates(kernel, center):
            if candidate in costs:
                continue
            if time.monotonic() >= deadline:
                return
            costs[candidate] = cost(candidate)
            if candidate == tile or costs[candidate] < costs[best] * (1 - STEP):
                best = candidate
                yield best
        if best == center:
            return
        center = best


def times_of(kernel: str, rule: Rule, tile: Tile, name: str, measure: Measure, shapes: Shapes = SHAPES) -> Times | str:
    """What the launches of every problem take with this tile, or why it is left out."""
    found: Times = {}
    try:
        with forced_tiles({kernel: tile}):
            for case in problems(kernel, rule, name, shapes):
                own = [one for direction in launches_of(case, "cuda") for one in direction if _launched_by(kernel, one)]
                if not own:
                    raise LookupError(f"expected a launch of {kernel}, got none by {case}")
                found[f"{case.layer.outputs}x{case.layer.inputs}"] = [measure(one) for one in own]
    except Exception as error:  # of the planner, the compiler or the driver: of any type
        return line_of(error)
    return found


def _launched_by(kernel: str, one: Launch) -> bool:
    return _serves(kernel, one.kernel.fn.__name__.removesuffix("_kernel"), one.arguments)


def time_launch(one: Launch) -> float:
    """Median milliseconds of a launch on this GPU.

    Raises:
        RuntimeError: it spills.
        Exception: whatever the compiler or the driver raises.
    """
    from triton.testing import do_bench

    _raise_clocks()
    if count := spills(compile_for(one.kernel, tuple(one.arguments.values()), one.tile)):
        raise RuntimeError(f"expected no spill, got {count} registers")
    return do_bench(
        lambda: launch(one.kernel, one.grid, one.tile, **one.arguments),
        warmup=WARM_UP,
        rep=REPEATS,
        return_mode="median",
    )


@cache
def _raise_clocks() -> None:
    """Keep the GPU busy for half a second, once: the first tile of all would look slow otherwise."""
    from triton.testing import do_bench

    numbers = torch.ones(2**24, device="cuda")
    do_bench(lambda: numbers + 1, warmup=500, rep=1)


class Outcome(NamedTuple):
    """What became of one rule.

    Attributes:
        rule, tile: as it was, and its best tile.
        tried, left_out: how many tiles were tried, and how many of them were left out.
        saved: the part of the time that the best tile saves; 0 where the one before was left out.
    """

    kernel: str
    rule: Rule
    tile: Tile
    tried: int = 0
    left_out: int = 0
    saved: float = 0.0

    def __str__(self) -> str:
        told = "not reached, keeps its tile" if not self.tried else f"{self.tried} tiles, {self.left_out} left out"
        if self.tile != self.rule.tile:
            told += f", now {self.tile}" + f", {self.saved:.0%} less time" * bool(self.saved)
        return f"{self.kernel} {json.dumps(calls_of(self.rule))} {self.rule.tile}: {told}"


class Tuning:
    """The rules of one architecture, and how they become better.

    Attributes:
        table: the rules by kernel, with the best tiles so far.
        outcomes: one for each rule that is to be tuned, by kernel and place; those not reached among them.
    """

    def __init__(
        self, name: str, measure: Measure, log: Log, known: Mapping[tuple[str, Rule], str], shapes: Shapes = SHAPES
    ):
        self.name, self.table = name, {kernel: list(found) for kernel, found in rules(name).items()}
        self.outcomes: dict[tuple[str, int], Outcome] = {}
        self._measure, self._log, self._known, self._shapes = measure, log, known, shapes

    def run(self, kernels: Sequence[str], out: Path, seconds: float, per_rule: float) -> None:
        """Tune rule by rule; each has an equal share of what is left of ``seconds``, ``per_rule`` at most.

        ``out`` is written after each, and before an exception goes on.
        """
        deadline = time.monotonic() + seconds
        todo = [(kernel, place) for kernel in kernels for place in range(len(self.table[kernel]))]
        for kernel, place in todo:
            rule = self.table[kernel][place]
            self.outcomes[kernel, place] = Outcome(kernel, rule, rule.tile)
        for number, (kernel, place) in enumerate(tqdm(todo, desc="tune", unit="rule", disable=None)):
            now = time.monotonic()
            until = now + min(per_rule, (deadline - now) / (len(todo) - number))
            try:
                self._tune(kernel, place, until)
            finally:
                write(self.name, self.table, out)

    def _tune(self, kernel: str, place: int, deadline: float) -> None:
        rule = self.table[kernel][place]
        costs: dict[Tile, float] = {}

        def cost(tile: Tile) -> float:
            reason = self._known.get((kernel, replace(rule, tile=tile)))
            found = reason or times_of(kernel, rule, tile, self.name, self._measure, self._shapes)
            if isinstance(found, str):
                costs[tile] = math.inf
                self._log.write(self.name, kernel, rule, tile, reason=found)
            else:
                times = [math.log(value) for values in found.values() for value in values]
                costs[tile] = math.exp(sum(times) / len(times))
                self._log.write(self.name, kernel, rule, tile, milliseconds=found)
            return costs[tile]

        try:
            for tile in better_tiles(kernel, rule.tile, cost, deadline):
                self.table[kernel][place] = replace(rule, tile=tile)
        finally:
            best = self.table[kernel][place].tile
            saved = 1 - costs[best] / costs[rule.tile] if math.isfinite(costs.get(rule.tile, math.inf)) else 0.0
            left_out = sum(map(math.isinf, costs.values()))
            self.outcomes[kernel, place] = Outcome(kernel, rule, best, len(costs), left_out, saved)


# -- without a GPU -----------------------------------------------------------------------------------------------------


def compile_candidates(
    target: Target, kernels: Sequence[str], jobs: int, log: Log, shapes: Shapes = SHAPES
) -> tuple[int, int, int]:
    """Compile the first candidates of every rule into Triton's cache; how many, left out of them, and their builds."""
    name = architecture_of(target.gpu)
    todo = [
        (kernel, rule, tile)
        for kernel in kernels
        for rule in rules(name)[kernel]
        for tile in candidates(kernel, rule.tile)
    ]
    builds = [builds_with(*candidate, name, shapes) for candidate in todo]
    work = [Job(build, target.gpu) for own in builds for build in own]
    results = iter(tqdm(measured(work, jobs, COMPILING), total=len(work), desc="tune", unit="build", disable=None))
    left_out = 0
    for candidate, own in zip(todo, builds):
        wrong: dict[str, None] = {}
        for build, result in zip(own, islice(results, len(own))):
            wrong |= dict.fromkeys([result] if isinstance(result, str) else failures(build, target, result))
        left_out += bool(wrong)
        log.write(name, *candidate, **({"reason": "; ".join(wrong)} if wrong else {"builds": len(own)}))
    return len(todo), left_out, len(work)


def builds_with(kernel: str, rule: Rule, tile: Tile, name: str, shapes: Shapes = SHAPES) -> list[Build]:
    """What the run on the GPU compiles for a tile."""
    with forced_tiles({kernel: tile}):
        found = builds_of(problems(kernel, rule, name, shapes))
    return [build for build in found if _serves(kernel, build.kernel, build.constexprs)]


# -- the log, and the command ------------------------------------------------------------------------------------------


class Log:
    """A line of JSON for every candidate, as soon as it is tried; none if ``file`` is None."""

    def __init__(self, file: TextIO | None):
        self._file = file

    def write(self, name: str, kernel: str, rule: Rule, tile: Tile, **found: Any) -> None:
        if self._file is not None:
            line = {"architecture": name, "kernel": kernel, "rule": calls_of(rule), "tile": entry_of(tile), **found}
            print(json.dumps(line), file=self._file, flush=True)


def reasons(file: Path, name: str) -> dict[tuple[str, Rule], str]:
    """The candidates that a log says were left out on architecture ``name``, as rules with their tiles, and why."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        (line["kernel"], rule_of({**line["rule"], **line["tile"]})): line["reason"]
        for line in lines
        if line["architecture"] == name and "reason" in line
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if it came to its end, 1 if no tile of some rule could be measured, 130 if it was interrupted.

    2 if there is nothing to measure on.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        target = None if arguments.compile is None else target_named(arguments.compile)
        jobs = workers(arguments.jobs)
        if target is None and not torch.cuda.is_available():
            raise ValueError("expected a GPU to measure on, or --compile, found none")
        name = architecture(torch.device("cuda", torch.cuda.current_device())) if target is None else ""
        known = {} if arguments.candidates is None else reasons(arguments.candidates, name)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    with nullcontext() if arguments.log is None else arguments.log.open("w") as file:
        try:
            if target is None:
                return _measure(Tuning(name, time_launch, Log(file), known, arguments.shapes), arguments)
            _compile(target, arguments, jobs, Log(file))
        except KeyboardInterrupt:
            return 130
    return 0


def _measure(tuning: Tuning, arguments: argparse.Namespace) -> int:
    try:
        tuning.run(arguments.kernels, arguments.out, arguments.seconds, arguments.seconds_per_rule)
    finally:
        print(*tuning.outcomes.values(), f"{arguments.out}: wrote the rules of {tuning.name}", sep="\n")
    return int(any(0 < outcome.tried == outcome.left_out for outcome in tuning.outcomes.values()))


def _compile(target: Target, arguments: argparse.Namespace, jobs: int, log: Log) -> None:
    began = time.monotonic()
    tiles, left_out, builds = compile_candidates(target, arguments.kernels, jobs, log, arguments.shapes)
    told = f"{builds} builds in {time.monotonic() - began:.0f} s; {knobs.cache.dir}"
    print(f"{tiles} candidates for {target.name}, {left_out} left out: {told}")


def _shape(text: str) -> tuple[int, int]:
    outputs, _, inputs = text.partition("x")
    if not (outputs.isdecimal() and inputs.isdecimal() and int(outputs) and int(inputs)):
        raise argparse.ArgumentTypeError(f"expected OUTxIN, got {text!r}")
    return int(outputs), int(inputs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m glora_kernels.tune", description="Measure tile settings.")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS, metavar="KERNEL")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="OUTxIN", help="layers to tune for")
    parser.add_argument("--out", type=Path, default=FILE, help="the file to write (default: the one that is shipped)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="try no further tile after so long")
    parser.add_argument("--seconds-per-rule", type=float, default=math.inf, help="nor of one rule after so long")
    parser.add_argument("--log", type=Path, metavar="FILE", help="a line of JSON for every candidate")
    parser.add_argument("--candidates", type=Path, metavar="FILE", help="the log of --compile: what to leave out")
    parser.add_argument("--compile", metavar="TARGET", help="cuda:90 ...: compile all first candidates, without a GPU")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes for --compile (default: one for each CPU)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
