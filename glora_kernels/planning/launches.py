"""The launches of each strategy, with the operations and bytes of every launch."""

from __future__ import annotations

from dataclasses import dataclass

from ..gradient_routes import PROBED_TOKENS
from ..terms import SLOTS
from .machines import machine_for
from .problem import VECTOR, Problem, route_of

# Categories of launches. A dense product has 2 M N K operations.
BLAS = "blas"  # a dense product of the vendor's library
FUSED = "fused"  # a dense product in Triton with W_eff, which is formed in registers
CONTRACTED = "contracted"  # a dense product in Triton that forms dW and contracts it in registers
PASS = "pass"  # bound by memory: reads and writes matrices once or twice


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


def launches(problem: Problem, strategy: str) -> tuple[list[PricedLaunch], list[PricedLaunch]]:
    """What forward and backward launch, in order: at most 2 launches and 5."""
    return _forward(problem, strategy), _backward(problem, strategy)


def scratch_bytes(problem: Problem, strategy: str) -> int:
    """The bytes that forward or backward hold at once, apart from their results: W_eff, dW, g = dy W0, partial sums."""
    p, route = problem, route_of(problem)
    formed = p.weight_bytes * (p.adapts_weight and strategy == "assemble")
    backward = formed * (p.wants_x and route != "scaled") + formed * (route == "dense")
    backward += p.x_bytes * (route == "scaled") + _sums(p, route)
    return max(formed, backward)


def _forward(p: Problem, strategy: str) -> list[PricedLaunch]:
    if p.adapts_weight and strategy == "fused":
        return [*([_assemble(p, write=False)] if p.projects else []), _fused("y", p)]
    return [*([_assemble(p)] if p.adapts_weight or p.adapts_bias else []), _product("y", p)]


def _assemble(p: Problem, write: bool = True) -> PricedLaunch:
    """Forms W_eff and b_eff, and V, for which it walks W0 twice. Without ``write``, V alone."""
    weight, entries = p.weight_bytes, p.outputs * p.inputs
    forms = p.adapts_weight and write
    prompt = p.has("C") and write
    reads = int(forms or prompt) + p.projects * (not forms or _spills(p, weight))
    flops = forms * _assembly(p) + prompt * (2 * entries + 2 * p.inputs * p.rank("C"))
    flops += p.projects * 2 * entries * p.rank("A")
    small = p.factor_bytes + p.projects * p.outputs * p.rank("A") * p.wide + 4 * p.outputs * p.element
    return PricedLaunch("assemble", flops, (reads + forms) * weight + small, PASS)


def _assembly(p: Problem) -> int:
    """The operations for the low ranks in W_eff, when V is given."""
    return 2 * p.outputs * p.inputs * (p.rank("A") + p.rank("B"))


def _product(name: str, p: Problem) -> PricedLaunch:
    """A dense product: with the weight (y, dx, g), or of dy and x (dW)."""
    shapes = {"y": (p.tokens, p.outputs, p.inputs), "dW": (p.outputs, p.inputs, p.tokens)}
    shape = shapes.get(name, (p.tokens, p.inputs, p.outputs))
    moved = p.x_bytes + p.y_bytes + p.weight_bytes
    return PricedLaunch(name, 2 * p.tokens * p.outputs * p.inputs, moved, BLAS, shape)


def _fused(name: str, p: Problem) -> PricedLaunch:
    """The product y or dx with W_eff in registers; in the forward pass it forms b_eff too."""
    plain = _product(name, p)
    prompt = 2 * p.outputs * p.inputs * (name == "y" and p.has("C"))
    return PricedLaunch(name, plain.flops + _assembly(p) + prompt, plain.bytes + p.factor_bytes, FUSED, plain.shape)


def _backward(p: Problem, strategy: str) -> list[PricedLaunch]:
    route = route_of(p)
    listed = {"scaled": _scaled, "dense": _dense}.get(route, _through_tokens)(p, strategy)
    if any(map(p.wants, SLOTS)):
        listed.append(_finish(p, route))
    return listed


