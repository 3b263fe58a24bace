"""What the mutation check found untested: see docs/mutation.md.

Reads outside of the operands whose values are multiplied with zero, offsets of programs that are far out, many slices
and slices that do not begin at 0, which rows count as lost and by which tokens, and the bias's rounding.
"""

import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from glora_kernels import glora_linear
from glora_kernels._triton import plan
from glora_kernels._triton.kernels.contract import contract_kernel
from glora_kernels._triton.kernels.token_pass import token_pass_kernel
from glora_kernels._triton.kernels.weight_pass import weight_pass_kernel
from glora_kernels._triton.launch import launch
from glora_kernels._triton.tile import sum_slices
from glora_kernels.planning.settings import Tile
from glora_kernels.planning.steps import Amount
from glora_kernels.planning.sums import ALIGN, UNWANTED, Partials
from tests.interpreter.cases import (
    KINDS,
    PRODUCTS,
    RAGGED,
    REUSED,
    STRATEGIES,
    check,
    kernels,
    launching,
    lost_rows,
    make,
    run,
    tiles,
    upstream,
    watched,
)
from tests.interpreter.shim import untouched

REST = ("lora_3", "vector", "constant")
ROUTES = {
    "dense": (("lora_3", "lora_7", *REST), "hadamard", RAGGED),
    "solved": (("vector", "lora_3", *REST), "hadamard", REUSED),
    "projected": (("lora_7", "lora_3", *REST), "matmul", RAGGED),
    "scaled": (("vector", "lora_3", *REST), "matmul", RAGGED),
    "thin": (("none", "lora_3", *REST), "hadamard", RAGGED),
}
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@each_strategy
@pytest.mark.parametrize(("path", "product", "shape"), ROUTES.values(), ids=ROUTES)
def test_no_slices_are_found_because_they_begin_at_zero(path, product, shape, strategy, monkeypatch):
    monkeypatch.setattr(Partials, "__init__", lambda self: vars(self).update(size=Amount(0, 3 * ALIGN), parts={}))
    monkeypatch.setattr(plan, "_plan", plan._plan.__wrapped__)  # other layouts are not kept
    check(make(path, shape, product=product), strategy=strategy)


# -- addresses ---------------------------------------------------------------------------------------
# A poisoned neighbourhood shows only what reaches a result. Here every address that is not masked is looked at.

GAP = 2**12  # elements between operands


class Bounds:
    """The operands of a launch, apart from each other, and a check that all that is read or written lies in one."""

    def __init__(self, monkeypatch):
        self.ranges = []
        for name in ("create_masked_load", "create_masked_store"):
            monkeypatch.setattr(InterpreterBuilder, name, self._checked(getattr(InterpreterBuilder, name)))

    def _checked(self, method):
        def checked(builder, pointers, *others):
            mask = others[0] if method.__name__ == "create_masked_load" else others[1]
            addresses = pointers.data[mask.data.astype(bool)]
            inside = np.zeros(addresses.shape, dtype=bool)
            for first, last in self.ranges:
                inside |= (addresses >= first) & (addresses < last)
            assert inside.all() or not self.ranges, f"{method.__name__}: an address outside of every operand"
            return method(builder, pointers, *others)

        return checked

    def launch(self, kernel, grid, tile, /, **arguments):
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        copies = {name: self._apart(tensor) for name, tensor in tensors.items()}
        try:
            launch(kernel, grid, tile, **{**arguments, **copies})
        finally:
            self.ranges.clear()
        for name, tensor in tensors.items():
            tensor.copy_(copies[name])

    def _apart(self, tensor):
        assert tensor.is_contiguous() or tensor.t().is_contiguous()
        copy = torch.zeros(tensor.numel() + 2 * GAP, dtype=tensor.dtype)
        copy = copy.as_strided(tensor.shape, tensor.stride(), GAP).copy_(tensor)
        self.ranges.append((copy.data_ptr(), copy.data_ptr() + tensor.numel() * tensor.element_size()))
        return copy


