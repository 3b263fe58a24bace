"""Whole layers from compiled code: every pair of kinds, forward, every gradient and merging, against the oracle."""

import itertools

import pytest
import torch

from glora_kernels import glora_linear
from glora_kernels._triton.kernels import KERNELS
from tests.compiled.driver import library
from tests.compiled.layers import check, check_merging, executing, require_order
from tests.helpers import assert_contract, generator_for, make_call, oracle, results, upstream

if library.fault() is not None:
    pytest.skip(f"no launches here: {library.fault()}", allow_module_level=True)

ARCHITECTURES = ("sm_80", "sm_90")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("lora_3", "vector", "constant", "none")
RESTS = (("lora_3", "vector", "constant"), ("vector", "constant", "vector"), ("none", "none", "vector"))
KINDS_OF_MANY = (
    ("lora_13", "lora_13", "lora_13", "vector", "constant"),
    ("vector", "lora_13", "vector", "constant", "vector"),
    ("lora_13", "vector", "none", "none", "vector"),
    ("constant", "constant", "lora_13", "vector", "none"),
)
SHAPES = ((40, 72, 96), (37, 71, 93))  # M, N, K: rows that are aligned, and such that are not


def path(a, b):
    return a, b, *RESTS[(KINDS.index(a) + KINDS.index(b)) % len(RESTS)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["assemble", "fused"])
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("b", KINDS)
@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_contract(architecture, shape, a, b, product, strategy, dtype, bias):
    check(make_call(path(a, b), shape, bias=bias, product=product, dtype=dtype), architecture, strategy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("b", KINDS)
@pytest.mark.parametrize("a", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merging(architecture, a, b, product, dtype):
    check_merging(make_call(path(a, b), SHAPES[0], product=product, dtype=dtype), architecture)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["assemble", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_the_gradient_that_cannot_be_solved(architecture, strategy, dtype):
    """A = vector near -1 in every third row: y does not hold da there, and it is formed anew."""
    call = make_call(("vector", "lora_3", "vector", "vector", "vector"), (128, 72, 96), dtype=dtype)
    with torch.no_grad():
        call[3].A.value[::3, 0] = -1 + 1e-3
    check(call, architecture, strategy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", ["assemble", "fused"])
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("kinds", KINDS_OF_MANY, ids="-".join)
@pytest.mark.parametrize("shape", [(150, 136, 200), (150, 139, 203)], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_blocks(architecture, shape, kinds, product, strategy, dtype):
    """Blocks of tokens, rows, columns and ranks of which the last are there in part; NaN lies where no element is.

    In a half type nothing is negative: where a sum is as large as its terms, the contract allows a small part of it.
    """
    sign = torch.abs if dtype == torch.bfloat16 else torch.clone
    x, weight, bias, terms = make_call(kinds, shape, product=product, dtype=dtype, storage_rank=16)
    terms = terms.map(lambda storage: sign(storage.detach()).requires_grad_())
    call = among_nans(sign(x.detach())).requires_grad_(), among_nans(sign(weight)), sign(bias), terms
    check(call, architecture, strategy, sign(upstream(call)))


def among_nans(matrix):
    """A view of the matrix with gaps between its rows, which are NaN."""
    rows, columns = matrix.shape
    view = torch.full((rows, columns + 16), torch.nan, dtype=matrix.dtype)[:, :columns]
    return view.copy_(matrix)


@pytest.mark.parametrize("offset", [1, 4, 8])
@pytest.mark.parametrize("strategy", ["assemble", "fused"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_views(architecture, strategy, offset):
    """x with gaps between its rows, and W0, begin elsewhere than at a multiple of 16 bytes: gaps are not read."""
    x, weight, bias, terms = make_call(("lora_3",) * 3 + ("vector",) * 2, (64, 64, 128), dtype=torch.bfloat16)
    wide = torch.full((64, 160), torch.nan, dtype=torch.bfloat16)
    view = wide[:, offset : offset + 128]
    view.copy_(x.detach())
    flat = torch.full((64 * 128 + offset,), torch.nan, dtype=torch.bfloat16)
    moved = flat[offset:].view(64, 128)
    moved.copy_(weight)
    dy = upstream((x, weight))
    with executing(architecture, strategy) as done:
        got = results(glora_linear, view.detach().requires_grad_(), moved, bias, terms, dy)
    assert_contract(got, *oracle(x, weight, bias, terms, dy), torch.bfloat16)
    require_order(done)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_offsets_beyond_two_to_the_31(architecture):
    """Tokens whose elements lie beyond 2^31; memory is only taken where it is touched."""
    tokens, outputs, inputs = 40, 16, 64
    row = -(-(2**31) // (16 * (tokens - 16))) * 16
    x = torch.empty(tokens * row, dtype=torch.bfloat16).as_strided((tokens, inputs), (row, 1))
    x.copy_(torch.randn(tokens, inputs, generator=generator_for("far")))
    kinds = ("lora_3", "lora_3", "none", "none", "none")
    _, weight, bias, terms = make_call(kinds, (1, outputs, inputs), dtype=torch.bfloat16)
    with executing(architecture, "fused") as done, torch.no_grad():
        y = glora_linear(x, weight, bias, terms)
    want, scale = oracle(x.clone().requires_grad_(), weight, bias, terms, upstream((x, weight)))
    assert_contract({"y": y}, {"y": want["y"]}, scale, torch.bfloat16)
    require_order(done)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_executed(architecture):
    seen = set()
    for strategy, product in itertools.product(("assemble", "fused"), ("hadamard", "matmul")):
        call = make_call(path("lora_3", "lora_3"), SHAPES[0], product=product, dtype=torch.bfloat16)
        seen |= {one.kernel for one in check(call, architecture, strategy)}
    assert seen == set(KERNELS)
