"""The operations and bytes of every launch of a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..gradient_routes import PROBED_TOKENS
from .machines import machine_for
from .operands import ADDED, COLUMN, LOW_RANK, NONE
from .problem import Problem
from .steps import Allocate, Launch, Product, Schedule, Size
from .sums import UNWANTED

# Categories of launches. A dense product has 2 M N K operations.
BLAS = "blas"  # a dense product of the vendor's library
FUSED = "fused"  # a dense product in Triton with W_eff, which is formed in registers
CONTRACTED = "contracted"  # a dense product in Triton that forms dW and contracts it in registers
PASS = "pass"  # bound by memory: reads and writes matrices once or twice
_TEMPORARY = ("w_eff", "dw", "g", "partials")


@dataclass(frozen=True)
class PricedLaunch:
    """One launch.

    Attributes:
        name: the kernel, or the result of a dense product.
        flops: multiplications and additions of its matrix products, each counted once. The padding of ranks is not
            counted, and W_eff is counted once although ``fused`` forms it again for every block of tokens.
        bytes: bytes that it reads from and writes to device memory.
        category: BLAS, FUSED, CONTRACTED or PASS.
        shape: rows, columns and depth of a dense product.
    """

    name: str
    flops: int
    bytes: int
    category: str
    shape: tuple[int, int, int] | None = None


def priced(schedule: Schedule, problem: Problem, tokens: int) -> list[PricedLaunch]:
    """What a schedule launches for so many tokens, in order."""
    prices = _Prices(schedule, problem, tokens)
    return [prices.of(step) for step in schedule.steps if isinstance(step, (Launch, Product))]


def scratch_bytes(schedule: Schedule, tokens: int) -> int:
    """The bytes that a schedule holds at once, apart from its results: W_eff, dW, g = dy W0, partial sums."""
    blocks = blocks_of(schedule, tokens)
    found = {}
    for step in schedule.steps:
        if isinstance(step, (Allocate, Product)) and step.slot in _TEMPORARY:
            shape = step.shape if isinstance(step, Allocate) else step.shape[:2]
            entries = math.prod(_number(size, tokens, blocks) for size in shape)
            found[step.slot] = entries * schedule.dtypes[step.slot].itemsize
    return sum(found.values())


def blocks_of(schedule: Schedule, tokens: int) -> int:
    return -(-tokens // schedule.token_block) if schedule.token_block else 0


def _number(size: Size, tokens: int, blocks: int) -> int:
    return size if isinstance(size, int) else size.of(tokens, blocks)


class _Prices:
    """The prices of the steps of one schedule."""

    def __init__(self, schedule: Schedule, problem: Problem, tokens: int):
        p, self.tokens, self.blocks = problem, tokens, blocks_of(schedule, tokens)
        self.problem, self.entries = p, p.outputs * p.inputs
        self.x_bytes, self.y_bytes = tokens * p.inputs * p.element, tokens * p.outputs * p.element
        sums = [step.shape[0] for step in schedule.steps if isinstance(step, Allocate) and step.slot == "partials"]
        size = sums[0] if sums else 0
        self.sums = _number(size, tokens, self.blocks) * p.wide.itemsize
        self.fixed_sums = 0 if isinstance(size, int) else size.fixed * p.wide.itemsize

    def of(self, step: Launch | Product) -> PricedLaunch:
        if isinstance(step, Product):
            name = "dW" if step.slot == "dw" else step.slot
            return self._product(name, tuple(_number(size, self.tokens, self.blocks) for size in step.shape))
        found: PricedLaunch = getattr(self, f"_{step.kernel}")(step.arguments)
        return found

    def _product(self, name: str, shape: tuple[int, ...]) -> PricedLaunch:
        rows, columns, depth = shape
        moved = self.x_bytes + self.y_bytes + self.problem.weight_bytes
        return PricedLaunch(name, 2 * rows * columns * depth, moved, BLAS, (rows, columns, depth))

    def _ranks(self, given: dict[str, Any]) -> int:
        """The operations for the low ranks in W_eff, when V is given."""
        return 2 * self.entries * (_low_rank(given, "A") + _low_rank(given, "B"))

    def _assemble(self, given: dict[str, Any]) -> PricedLaunch:
        """Forms W_eff and b_eff, and V, for which it walks W0 twice."""
        p, forms, prompt, projects = self.problem, given["WRITE_WEIGHT"], given["C"] != NONE, given["A"] == ADDED
        reads = (forms or prompt) + projects * (not forms or self._spills(p.weight_bytes))
        flops = forms * self._ranks(given) + projects * 2 * self.entries * given["rank_a"]
        flops += prompt * (2 * self.entries + 2 * p.inputs * given["rank_c"])
        small = p.factor_bytes + projects * p.outputs * given["rank_a"] * p.wide.itemsize + 4 * p.outputs * p.element
        return PricedLaunch("assemble", flops, (reads + forms) * p.weight_bytes + small, PASS)

    def _fused(self, given: dict[str, Any]) -> PricedLaunch:
        """The product y or dx with W_eff in registers; in the forward pass it forms b_eff too."""
        name = "y" if given["x_ptr"] == "x" else "dx"
        plain = self._product(name, (self.tokens, given["OUT"], given["RED"]))
        flops = plain.flops + self._ranks(given) + 2 * self.entries * (given["C"] != NONE)
        return PricedLaunch(name, flops, plain.bytes + self.problem.factor_bytes, FUSED, plain.shape)

    def _token_pass(self, given: dict[str, Any]) -> PricedLaunch:
        """Reads dy, x (a second time too, from the cache if x fits there) and what else the route needs."""
        projected, scaled, solved = given["A"] == ADDED, given["A"] == COLUMN, given["OUTPUT"]
        contracts, writes, has_b = _contracts_b(given), given["WRITE_DX"], given["rank_b"] > 0
        sums_bias = any(_wanted(given, place) for place in ("at_db", "at_db_sum", "at_db_bias"))
        through_dy = sums_bias or contracts or projected or solved or (scaled and has_b)
        reads_x = contracts or projected or scaled
        twice = projected or (contracts and (scaled or given["B"] == LOW_RANK))
        moved = through_dy * self.y_bytes + (reads_x + (twice and self._spills(self.x_bytes))) * self.x_bytes
        moved += solved * self.y_bytes + scaled * (1 + writes) * self.x_bytes
        moved += self.problem.factor_bytes + self.sums - self.fixed_sums
        return PricedLaunch("token_pass", self._thin_flops(given), moved, PASS)

    def _thin_flops(self, given: dict[str, Any]) -> int:
        """4 M (N + K) operations per rank for both gradients of a low rank, and half as many for its part in dx."""
        p, contracts, rank_b = self.problem, _contracts_b(given), _low_rank(given, "B")
        both, one_sided = 2 * self.tokens * (p.outputs + p.inputs), 2 * self.tokens * p.outputs
        flops = (given["A"] == ADDED) * 2 * both * given["rank_a"] + contracts * 2 * both * rank_b
        if contracts and not rank_b:
            flops += one_sided
        return flops + given["WRITE_DX"] * rank_b * (both - contracts * one_sided)

    def _weight_pass(self, given: dict[str, Any]) -> PricedLaunch:
        """Reads W0; writes W_eff for dx, sums for C and for the left factor of a projected A."""
        p, writes = self.problem, given["WRITE_WEIGHT"]
        flops = writes * self._ranks(given) + given["DC"] * self._prompt_flops(given)
        flops += 2 * self.entries * (given["DV"] * given["rank_a"] + given["PROBE"] * PROBED_TOKENS)
        return PricedLaunch(
            "weight_pass", flops, (1 + writes) * p.weight_bytes + p.factor_bytes + self.fixed_sums, PASS
        )

    def _prompt_flops(self, given: dict[str, Any]) -> int:
        return 2 * self.entries + 4 * self.problem.inputs * given["rank_c"]

    def _contract(self, given: dict[str, Any]) -> PricedLaunch:
        """Contracts dW with W0 and the factors; dW is read, or formed in registers. It may write W_eff for dx."""
        p, writes = self.problem, given["WRITE_WEIGHT"]
        if given["ONLY_LOST"]:  # usually no row is lost: then it reads nothing but flags
            return PricedLaunch("contract", 0, 4 * p.outputs * -(-p.inputs // given["BLOCK_K"]), PASS)
        ranks = _low_rank(given, "A") + given["THIN_B"] * given["rank_b"]
        flops = (
            4 * self.entries * ranks + _wanted(given, "at_dc") * self._prompt_flops(given) + writes * self._ranks(given)
        )
        if given["GEMM"]:
            plain = self._product("dW", (p.outputs, p.inputs, self.tokens))
            moved = plain.bytes + p.factor_bytes + self.fixed_sums
            return PricedLaunch("contract", plain.flops + flops, moved, CONTRACTED, plain.shape)
        moved = (2 + writes) * p.weight_bytes + p.factor_bytes + self.fixed_sums
        return PricedLaunch("contract", flops, moved, PASS)

    def _finish(self, given: dict[str, Any]) -> PricedLaunch:
        """Reads every partial sum and writes the gradients."""
        return PricedLaunch("finish", 0, self.sums + self.problem.factor_bytes, PASS)

    def _spills(self, size: int) -> bool:
        """Whether a pass that walks a matrix twice reads it twice from memory, since the L2 cannot hold it."""
        return size > machine_for(self.problem.architecture).cache


def _wanted(given: dict[str, Any], place: str) -> bool:
    """Whether a sum is formed."""
    return given[place] != UNWANTED


def _contracts_b(given: dict[str, Any]) -> bool:
    """Whether a token pass contracts B with dW."""
    return given["THIN_B"] or _wanted(given, "at_b") or _wanted(given, "at_b_sum")


def _low_rank(given: dict[str, Any], slot: str) -> int:
    """The rank of A or B where it has factors."""
    rank: int = given[f"rank_{slot.lower()}"]
    return rank if given[slot] in (LOW_RANK, ADDED) else 0