@each_strategy
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("a", KINDS)
def test_every_address_lies_in_an_operand(a, product, strategy, monkeypatch):
    bounds = Bounds(monkeypatch)
    for index, (b, c) in enumerate(itertools.product(("lora_3", "vector", "none"), ("lora_3", "vector"))):
        call = make((a, b, c, "vector", "vector"), bias=bool(index % 3), product=product)
        with launching(bounds.launch):
            check(call, strategy=strategy)


@each_strategy
@pytest.mark.parametrize("b", KINDS)
def test_every_address_lies_in_an_operand_where_the_output_is_reused(b, strategy, monkeypatch):
    bounds = Bounds(monkeypatch)
    call = make(("vector", b, "lora_3", "vector", "vector"), REUSED)
    with torch.no_grad():
        call[3].A.value[5, 0] = -1  # a row that is formed from x and W0
    with launching(bounds.launch), tiles(32, 16, 32):
        check(call, strategy=strategy)


@each_strategy
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_address_lies_in_an_operand_that_is_read_to_its_end(product, strategy, monkeypatch):
    """Where the rank is that of the storage, no other row lies beyond the last column of the last one."""
    bounds = Bounds(monkeypatch)
    for a, b in (("lora_3", "none"), ("none", "lora_3"), ("lora_3", "lora_3")):
        call = make((a, b, "lora_3", "vector", "vector"), product=product, storage_rank=3)
        with launching(bounds.launch):
            check(call, strategy=strategy)


def test_the_bounds_notice(monkeypatch):
    bounds = Bounds(monkeypatch)

    def too_far(kernel, grid, tile, /, **arguments):
        wrong = {"RED": arguments["RED"] + 1} if kernel.__name__ == "fused_kernel" else {}
        bounds.launch(kernel, grid, tile, **{**arguments, **wrong})

    with launching(too_far), pytest.raises(InterpreterError, match="outside of every operand"):
        check(make(("none", "lora_3", "none", "none", "none")), strategy="fused")


# -- lost rows ---------------------------------------------------------------------------------------


