"""The Triton kernels against the fp64 oracle: every kind, every product, both strategies, at ragged shapes."""

import itertools

import pytest
import torch
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st

from glora_kernels import Constant, LowRank, Vector
from tests.helpers import TEST_SEED
from tests.interpreter.cases import (
    BIAS_KINDS,
    DTYPES,
    PRODUCTS,
    PROMPT_KINDS,
    STRATEGIES,
    WEIGHT_KINDS,
    check,
    laid_out,
    make,
    rest,
    tiles,
    upstream,
)
from tests.tiers import at

# Of 17, 19 and 23: two blocks in every dimension, or in one of them.
BLOCKS = ((16, 16, 16), (32, 16, 32), (16, 32, 32), (32, 32, 16))
GRID = list(itertools.product(STRATEGIES, PRODUCTS, WEIGHT_KINDS, WEIGHT_KINDS))


def grid_case(dtype, strategy, product, a, b):
    """``call, tile``: whether there is a bias, C, D, E and the tile go round, so that each meets every A and B."""
    place = GRID.index((strategy, product, a, b)) + DTYPES.index(dtype)
    around = place + WEIGHT_KINDS.index(a) + STRATEGIES.index(strategy)
    call = make((a, b, *rest(place)), bias=bool(around % 2), product=product, dtype=dtype)
    return call, BLOCKS[around // 2 % 4]


@pytest.mark.parametrize(("strategy", "product", "a", "b"), GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind(dtype, strategy, product, a, b):
    call, tile = grid_case(dtype, strategy, product, a, b)
    with tiles(*tile):
        check(call, strategy=strategy)


@pytest.mark.parametrize(("strategy", "product", "a", "b"), GRID)
def test_every_kind_in_other_types(strategy, product, a, b):
    """fp16 and fp64 by turns, so that each sees every A and B with each product."""
    parity = WEIGHT_KINDS.index(a) + WEIGHT_KINDS.index(b) + STRATEGIES.index(strategy)
    call, tile = grid_case((torch.float16, torch.float64)[parity % 2], strategy, product, a, b)
    with tiles(*tile):
        check(call, strategy=strategy)


def test_the_grid_pairs_every_kind_with_every_way_to_a_gradient():
    """Each kind of C, D and E, a bias and none, and each tile, with each kind of A, product and strategy."""
    seen = set()
    for case, dtype in itertools.product(GRID, (torch.float32, torch.bfloat16)):
        (_, _, b0, terms), tile = grid_case(dtype, *case)
        way = (*case[:2], type(terms.A))
        seen |= {(*way, slot, type(getattr(terms, slot))) for slot in "CDE"} | {(*way, b0 is None), (*way, tile)}
    none = type(None)
    ways = itertools.product(STRATEGIES, PRODUCTS, (LowRank, Vector, Constant, none))
    kinds = [("C", kind) for kind in (LowRank, Vector, none)]
    kinds += [(slot, kind) for slot in "DE" for kind in (Vector, Constant, none)]
    kinds += [(True,), (False,), *((tile,) for tile in BLOCKS)]
    assert not [(*way, *kind) for way in ways for kind in kinds if (*way, *kind) not in seen]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("a", ["lora_3", "vector", "constant"])
def test_fp32_terms_of_a_half_layer(a, product, dtype, strategy):
    """As under autocast: gradients come in the type of the terms."""
    for b in ("lora_7", "vector"):
        call = make((a, b, "lora_3", "vector", "constant"), product=product, dtype=dtype, terms_dtype=torch.float32)
        check(call, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_terms_of_several_types(strategy):
    x, weight, b0, terms = make(("lora_3", "lora_7", "lora_3", "vector", "constant"), dtype=torch.bfloat16)
    types = itertools.cycle([torch.float32, torch.bfloat16, torch.float64])
    mixed = terms.map(lambda storage: storage.detach().to(next(types)).requires_grad_())
    check((x, weight, b0, mixed), strategy=strategy)


@seed(TEST_SEED)
@settings(max_examples=at(100, 1_000), deadline=None, database=None)
@given(
    path=st.tuples(*(st.sampled_from(choices) for choices in (*[WEIGHT_KINDS] * 2, PROMPT_KINDS, *[BIAS_KINDS] * 2))),
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    bias=st.booleans(),
    product=st.sampled_from(PRODUCTS),
    dtype=st.sampled_from(DTYPES),
    fp32_terms=st.booleans(),
    order=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    strategy=st.sampled_from(STRATEGIES),
    tile=st.tuples(*[st.sampled_from([16, 32])] * 3),
    draw=st.integers(0, 2**20),
)
def test_generated_calls_keep_the_contract(path, shape, bias, product, dtype, fp32_terms, order, strategy, tile, draw):
    terms_dtype = torch.float32 if fp32_terms and dtype != torch.float64 else dtype
    x, weight, b0, terms = make(
        path, shape, bias=bias, product=product, dtype=dtype, terms_dtype=terms_dtype, seed=draw
    )
    dy = laid_out(upstream((x, weight), draw), order)
    x = laid_out(x.detach(), "transposed" if order == "expanded" else order).requires_grad_()
    with tiles(*tile):
        worst = check((x, weight, b0, terms), dy, strategy, equal_tokens=order == "expanded")
    note(f"worst constant {worst:.2f}")


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_several_blocks_each_way(strategy, product):
    check(make(("lora_3", "lora_7", "lora_3", "vector", "constant"), (50, 37, 53), product=product), strategy=strategy)


@pytest.mark.parametrize("shape", [(260, 3, 4), (3, 260, 4), (3, 4, 260)], ids=str)
@pytest.mark.parametrize(("product", "a"), [("hadamard", "lora_3"), ("matmul", "lora_3"), ("matmul", "vector")])
def test_more_slices_than_a_sum_takes_at_once(product, a, shape):
    """Seventeen blocks along one dimension."""
    with tiles(16, 16, 16):
        check(make((a, "lora_1", "lora_1", "vector", "constant"), shape, product=product), strategy="fused")
