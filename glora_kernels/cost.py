"""What each strategy of the Triton backend would take: a pure function of shapes, kinds, types and architecture.

Every launch of a step is listed with its operations and its bytes of device memory, and is predicted to take

    overhead + max(flops / rate, bytes / bandwidth)

seconds. A dense product runs in waves of tiles over the processors (:func:`_product_seconds`). The numbers of each
machine are in ``machines.py``; nothing here has been measured by us. The lists follow ``_triton/forward.py`` and
``_triton/passes.py``, and a test compares them with what those launch.

M tokens, N out, K in, R rank. This module loads no Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .dispatch import STRATEGIES
from .machines import Machine, machine_for
from .precision import tf32_allowed
from .reuse import MIN_INPUTS_TO_REUSE, MIN_TOKENS_TO_REUSE, PROBED_TOKENS
from .terms import SLOTS, Constant, LowRank, Terms, Vector

NONE, CONSTANT, VECTOR, LOW_RANK = "none", "constant", "vector", "low rank"
_KINDS: dict[type, str] = {type(None): NONE, Constant: CONSTANT, Vector: VECTOR, LowRank: LOW_RANK}

# Kinds of launches. A dense product is of 2 M N K operations.
BLAS = "blas"  # a dense product of the vendor's library
FUSED = "fused"  # a dense product in Triton, of which an operand is W_eff, formed in registers
CONTRACTED = "contracted"  # a dense product in Triton, dW, contracted in registers
PASS = "pass"  # bound by memory: reads and writes matrices once or twice

# Shares of the vendor's rate; [E] is an estimate, as in machines.py.
SINGLE_SHARE = 0.5  # products in Triton, in fp32 without TF32 [E]
PASS_SHARE = 0.2  # thin products inside passes, padded to a rank of 16 [E]
# Tiles (rows, columns) and the share of the best rate that they reach: smaller ones load more for each operation.
# [E] the first four are those of guides/kernels.md, section 1.
TILES = ((128, 256, 1.0), (128, 128, 0.92), (64, 128, 0.78), (64, 64, 0.55), (32, 64, 0.35), (16, 64, 0.2))
SPLITS = (1, 2, 4, 8)  # of the sum of a product, by the vendor's library; the kernels here do not split
SHORTEST_SPLIT = 512  # how much of the sum a split keeps at least
DRAW = 2.0  # a processor can draw this many times its even share of the bandwidth [E]
WINS = 0.98  # fused is taken below this share of assemble's time: the rate of the vendor's library is the surer one
REMEMBERED = 1 << 15  # problems


class Problem(NamedTuple):
    """One layer call, as far as its cost depends on it.

    Attributes:
        tokens, outputs, inputs: M, N, K.
        kinds, ranks: of A to E; a rank of 0 where there is none.
        product: ``"hadamard"`` or ``"matmul"``.
        element, factor: bytes of an element of W0, x and dy; of the factors of A and B.
        bias: whether there is a b0.
        wanted: the slots that want a gradient; None for all that are not none.
        wants_x: whether x does.
        tf32: whether fp32 products use TF32.
        architecture: ``sm_90``, ``gfx942`` and the like; ``interpreter`` is taken for an ``sm_90``.
    """

    tokens: int
    outputs: int
    inputs: int
    kinds: tuple[str, str, str, str, str]
    ranks: tuple[int, int, int, int, int]
    product: str
    element: int
    factor: int
    bias: bool
    wanted: frozenset[str] | None
    wants_x: bool
    tf32: bool
    architecture: str

    @staticmethod
    def of(
        tokens: int,
        weight: Tensor,
        terms: Terms,
        architecture: str,
        *,
        bias: bool = True,
        wanted: frozenset[str] | None = None,
        wants_x: bool = True,
    ) -> Problem:
        """The problem of a call: on the way of every call, so kept to plain look-ups."""
        a, b, c, d, e = terms.A, terms.B, terms.C, terms.D, terms.E
        outputs, inputs = weight.shape
        element = weight.element_size()
        left = a if type(a) is LowRank else b
        return Problem(
            tokens,
            outputs,
            inputs,
            (_KINDS[type(a)], _KINDS[type(b)], _KINDS[type(c)], _KINDS[type(d)], _KINDS[type(e)]),
            (_rank(a), _rank(b), _rank(c), 0, 0),
            terms.product,
            element,
            left.down.element_size() if type(left) is LowRank else element,
            bias,
            wanted,
            wants_x,
            element == 4 and tf32_allowed() and architecture[0] != "g",
            architecture,
        )

    def kind(self, slot: str) -> str:
        return self.kinds[SLOTS.index(slot)]

    def rank(self, slot: str) -> int:
        return self.ranks[SLOTS.index(slot)]

    def has(self, slot: str) -> bool:
        return self.kind(slot) != NONE

    def wants(self, slot: str) -> bool:
        """Whether the slot wants a gradient; D has none without a bias to scale."""
        asked = self.wanted is None or slot in self.wanted
        return asked and self.has(slot) and (slot != "D" or self.bias)

    @property
    def adapts_weight(self) -> bool:
        return self.has("A") or self.has("B")

    @property
    def adapts_bias(self) -> bool:
        return self.has("C") or self.has("E") or (self.has("D") and self.bias)

    @property
    def projects(self) -> bool:
        """Whether A is a low rank of the matmul product, so that V = W0 Ad is needed."""
        return self.kind("A") == LOW_RANK and self.product == "matmul"

    @property
    def wide(self) -> int:
        """Bytes of an element of sums and effective weights."""
        return max(self.element, 4)

    @property
    def x_bytes(self) -> int:
        return self.tokens * self.inputs * self.element

    @property
    def y_bytes(self) -> int:
        return self.tokens * self.outputs * self.element

    @property
    def weight_bytes(self) -> int:
        return self.outputs * self.inputs * self.element

    @property
    def factor_bytes(self) -> int:
        """Of A and B."""
        return self.factor * (self.outputs + self.inputs) * (self.rank("A") + self.rank("B"))


def _rank(term: object) -> int:
    if type(term) is not LowRank:
        return 0
    return term.up.shape[0] if term.rank is None else term.rank


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        name: a kernel, or what a dense product makes.
        flops: multiplications and additions of its matrix products, each counted once: neither the padding of ranks
            nor that ``fused`` forms W_eff anew for every block of tokens.
        bytes: read from and written to device memory.
        kind: BLAS, FUSED, CONTRACTED or PASS.
        shape: rows, columns and depth of a dense product.
    """

    name: str
    flops: int
    bytes: int
    kind: str
    shape: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Prediction:
    """What a step would take by one strategy.

    Attributes:
        strategy: ``"assemble"`` or ``"fused"``.
        forward, backward: the launches, in order.
        forward_seconds, backward_seconds: what they take on the device. Host time is not in it: where it is longer,
            as with few tokens in eager mode, the number of launches decides.
        scratch_bytes: see :func:`scratch_bytes`.
    """

    strategy: str
    forward: tuple[Launch, ...]
    backward: tuple[Launch, ...]
    forward_seconds: float
    backward_seconds: float
    scratch_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


