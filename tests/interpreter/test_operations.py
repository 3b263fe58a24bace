"""Operations and bytes: what the kernels multiply is counted while they run, and so is what torch multiplies for them.

Counted at sizes of one and two blocks of 64 a dimension and extrapolated: a loop over whole blocks makes the counts
linear in each of M, N and K, so that eight of them determine all.
"""

import itertools
import math
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.interpreter import InterpreterBuilder

from glora_kernels import Constant, LowRank, Terms, Vector, glora_linear
from glora_kernels._triton.launch import recorded
from tests.interpreter.cases import STRATEGIES, kernels, leaves_of, tiles

TOKENS, SIZE, RANK = 2048, 1024, 8
UNIT = 2 * TOKENS * SIZE * SIZE
BLOCK, COUNTED_RANK, PROBES = 64, 32, 16  # told apart by their sizes
PADDED_RANK = 16  # of rank 8: the smallest side of a matrix instruction

KINDS = ("lora", "vector", "constant", "none")
CASES = [("hadamard", a, b) for a in KINDS for b in ("lora", "none")] + [
    ("matmul", "lora", b) for b in ("lora", "none")
]


class Count(NamedTuple):
    """Operations of dense products, of products with factors (for COUNTED_RANK), and of the comparison of scales."""

    dense: float
    thin: float
    probes: float

    def total(self, rank):
        return self.dense + self.thin * rank / COUNTED_RANK + self.probes


@contextmanager
def dots():
    """The sizes ``(m, k, n)`` of every ``tl.dot`` that runs inside the ``with`` block."""
    found, dot = [], InterpreterBuilder.create_dot

    def noted(self, a, b, *args):
        found.append((*a.data.shape, b.data.shape[1]))
        return dot(self, a, b, *args)

    InterpreterBuilder.create_dot = noted
    try:
        yield found
    finally:
        InterpreterBuilder.create_dot = dot


def storage(*shape):
    return (torch.randn(*shape) * 0.01).requires_grad_()


def make(product, a, b, tokens, outputs, inputs, rank):
    def term(kind, rows):
        if kind == "lora":
            return LowRank(storage(rows, rank), storage(rank, inputs))
        return {"none": lambda _: None, "vector": Vector, "constant": Constant}[kind](storage(rows))

    x = torch.randn(tokens, inputs, requires_grad=True)
    weight, bias = torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs) * 0.01
    terms = Terms(
        term(a, outputs if product == "hadamard" else inputs),
        term(b, outputs),
        Vector(storage(inputs)),
        Vector(storage(outputs)),
        Vector(storage(outputs)),
        product,
    )
    return x, weight, bias, terms


def count(product, a, b, strategy, shape):
    """Of forward and backward."""
    call = make(product, a, b, *shape, COUNTED_RANK)
    with kernels(strategy), tiles(BLOCK, BLOCK, BLOCK), dots() as found, FlopCounterMode(display=False) as counter:
        y = glora_linear(*call)
        torch.autograd.grad(y, leaves_of(call), torch.ones_like(y))
    sums = {BLOCK: counter.get_total_flops(), COUNTED_RANK: 0, PROBES: 0}
    for sizes in found:
        sums[COUNTED_RANK if COUNTED_RANK in sizes else min(sizes)] += 2 * math.prod(sizes)
    return Count(*sums.values())


def extrapolated(product, a, b, strategy, point):
    """The count at ``point``, a multiple of BLOCK each way."""
    total = [0.0] * 3
    for corner in itertools.product((1, 2), repeat=3):
        share = math.prod(p / BLOCK - 1 if c == 2 else 2 - p / BLOCK for c, p in zip(corner, point))
        found = count(product, a, b, strategy, [c * BLOCK for c in corner])
        total = [t + share * f for t, f in zip(total, found)]
    return Count(*total)


def units(product, a):
    return 3 if product == "hadamard" and a == "lora" else 2


def test_extrapolation():
    shape = (3 * BLOCK, 2 * BLOCK, 4 * BLOCK)
    case = ("matmul", "lora", "lora", "assemble")
    assert extrapolated(*case, shape) == pytest.approx(count(*case, shape))


@pytest.mark.parametrize(("product", "a", "b"), CASES)
def test_assemble(product, a, b):
    """At 1024 x 1024, 2048 tokens and rank 8: at most 2.05 units a step, 3.05 where A is a hadamard low rank.

    Two low ranks of a matmul product are LoRA's thin products twice, with nothing to share: 2.09. All but the dense
    units is for products with factors; a rank of 8 is padded to 16 in them, which doubles it.
    """
    found = extrapolated(product, a, b, "assemble", (TOKENS, SIZE, SIZE))
    assert found.dense == units(product, a) * UNIT
    thin = 0.09 if product == "matmul" and (a, b) == ("lora", "lora") else 0.05
    assert found.total(RANK) <= (units(product, a) + thin) * UNIT
    assert found.total(PADDED_RANK) <= (units(product, a) + 2 * thin) * UNIT


@pytest.mark.parametrize(("product", "a", "b"), CASES[::3])
def test_fused(product, a, b):
    """The same dense products; and W_eff is formed anew for every block of 64 tokens, in forward and for dx."""
    found = extrapolated(product, a, b, "fused", (TOKENS, SIZE, SIZE))
    assert found.dense == units(product, a) * UNIT
    formed = 2 * (a, b).count("lora") * RANK / BLOCK
    thin = 0.09 if product == "matmul" and (a, b) == ("lora", "lora") else 0.05
    assert found.total(RANK) <= (units(product, a) + thin + formed) * UNIT


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("product", "a", "b"), CASES)
def test_saved_bytes(product, a, b, strategy):
    """At most x's own bytes and 1% beside the parameters and the output; nothing at all for bias paths."""
    call = make(product, a, b, TOKENS, SIZE, SIZE, RANK)
    x, weight, bias, terms = call
    known = {t.untyped_storage().data_ptr() for t in (weight, bias, *terms.flatten()[0])}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with kernels(strategy), recorded(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = glora_linear(*call)
    assert y.requires_grad
    beside = sum(size for pointer, size in saved.items() if pointer not in known)
    assert beside <= (1.01 if (a, b) != ("none", "none") else 0) * x.nbytes


def test_the_output_is_kept_not_copied():
    """And let go of by backward."""
    call = make("hadamard", "vector", "lora", 128, 64, 128, RANK)
    with kernels("fused"), recorded():
        y = glora_linear(*call)
        assert y.grad_fn.output.data_ptr() == y.data_ptr()
        y.sum().backward()
        assert y.grad_fn.output is None
        for other in ("lora", "constant", "none"):
            assert glora_linear(*make("hadamard", other, "lora", 128, 64, 128, RANK)).grad_fn.output is None
