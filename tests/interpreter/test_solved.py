"""A as a hadamard vector with enough tokens: its gradient from the output, or from x and W0 where that loses digits."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from glora_kernels import glora_linear
from tests.helpers import assert_contract, generator_for, oracle
from tests.interpreter.cases import (
    DTYPES,
    REUSED,
    STRATEGIES,
    WEIGHT_KINDS,
    check,
    kernels,
    leaves_of,
    lost_rows,
    make,
    rest,
    route,
    run,
    tiles,
    upstream,
    watched,
)

LARGE = (256, 24, 96)


def vector_call(dtype, b="lora_3", bias_scale=1.0, shape=LARGE, others=("vector", "vector", "vector")):
    x, weight, b0, terms = make(("vector", b, *others), shape, dtype=dtype)
    return x, weight, b0 * bias_scale, terms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_other_kind_beside_it(strategy, dtype):
    """Ragged blocks of every dimension; with a bias and without by turns."""
    turn = STRATEGIES.index(strategy) + DTYPES.index(dtype)
    for index, b in enumerate(WEIGHT_KINDS):
        bias = (index + turn) % 2
        call = make(("vector", b, *rest(index + turn)), REUSED, bias=bool(bias), dtype=dtype)
        with watched() as found, tiles(*((32, 32, 64), (64, 16, 32))[(index + turn) // 2 % 2]):
            check(call, strategy=strategy)
        assert route(found) == "solved"


@pytest.mark.parametrize(("tokens", "inputs", "expected"), [(64, 64, "solved"), (63, 64, "dense"), (64, 63, "dense")])
def test_from_which_size_on(tokens, inputs, expected):
    with watched() as found, tiles(32, 16, 32):
        check(vector_call(torch.float32, shape=(tokens, 5, inputs)), strategy="fused")
    assert route(found) == expected


@pytest.mark.parametrize("b", ["lora_1", "lora_3", "vector", "constant", "none"])
@pytest.mark.parametrize("bias_scale", [0.0, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_where_the_output_is_reused(dtype, bias_scale, b):
    """Also where the bias or B dwarf what A scales, so that rows have to be formed anew."""
    with watched() as found, tiles(64, 32, 64):
        check(vector_call(dtype, b, bias_scale), strategy="assemble")
    assert lost_rows(found).any() if bias_scale == 3000.0 else True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, -1e-2])
def test_contract_near_a_of_minus_one(dtype, scale):
    """s = 1 + a near 0: A's gradient cannot be solved from an output that it hardly reaches."""
    call = vector_call(dtype)
    with torch.no_grad():
        call[3].A.value[::2, 0] = scale - 1
    with watched() as found, tiles(64, 16, 64):
        check(call, strategy="fused")
    assert lost_rows(found)[::2].all()


def test_rows_are_solved_where_it_loses_nothing():
    """One row with a of -1 is formed from x and W0, in a program of its own; the others are not."""
    call = vector_call(torch.float32, "none", others=("none", "none", "none"), shape=(128, 40, 96))
    with torch.no_grad():
        call[3].A.value[:, 0] = 0.5
        call[3].A.value[37, 0] = -1
    with watched() as found:
        check((call[0], call[1], None, call[3]), strategy="fused")
    assert lost_rows(found).nonzero().flatten().tolist() == [37]