@lru_cache(maxsize=REMEMBERED)
def strategy_for(problem: Problem) -> str:
    """The strategy that is predicted to be faster over forward and backward; assemble where they are close.

    Decided for the tokens rounded to four significant bits, so that batches of many lengths share their decisions.

    Raises:
        ValueError: nothing is known of the architecture or of an older one of its family.
    """
    return _faster(problem._replace(tokens=rounded(problem.tokens)))


@lru_cache(maxsize=REMEMBERED)
def _faster(problem: Problem) -> str:
    assemble, fused = (predict(problem, strategy).seconds for strategy in STRATEGIES)
    return "fused" if fused < WINS * assemble else "assemble"


def rounded(tokens: int) -> int:
    """To the nearest number of four significant bits, by less than 7%."""
    step = 1 << max(0, tokens.bit_length() - 4)
    return (tokens + step // 2) // step * step


def predict(problem: Problem, strategy: str) -> Prediction:
    """The launches of a strategy and what they would take; ValueError as in :func:`strategy_for`."""
    machine = machine_for(problem.architecture)
    forward, backward = launches(problem, strategy)
    there, back = (sum(seconds(launch, problem, machine) for launch in part) for part in (forward, backward))
    return Prediction(strategy, tuple(forward), tuple(backward), there, back, scratch_bytes(problem, strategy))


def launches(problem: Problem, strategy: str) -> tuple[list[Launch], list[Launch]]:
    """What forward and backward launch, in order: at most 2 and 5."""
    return _forward(problem, strategy), _backward(problem, strategy)


def route_of(problem: Problem) -> str:
    """The route of the backward pass, see ``_triton/backward.py``; y is taken to be kept wherever that can pay off."""
    kind = problem.kind("A")
    if not problem.wants("A"):
        return "thin"
    if kind == CONSTANT or (kind == VECTOR and problem.product == "matmul"):
        return "scaled"
    if kind == LOW_RANK:
        return "projected" if problem.projects else "dense"
    return "solved" if problem.tokens >= MIN_TOKENS_TO_REUSE and problem.inputs >= MIN_INPUTS_TO_REUSE else "dense"


def scratch_bytes(problem: Problem, strategy: str) -> int:
    """Of what forward or backward hold at once beside their results: W_eff, dW, g = dy W0 and partial sums."""
    p, route = problem, route_of(problem)
    formed = p.weight_bytes * (p.adapts_weight and strategy == "assemble")
    backward = formed * (p.wants_x and route != "scaled") + formed * (route == "dense")
    backward += p.x_bytes * (route == "scaled") + _sums(p, route)
    return max(formed, backward)


# Forward.


def _forward(p: Problem, strategy: str) -> list[Launch]:
    if p.adapts_weight and strategy == "fused":
        return [*([_assemble(p, write=False)] if p.projects else []), _fused("y", p)]
    return [*([_assemble(p)] if p.adapts_weight or p.adapts_bias else []), _product("y", p)]


def _assemble(p: Problem, write: bool = True) -> Launch:
    """W_eff and b_eff; V on the way, which takes W0 twice. Without ``write``, V alone."""
    weight, entries = p.weight_bytes, p.outputs * p.inputs
    forms = p.adapts_weight and write
    prompt = p.has("C") and write
    reads = int(forms or prompt) + p.projects * (not forms or _spills(p, weight))
    flops = forms * _assembly(p) + prompt * (2 * entries + 2 * p.inputs * p.rank("C"))
    flops += p.projects * 2 * entries * p.rank("A")
    small = p.factor_bytes + p.projects * p.outputs * p.rank("A") * p.wide + 4 * p.outputs * p.element
    return Launch("assemble", flops, (reads + forms) * weight + small, PASS)


def _assembly(p: Problem) -> int:
    """Operations of the low ranks in W_eff, V being given."""
    return 2 * p.outputs * p.inputs * (p.rank("A") + p.rank("B"))


def _product(name: str, p: Problem) -> Launch:
    """A product with the weight (y, dx, g) or, for dW, of dy and x."""
    shapes = {"y": (p.tokens, p.outputs, p.inputs), "dW": (p.outputs, p.inputs, p.tokens)}
    shape = shapes.get(name, (p.tokens, p.inputs, p.outputs))
    moved = p.x_bytes + p.y_bytes + p.weight_bytes
    return Launch(name, 2 * p.tokens * p.outputs * p.inputs, moved, BLAS, shape)


def _fused(name: str, p: Problem) -> Launch:
    """The same with W_eff in registers; in the forward pass it forms b_eff too."""
    plain = _product(name, p)
    prompt = 2 * p.outputs * p.inputs * (name == "y" and p.has("C"))
    return Launch(name, plain.flops + _assembly(p) + prompt, plain.bytes + p.factor_bytes, FUSED, plain.shape)


# Backward.


def _backward(p: Problem, strategy: str) -> list[Launch]:
    route = route_of(p)
    steps = {"scaled": _scaled, "dense": _dense}.get(route, _through_tokens)(p, strategy)
    if any(map(p.wants, SLOTS)):
        steps.append(_finish(p, route))
    return steps


def _through_tokens(p: Problem, strategy: str) -> list[Launch]:
    """The routes thin, projected and solved."""
    route, writes = route_of(p), strategy == "assemble" and p.wants_x and p.adapts_weight
    steps = [_token_pass(p, route)] if _needs_token_pass(p, route) else []
    if writes or route != "thin" or p.wants("C"):
        steps.append(_weight_pass(p, route, writes))
    if p.wants_x:
        steps.append(_fused("dx", p) if p.adapts_weight and not writes else _product("dx", p))
    if route == "solved":  # no row is lost as a rule: then it reads no more than flags
        steps.append(Launch("contract", 0, 4 * p.outputs * -(-p.inputs // _block(p)), PASS))
    return steps


def _scaled(p: Problem, strategy: str) -> list[Launch]:
    steps = [_product("g", p), _token_pass(p, "scaled")]
    return [*steps, _weight_pass(p, "scaled", False)] if p.wants("C") else steps


def _dense(p: Problem, strategy: str) -> list[Launch]:
    """dW is taken to be in the layer's type; for fp16 it is in fp32."""
    steps = [_token_pass(p, "dense")] if _sums_bias(p, "dense") else []
    if strategy == "assemble":
        steps += [_product("dW", p), _contraction(p)]
    else:
        steps.append(_contracted(p))
    if p.wants_x:
        steps.append(_product("dx", p) if strategy == "assemble" else _fused("dx", p))
    return steps


def _contraction(p: Problem) -> Launch:
    """Reads dW and W0, writes W_eff for dx."""
    moved = (2 + p.wants_x) * p.weight_bytes + p.factor_bytes + _contraction_sums(p)
    return Launch("contract", _contraction_flops(p) + p.wants_x * _assembly(p), moved, PASS)


def _contracted(p: Problem) -> Launch:
    """dW formed in registers, of dy and x, and contracted there with W0."""
    plain = _product("dW", p)
    moved = plain.bytes + p.factor_bytes + _contraction_sums(p)
    return Launch("contract", plain.flops + _contraction_flops(p), moved, CONTRACTED, plain.shape)


def _contraction_flops(p: Problem) -> int:
    ranks = sum(p.rank(slot) for slot in "AB" if p.wants(slot))
    return 2 * p.outputs * p.inputs * (2 * ranks + p.wants("C")) + 4 * p.inputs * p.rank("C") * p.wants("C")


def _needs_token_pass(p: Problem, route: str) -> bool:
    return _sums_bias(p, route) or p.wants("B") or route in ("projected", "solved")


def _sums_bias(p: Problem, route: str) -> bool:
    """Whether db is summed up: for C, D and E, and to solve for A."""
    return any(map(p.wants, "CDE")) or (route == "solved" and _has_bias(p))


def _has_bias(p: Problem) -> bool:
    return p.bias or p.has("C") or p.has("E")


def _contracts_b(p: Problem, route: str) -> bool:
    return route != "dense" and (p.wants("B") or (route == "solved" and p.has("B")))


def _token_pass(p: Problem, route: str) -> Launch:
    """Reads dy and x (x once more, out of the cache if it stays there) and what else the route says."""
    contracts, scaled = _contracts_b(p, route), route == "scaled"
    through_dy = _sums_bias(p, route) or contracts or route in ("projected", "solved") or (scaled and p.has("B"))
    reads_x = contracts or route in ("projected", "scaled")
    twice = reads_x and (route == "projected" or (contracts and (scaled or p.rank("B") > 0)))
    moved = through_dy * p.y_bytes + (reads_x + (twice and _spills(p, p.x_bytes))) * p.x_bytes
    moved += (route == "solved") * p.y_bytes + scaled * (1 + p.wants_x) * p.x_bytes
    return Launch("token_pass", _thin_flops(p, route), moved + p.factor_bytes + _token_sums(p, route), PASS)


def _thin_flops(p: Problem, route: str) -> int:
    """4 M (N + K) operations a rank for both gradients of a low rank, half of it for its part in dx."""
    both, contracts = 2 * p.tokens * (p.outputs + p.inputs), _contracts_b(p, route)
    flops = (route == "projected") * 2 * both * p.rank("A") + contracts * 2 * both * p.rank("B")
    if contracts and not p.rank("B"):
        flops += 2 * p.tokens * p.outputs
    if route == "scaled" and p.wants_x:
        flops += both * p.rank("B") - contracts * 2 * p.tokens * p.outputs * p.rank("B")
    return flops


def _weight_pass(p: Problem, route: str, writes: bool) -> Launch:
    """Reads W0; writes W_eff for dx, sums for C and for the left factor of a projected A."""
    entries = p.outputs * p.inputs
    flops = writes * _assembly(p) + p.wants("C") * (2 * entries + 4 * p.inputs * p.rank("C"))
    flops += (route == "projected") * 2 * entries * p.rank("A") + (route == "solved") * 2 * PROBED_TOKENS * entries
    moved = (1 + writes) * p.weight_bytes + p.factor_bytes + _weight_sums(p, route)
    return Launch("weight_pass", flops, moved, PASS)


def _finish(p: Problem, route: str) -> Launch:
    """Reads every partial sum, writes the gradients."""
    return Launch("finish", 0, _sums(p, route) + p.factor_bytes, PASS)


# Partial sums, bytes. A pass writes one slice for each of its blocks of tokens, rows or columns.


def _block(p: Problem) -> int:
    """How many of them a block has, by the settings for Ampere and later."""
    return 64 if p.element == 2 and max(p.ranks) <= 16 else 32


def _sums(p: Problem, route: str) -> int:
    return _token_sums(p, route) + (_contraction_sums(p) if route == "dense" else _weight_sums(p, route))


def _token_sums(p: Problem, route: str) -> int:
    solves = route == "solved"
    vectors = any(p.wants(slot) and p.kind(slot) == VECTOR for slot in "DE")
    numbers = (p.wants("C") or vectors or (solves and _has_bias(p))) * p.outputs + solves * p.outputs
    numbers += (route == "projected") * p.rank("A") * (p.outputs + p.inputs)
    numbers += (route == "scaled" and p.kind("A") == VECTOR) * p.inputs
    if _contracts_b(p, route):
        numbers += p.rank("B") * (p.outputs + p.inputs) or (solves or p.kind("B") == VECTOR) * p.outputs
    return -(-p.tokens // _block(p)) * numbers * p.wide


def _weight_sums(p: Problem, route: str) -> int:
    numbers = (p.wants("C") + (route == "projected") * p.rank("A")) * p.inputs * -(-p.outputs // _block(p))
    numbers += (route == "solved") * p.outputs * -(-p.inputs // _block(p))
    return numbers * p.wide


def _contraction_sums(p: Problem) -> int:
    across, down = -(-p.inputs // _block(p)) * p.outputs, -(-p.outputs // _block(p)) * p.inputs
    numbers = p.wants("C") * down
    for slot in "AB":
        if p.wants(slot):
            numbers += p.rank(slot) * (across + down) + (p.kind(slot) == VECTOR) * across
    return numbers * p.wide


def _spills(p: Problem, size: int) -> bool:
    """Whether a matrix that a pass walks twice is read twice from memory, too: what is at work at once fills the L2."""
    return size > machine_for(p.architecture).cache


# Time.


def seconds(launch: Launch, problem: Problem, machine: Machine) -> float:
    """What a launch takes on the device."""
    rate = _rate(launch.kind, problem, machine)
    bandwidth = machine.cache_bandwidth if launch.bytes < machine.cache else machine.bandwidth
    if launch.shape is None:
        return machine.overhead + max(launch.flops / rate, launch.bytes / bandwidth)
    return machine.overhead + _product_seconds(launch, machine, rate, bandwidth)


def _rate(kind: str, problem: Problem, machine: Machine) -> float:
    """FLOP/s of a launch of full tiles on all processors."""
    half = problem.element == 2 or problem.tf32
    vendor = machine.half / (1 + problem.tf32) if half else machine.single * 4 / problem.element
    if kind in (BLAS, PASS):
        return vendor * (PASS_SHARE if kind == PASS else 1.0)
    return vendor * ((machine.assembled if kind == FUSED else machine.triton) if half else SINGLE_SHARE)


def _product_seconds(launch: Launch, machine: Machine, rate: float, bandwidth: float) -> float:
    """The best of a few tiles: waves of them over the processors, or what those at work can draw from memory.

    A last wave that is not full counts half of what it leaves idle, since the real tiles are not known here. The
    vendor's library may split the sum as well, and then adds up fp32 parts.
    """
    rows, columns, depth = launch.shape or (0, 0, 0)
    short, long = (rows, columns) if rows < columns else (columns, rows)
    memory, parts = launch.bytes / bandwidth, rows * columns * 4 / machine.cache_bandwidth
    allowed = [splits for splits in SPLITS if splits == 1 or (launch.kind == BLAS and depth >= splits * SHORTEST_SPLIT)]
    best = math.inf
    for tile_rows, tile_columns, share in TILES:
        tiles = -(-short // tile_rows) * -(-long // tile_columns)
        one = 2 * tile_rows * tile_columns * depth * machine.processors / (rate * share)
        for splits in allowed:
            load = tiles * splits / machine.processors
            computing = one / splits * ((load + math.ceil(load)) / 2 if load > 1 else 1.0)
            drawing = memory / (DRAW * load) if DRAW * load < 1 else memory
            merging = machine.overhead + splits * parts if splits > 1 else 0.0
            best = min(best, (computing if computing > drawing else drawing) + merging)
    return best