def _through_tokens(p: Problem, strategy: str) -> list[PricedLaunch]:
    """The routes thin, projected and solved."""
    route, writes = route_of(p), strategy == "assemble" and p.wants_x and p.adapts_weight
    listed = [_token_pass(p, route)] if _needs_token_pass(p, route) else []
    if writes or route != "thin" or p.wants("C"):
        listed.append(_weight_pass(p, route, writes))
    if p.wants_x:
        listed.append(_fused("dx", p) if p.adapts_weight and not writes else _product("dx", p))
    if route == "solved":  # usually no row is lost: then it reads nothing but flags
        listed.append(PricedLaunch("contract", 0, 4 * p.outputs * -(-p.inputs // _block(p)), PASS))
    return listed


def _scaled(p: Problem, strategy: str) -> list[PricedLaunch]:
    listed = [_product("g", p), _token_pass(p, "scaled")]
    return [*listed, _weight_pass(p, "scaled", False)] if p.wants("C") else listed


def _dense(p: Problem, strategy: str) -> list[PricedLaunch]:
    """The route dense. dW counts as being in the layer's type, although it is in fp32 for fp16."""
    listed = [_token_pass(p, "dense")] if _sums_bias(p, "dense") else []
    if strategy == "assemble":
        listed += [_product("dW", p), _contraction(p)]
    else:
        listed.append(_contracted(p))
    if p.wants_x:
        listed.append(_product("dx", p) if strategy == "assemble" else _fused("dx", p))
    return listed


def _contraction(p: Problem) -> PricedLaunch:
    """Reads dW and W0, writes W_eff for dx."""
    moved = (2 + p.wants_x) * p.weight_bytes + p.factor_bytes + _contraction_sums(p)
    return PricedLaunch("contract", _contraction_flops(p) + p.wants_x * _assembly(p), moved, PASS)


def _contracted(p: Problem) -> PricedLaunch:
    """Forms dW from dy and x in registers, and contracts it there with W0."""
    plain = _product("dW", p)
    moved = plain.bytes + p.factor_bytes + _contraction_sums(p)
    return PricedLaunch("contract", plain.flops + _contraction_flops(p), moved, CONTRACTED, plain.shape)


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


def _token_pass(p: Problem, route: str) -> PricedLaunch:
    """Reads dy, x (a second time too, from the cache if x fits there) and what else the route needs."""
    contracts, scaled = _contracts_b(p, route), route == "scaled"
    through_dy = _sums_bias(p, route) or contracts or route in ("projected", "solved") or (scaled and p.has("B"))
    reads_x = contracts or route in ("projected", "scaled")
    twice = reads_x and (route == "projected" or (contracts and (scaled or p.rank("B") > 0)))
    moved = through_dy * p.y_bytes + (reads_x + (twice and _spills(p, p.x_bytes))) * p.x_bytes
    moved += (route == "solved") * p.y_bytes + scaled * (1 + p.wants_x) * p.x_bytes
    return PricedLaunch("token_pass", _thin_flops(p, route), moved + p.factor_bytes + _token_sums(p, route), PASS)


def _thin_flops(p: Problem, route: str) -> int:
    """4 M (N + K) operations per rank for both gradients of a low rank, and half as many for its part in dx."""
    both, contracts = 2 * p.tokens * (p.outputs + p.inputs), _contracts_b(p, route)
    flops = (route == "projected") * 2 * both * p.rank("A") + contracts * 2 * both * p.rank("B")
    if contracts and not p.rank("B"):
        flops += 2 * p.tokens * p.outputs
    if route == "scaled" and p.wants_x:
        flops += both * p.rank("B") - contracts * 2 * p.tokens * p.outputs * p.rank("B")
    return flops


def _weight_pass(p: Problem, route: str, writes: bool) -> PricedLaunch:
    """Reads W0; writes W_eff for dx, sums for C and for the left factor of a projected A."""
    entries = p.outputs * p.inputs
    flops = writes * _assembly(p) + p.wants("C") * (2 * entries + 4 * p.inputs * p.rank("C"))
    flops += (route == "projected") * 2 * entries * p.rank("A") + (route == "solved") * 2 * PROBED_TOKENS * entries
    moved = (1 + writes) * p.weight_bytes + p.factor_bytes + _weight_sums(p, route)
    return PricedLaunch("weight_pass", flops, moved, PASS)


def _finish(p: Problem, route: str) -> PricedLaunch:
    """Reads every partial sum and writes the gradients."""
    return PricedLaunch("finish", 0, _sums(p, route) + p.factor_bytes, PASS)


def _block(p: Problem) -> int:
    """How many tokens, rows or columns a block has, by the settings for Ampere and later."""
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
    """Whether a pass that walks a matrix twice reads it twice from memory, since the L2 cannot hold it."""
    return size > machine_for(p.architecture).cache