@pytest.mark.parametrize(("scale", "spread"), [(1.0, 0.02), (0.1, 0.3), (1.0, 3.0), (0.1, 3.0)])
@pytest.mark.parametrize("b", ["lora_3", "vector", "constant"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_after_a_layer_norm(dtype, b, scale, spread):
    """Inputs of mean zero: x B^T of a vector or constant B cancels, the rounding errors of its terms do not."""
    _, weight, b0, terms = make(("vector", b, "none", "none", "none"), LARGE, dtype=dtype)
    gen = generator_for("layer norm", b, scale, spread)
    tokens = torch.randn(256, 96, generator=gen) * 0.5 + torch.randn(96, generator=gen)
    x = torch.nn.functional.layer_norm(tokens, (96,)).to(dtype).requires_grad_()
    with torch.no_grad():
        terms.A.value.mul_(0.02).add_(scale - 1)
        terms.B.storages[0].mul_(2 * spread)
    dy = torch.randn(256, 24, generator=gen) + torch.randn(24, generator=gen)
    with tiles(64, 32, 128):
        check((x, weight * 0.02, b0 * 0.1, terms), (0.1 * dy).to(dtype), strategy="assemble")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_contract_for_a_gradient_of_few_tokens(dtype, strategy):
    """As from a loss on class tokens: most tokens carry no gradient, and no row shows evidence on those looked at."""
    call = vector_call(dtype)
    dy = upstream(call)
    dy[torch.arange(len(dy)) % 37 != 5] = 0
    with watched() as found, tiles(64, 32, 64):
        check(call, dy, strategy)
    assert lost_rows(found).all()


@pytest.mark.parametrize("wanted", ["A", "Ax", "AB", "Ax with B frozen"])
@pytest.mark.parametrize("b", ["lora_3", "vector", "constant"])
def test_it_is_solved_whatever_else_wants_a_gradient(b, wanted):
    """B is contracted even where it wants no gradient: the output holds its share."""
    x, weight, b0, terms = vector_call(torch.float32, b, shape=REUSED)
    for slot, term in terms.active:
        for storage in term.storages:
            storage.requires_grad_(slot in wanted.split()[0])
    x.requires_grad_("x" in wanted)
    with watched() as found:
        check((x, weight, b0, terms), strategy="fused")
    assert route(found) == "solved"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("b", ["lora_3", "vector", "constant", "none"])
def test_output_changed_in_place_is_noticed(b, strategy):
    """nn.ReLU(inplace=True) after the layer works, as after nn.Linear: then dW is formed and contracted."""
    call = vector_call(torch.float32, b, shape=REUSED)
    leaves, dy = leaves_of(call), upstream(call)
    with kernels(strategy):
        y = glora_linear(*call)
        kept = y.detach().clone()
        with watched() as found:
            got = torch.autograd.grad(torch.relu_(y), leaves, dy)
    assert route(found) == "dense"
    names = ["x", *(f"{slot}{i}" for slot, term in call[3].active for i in range(len(term.storages)))]
    assert_contract({"y": kept, **dict(zip(names, got))}, *oracle(*call, dy * (kept > 0)), torch.float32)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    """The output is not kept: saved-tensor hooks are active, or it is recomputed and then overwritten."""
    call = vector_call(torch.float64, shape=REUSED)
    leaves = leaves_of(call)

    def block(x):
        return torch.relu_(glora_linear(x, *call[1:]))

    with kernels("fused"), watched() as found:
        checkpoint(block, call[0], use_reentrant=use_reentrant).sum().backward()
    assert route(found) == "dense"
    y = glora_linear(*call)
    want = torch.autograd.grad(torch.relu(y).sum(), leaves)
    for leaf, w in zip(leaves, want):
        torch.testing.assert_close(leaf.grad, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_second_backward(strategy):
    """The output is let go of after the first: then dW is formed and contracted."""
    call = vector_call(torch.float64, shape=REUSED)
    leaves, dy = leaves_of(call), upstream(call)
    with kernels(strategy):
        y = glora_linear(*call)
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(y, leaves, dy)
    for one, other in zip(first, second):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)


def test_nan_in_the_output_shows_in_its_gradient():
    """No row with a NaN passes for one that can be solved."""
    call = vector_call(torch.float32, shape=REUSED)
    with torch.no_grad():
        call[0][3, 5] = torch.nan
    got = run(call, upstream(call), "fused")
    assert got["A0"][:, 0].isnan().all() and (got["A0"][:, 1:] == 0).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_output_that_overflowed_is_not_solved_from(strategy):
    """Where y is infinite in fp16 the row is formed from x and W0, and its gradient is finite."""
    call = vector_call(torch.float16, shape=REUSED)
    dy = upstream(call)
    call[1][4] *= 1e4
    dy[:, 4] *= 1e-3
    with watched() as found:
        got = run(call, dy, strategy)
    assert got["y"][:, 4].isinf().any() and lost_rows(found)[4]
    want, scale = oracle(*call, dy)
    assert_contract({"A0": got["A0"]}, {"A0": want["A0"]}, scale, torch.float16)