@each_strategy
@pytest.mark.parametrize("b", ["lora_3", "vector", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_lost_where_the_formula_says(bias, b, strategy):
    """Signs cancel in sums of the numbers themselves; the scales of rounding errors are sums of their sizes."""
    rest = ("none", "none", "vector" if bias else "none")
    x, weight, b0, terms = make(("vector", b, *rest), (90, 70, 80), bias=bias)
    with torch.no_grad():
        scale = torch.logspace(-3, 2, 70)[torch.randperm(70)]
        terms.A.value[:, 0] = scale * torch.tensor([1.0, -1.0]).repeat(35) - 1
    call = (x, weight, b0, terms)
    with watched() as found, kernels(strategy):
        run(call, upstream(call), strategy)
    arguments = next(launched.arguments for launched in found if launched.kernel == "weight_pass_kernel")
    kept, margin = _formula(arguments, terms)
    clear = (margin.log().abs() > 1e-3) & margin.isfinite()
    lost = lost_rows(found)
    assert torch.equal(lost[clear], ~kept[clear])
    assert (b == "none" and not bias) or 10 < lost.sum() < 60
    assert clear.sum() > 60


def test_the_tokens_looked_at_are_spread_over_the_batch():
    """Every sixth or so, and no other: dy is zero there."""
    call = make(("vector", "none", "none", "none", "vector"), (90, 70, 80))
    dy = torch.zeros(90, 70)
    dy[(torch.arange(1, 16) * 90 // 16)] = upstream(call)[:15]
    with watched() as found:
        check(call, dy)
    assert lost_rows(found).sum() < 60


def _formula(arguments, terms):
    """See weight_pass.py: which rows are kept, and by which factor."""
    x, dy, weight = (arguments[name].detach().double().abs() for name in ("x_ptr", "dy_ptr", "w_ptr"))
    probes = torch.arange(16) * len(x) // 16
    x, dy = x[probes], dy[probes]
    taken = torch.zeros_like(dy)
    if arguments["at_db"] >= 0:  # then there is a b_eff
        taken += arguments["b_eff_ptr"].double().abs()
    if terms.B is not None and len(terms.B.storages) == 2:
        down, up = (factor.detach().double().abs() for factor in terms.B.factors)
        taken += x @ up.t() @ down.t()
    elif terms.B is not None:
        taken += x.sum(1)[:, None] * terms.B.value.detach()[:, 0].double().abs()
    allowed = arguments["loss"] * (1 + terms.A.value.detach()[:, 0].double()).abs() * (dy * (x @ weight.t())).sum(0)
    return (dy * taken).sum(0) < allowed, (dy * taken).sum(0) / allowed


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_fused_product_adds_the_bits_of_the_merged_bias(dtype, swap):
    """Sums of small integers are exact, so that one rounding is left after that of the bias."""
    x, weight, _, terms = make(
        ("none", "constant", "none", "none", "vector"), bias=False, dtype=dtype, terms_dtype=torch.float32
    )
    x, weight, bias = x.detach().sign(), weight.sign(), torch.linspace(3, 30.7, len(weight))
    with torch.no_grad():
        terms.B.value.fill_(1.0)
        terms.E.value.copy_(bias)
        with kernels("fused"), tiles(16, 16, 16, swap=swap):
            got = glora_linear(x, weight, None, terms)
    exact = x.float() @ (weight.float() + 1).t()
    assert torch.equal(got, (exact + bias.to(dtype).float()).to(dtype))
    assert not torch.equal(got, (exact + bias).to(dtype)), "the case cannot tell"


# -- programs beyond 2^31 ----------------------------------------------------------------------------
# A program far out in the grid on the operands of the first one: rows repeat by strides of 0, and its slices are
# brought back to the buffer by offsets below 0. With any of its offsets in int32 the detector of overflow speaks.

FAR = 2**27 + 3  # blocks of 16


def launch_far(monkeypatch, kernel, program, arguments, before=None):
    """One program of the grid, and what it adds to the buffer of partial sums."""
    handle = TensorHandle(np.array([program], dtype=np.int32), tl.int32)
    buffer = torch.full_like(arguments["partials_ptr"], torch.nan) if before is None else before.clone()
    with monkeypatch.context() as patch, kernels(overflow=True):
        patch.setattr(InterpreterBuilder, "create_get_program_id", lambda self, axis: handle)
        launch(kernel, 1, Tile(16, 16, 16, 4, 2), **{**arguments, "partials_ptr": buffer})
    return buffer


def first_launch(kernel, path, product, shape, strategy):
    """The arguments of a kernel, with indices in int64 and one slice to add up."""
    call = make(path, shape, product=product)
    with watched() as found:
        run(call, upstream(call), strategy)
    arguments = next(launched.arguments for launched in found if launched.kernel == kernel.__name__)
    return {**arguments, "INDEX": tl.int64} | ({"slices": 1} if "slices" in arguments else {})


def moved(arguments, **changes):
    """Some of the arguments changed; numbers are added to what is there, unless it is UNWANTED."""
    there = {name: change for name, change in changes.items() if arguments[name] != UNWANTED}
    return {**arguments, **{name: arguments[name] + change for name, change in there.items()}}


def same_partials(got, want):
    return torch.equal(got.nan_to_num(nan=12345), want.nan_to_num(nan=12345)) and not want.isnan().all()


@pytest.mark.parametrize(
    ("path", "product"),
    [
        (("lora_7", "lora_3", "lora_3", "constant", "constant"), "matmul"),
        (("none", "vector", "none", "vector", "constant"), "hadamard"),
        (("none", "constant", "none", "constant", "none"), "hadamard"),
    ],
)
def test_a_token_pass_far_out(path, product, monkeypatch):
    first = first_launch(token_pass_kernel, path, product, RAGGED, "assemble")
    first |= {"stride_xm": 0, "stride_ym": 0, "M": 16}
    n, k, rank_a, rank_b = first["N"], first["K"], first["rank_a"], max(first["rank_b"], 1)
    far_out = moved(
        first,
        M=16 * FAR,
        at_db=-FAR * n,
        at_db_sum=-FAR,
        at_db_bias=-FAR,
        at_a=-FAR * n * rank_a,
        at_au=-FAR * k * rank_a,
        at_b=-FAR * n * rank_b,
        at_b_sum=-FAR,
        at_bu=-FAR * k * rank_b,
    )
    want = launch_far(monkeypatch, token_pass_kernel, 0, first)
    assert same_partials(launch_far(monkeypatch, token_pass_kernel, FAR, far_out), want)


@pytest.mark.parametrize("route", ["projected", "thin"])
def test_a_weight_pass_far_out(route, monkeypatch):
    first = first_launch(weight_pass_kernel, *ROUTES[route], "fused")
    first |= {"stride_wn": 0, "N": 16, "share": first["K"]}
    k, rows = first["K"], 16 * FAR
    far_out = moved(
        first,
        N=rows,
        at_db=-rows,
        at_dv=-rows * first["rank_a"],
        at_dc=-FAR * k,
        at_cu=-FAR * first["rank_c"],
        at_ad=-FAR * k * first["rank_a"],
    )
    before = torch.arange(first["partials_ptr"].numel(), dtype=torch.float32)
    want = launch_far(monkeypatch, weight_pass_kernel, 0, first, before)
    assert same_partials(launch_far(monkeypatch, weight_pass_kernel, FAR, far_out, before), want)
    assert not torch.equal(want, before)


@pytest.mark.parametrize("rows", [True, False])
def test_a_contraction_far_out(rows, monkeypatch):
    path = ("vector", "vector", "vector", "none", "none")
    first = first_launch(contract_kernel, path, "hadamard", (17, 16, 16), "fused")
    first |= {"stride_wn": 0, "stride_wk": 0, "stride_xk": 0, "stride_yn": 0, "at_dc": -1}
    size = 16 * FAR
    far_out = moved(first, **{"N" if rows else "K": size}, at_a=-size, at_b=-size)
    want = launch_far(monkeypatch, contract_kernel, 0, first)
    assert same_partials(launch_far(monkeypatch, contract_kernel, FAR, far_out), want)


def test_probes_of_very_many_tokens(monkeypatch):
    """The last of 16 tokens that are looked at is formed of a product with their number."""
    first = first_launch(weight_pass_kernel, ("vector", "lora_3", "none", "none", "none"), "hadamard", REUSED, "fused")
    first |= {"stride_xm": 0, "stride_ym": 0}
    nothing = torch.zeros_like(first["partials_ptr"])
    marked = slice(first["at_lost"], first["at_lost"] + 16)
    nothing[marked] = -1
    want = launch_far(monkeypatch, weight_pass_kernel, 0, first, nothing)
    found = launch_far(monkeypatch, weight_pass_kernel, 0, {**first, "M": 2**29}, nothing)
    assert same_partials(found, want) and 0 in want[marked] and -1 not in want[marked]


@triton.jit
def added_kernel(ptr, out_ptr, slices, stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, sum_slices(ptr, slices, stride, offsets, offsets < BLOCK, BLOCK, WIDE))


@pytest.mark.parametrize("slices", [1, 16, 17, 35])
def test_any_number_of_slices(slices):
    partials, out = torch.randn(slices, 20, dtype=torch.float64), torch.empty(16, dtype=torch.float64)
    added_kernel[(1,)](partials, out, slices, 20, 16, tl.float64)
    torch.testing.assert_close(out, partials[:, :16].sum(0))


def test_slices_far_apart():
    stride, out = 2**30, torch.empty(16)
    partials = untouched(2 * stride + 16, torch.float16)
    for index in range(3):
        partials[index * stride : index * stride + 16] = 4.0**index
    with kernels(overflow=True):
        added_kernel[(1,)](partials, out, 3, stride, 16, tl.float32)
    assert torch.equal(out, torch.full((16,), 21.0))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("c", ["lora_3", "none"])
def test_several_shares_of_columns(c, strategy):
    """A pass over W0 that no sum binds to whole rows gives its columns to several programs: none may walk another's."""
    check(make(("none", "lora_3", c, "vector", "vector"), (17, 19, 150)), strategy=strategy)
