"""Inputs of -1, 0 and 1: every sum is an integer, exact in any order, so every result must be right to the bit.

No tolerance hides a term that is missing, counted twice or read from the wrong place.
"""

import itertools
import random

import pytest
import torch

from glora_kernels import glora_linear
from tests.helpers import TEST_SEED, oracle, results
from tests.interpreter.cases import (
    DTYPES,
    KINDS,
    PRODUCTS,
    STRATEGIES,
    kernels,
    lost_rows,
    make,
    rest,
    route,
    tiles,
    watched,
)

# Intermediate results of bf16 stay below 2^8, where it holds every integer; fp32 sums below 2^24.
LARGEST = {torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**24, torch.float64: 2**24}
PAIRS = list(itertools.product(KINDS, KINDS))


def integers(tensor):
    """-1, 0 or 1 by the sign of random numbers, half of them 0; NaN stays."""
    return torch.where(tensor.abs() < 0.67 * tensor.nan_to_num().std(correction=0), 0.0, tensor.sign())


def integer_call(path, shape, draw, **options):
    x, weight, b0, terms = make(path, shape, seed=draw, **options)
    with torch.no_grad():
        x.copy_(integers(x))
        for storage in terms.flatten()[0]:
            storage.copy_(integers(storage))
    return x, integers(weight), None if b0 is None else integers(b0), terms


def upstream_of_integers(call, draw):
    x, weight, *_ = call
    generator = torch.Generator().manual_seed(draw)
    return torch.randint(-1, 2, (x.shape[0], weight.shape[0]), generator=generator).to(x.dtype)


def check_bits(call, dy, strategy):
    dtype = call[0].dtype
    want, _ = oracle(*call, dy)
    assert want["y"].abs().max() <= LARGEST[dtype], "the case is too large to be exact"
    with kernels(strategy):
        got = results(glora_linear, *call, dy)
    for name, expected in want.items():
        if expected is None:
            assert got[name] is None, name
        else:
            assert torch.equal(got[name], expected.to(got[name].dtype)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_small_integers_are_exact(product, strategy, dtype):
    """Every pair of kinds, at random shapes, ranks and tiles."""
    rng = random.Random(f"{TEST_SEED} {product} {strategy} {dtype}")
    for index, (a, b) in enumerate(PAIRS):
        path = tuple(kind.replace("3", str(rng.randint(1, 4))) for kind in (a, b, *rest(index)))
        shape = tuple(rng.choice([1, 2, 15, 16, 17, rng.randint(1, 40)]) for _ in range(3))
        draw = rng.randrange(2**30)
        call = integer_call(path, shape, draw, bias=rng.random() < 0.5, product=product, dtype=dtype)
        with tiles(*(rng.choice([16, 32]) for _ in range(3))):
            check_bits(call, upstream_of_integers(call, draw), strategy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", KINDS)
def test_what_is_solved_from_the_output_is_exact(b, dtype):
    """With 1 + a of 0 (lost, and formed from x and W0), 1 and 2 the division leaves no rest."""
    for bias, strategy in itertools.product((True, False), STRATEGIES):
        call = integer_call(("vector", b, "lora_1", "vector", "vector"), (66, 21, 68), 5, bias=bias, dtype=dtype)
        dy = upstream_of_integers(call, 7)
        with watched() as found, tiles(32, 16, 32):
            check_bits(call, dy, strategy)
        assert route(found) == "solved"
        lost = lost_rows(found)
        nothing_left = call[3].A.value[:, 0] == -1
        assert nothing_left.any() and lost[nothing_left].all() and not lost.all()
