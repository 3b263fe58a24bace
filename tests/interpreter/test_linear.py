"""The Triton kernels against the fp64 oracle: every kind, every product, both strategies, at ragged shapes."""

import itertools

import pytest
import torch
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st

from tests.helpers import TEST_SEED
from tests.interpreter.cases import (
    BIAS_KINDS,
    DTYPES,
    PRODUCTS,
    PROMPT_KINDS,
    RAGGED,
    STRATEGIES,
    WEIGHT_KINDS,
    check,
    laid_out,
    make,
    rest,
    tiles,
    upstream,
)

GRID = [
    (strategy, product, a, b, index)
    for index, (strategy, product, a, b) in enumerate(
        itertools.product(STRATEGIES, PRODUCTS, WEIGHT_KINDS, WEIGHT_KINDS)
    )
]
IDS = ["-".join(case[:4]) for case in GRID]


def rests(index):
    """For the layer with a bias, and for the one without."""
    return rest(index), rest(index + 2)


@pytest.mark.parametrize(("strategy", "product", "a", "b", "index"), GRID, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind(dtype, strategy, product, a, b, index):
    for bias, others in zip((True, False), rests(index)):
        check(make((a, b, *others), bias=bias, product=product, dtype=dtype), strategy=strategy)


@pytest.mark.parametrize(("strategy", "product", "a", "b", "index"), GRID, ids=IDS)
def test_every_kind_in_other_types(strategy, product, a, b, index):
    """fp16 and fp64 by turns, so that each sees every A and B with each product."""
    parity = WEIGHT_KINDS.index(a) + WEIGHT_KINDS.index(b) + STRATEGIES.index(strategy)
    dtype = (torch.float16, torch.float64)[parity % 2]
    bias = (parity // 2 + PRODUCTS.index(product)) % 2
    check(make((a, b, *rests(index)[bias]), bias=not bias, product=product, dtype=dtype), strategy=strategy)


def test_the_grid_pairs_every_kind_with_every_way_to_a_gradient():
    seen, kind = set(), lambda name: name.split("_")[0]
    for strategy, product, a, _, index in GRID:
        for bias, others in zip((True, False), rests(index)):
            seen |= {(strategy, product, kind(a), bias, *pair) for pair in zip("CDE", map(kind, others))}
    ways = itertools.product(STRATEGIES, PRODUCTS, ("lora", "vector", "constant", "none"), (True, False))
    kinds = [("C", k) for k in ("lora", "vector", "none")] + [(slot, k) for slot in "DE" for k in BIAS_KINDS]
    assert not [(*way, *pair) for way in ways for pair in kinds if (*way, *pair) not in seen]


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
@settings(max_examples=300, deadline=None, database=None)
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
        worst = check((x, weight, b0, terms), dy, strategy)
    note(f"worst constant {worst:.2f}")


def test_large_layers_of_several_blocks_each_way():
    """Sums over several blocks of every dimension, with the tiles of the interpreter."""
    for strategy, product in itertools.product(STRATEGIES, PRODUCTS):
        check(
            make(("lora_3", "lora_7", "lora_3", "vector", "constant"), (50, 37, 53), product=product), strategy=strategy
        )
    assert RAGGED < (50, 37, 53)
