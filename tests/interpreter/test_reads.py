"""What kernels touch: nothing that is not sampled, nothing beside an operand, every element of a result."""

import itertools

import pytest
import torch

from glora_kernels._triton.launch import launch
from tests.helpers import assert_contract, oracle
from tests.interpreter.cases import (
    KINDS,
    PRODUCTS,
    REUSED,
    STRATEGIES,
    bits,
    check,
    launching,
    leaves_of,
    make,
    rest,
    run,
    tiles,
    upstream,
)

FENCE = 2**14  # elements on either side of an operand: farther than a block reaches
WRITTEN = {
    "assemble_kernel": {"w_eff_ptr", "b_eff_ptr", "v_ptr"},
    "fused_kernel": {"y_ptr", "b_eff_ptr"},
    "token_pass_kernel": {"dx_ptr", "partials_ptr"},
    "weight_pass_kernel": {"w_eff_ptr", "partials_ptr"},
    "contract_kernel": {"w_eff_ptr", "partials_ptr"},
    "finish_kernel": {"grads_ptr"},
}
PAIRS = list(itertools.product(KINDS, KINDS))


class Fenced:
    """A copy of a tensor, of the same strides, in a storage with poison around it and in the gaps.

    NaN spreads from wherever it is read; a written tensor lies among numbers, which NaN would overwrite unseen.
    """

    def __init__(self, tensor, written):
        reach = (
            sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else -1
        )
        poison = 12345 if written or not tensor.is_floating_point() else torch.nan
        self.storage = torch.full((reach + 1 + 2 * FENCE,), poison, dtype=tensor.dtype)
        self.tensor = self._inside(self.storage, tensor)
        once = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
        self.tensor[once].copy_(tensor[once])
        self.outside = torch.ones(self.storage.shape, dtype=torch.bool)
        self._inside(self.outside, tensor)[once] = False
        self.before = bits(self.storage).clone()

    @staticmethod
    def _inside(storage, tensor):
        return storage.as_strided(tensor.shape, tensor.stride(), FENCE)

    def assert_outside_untouched(self, name):
        assert torch.equal(bits(self.storage)[self.outside], self.before[self.outside]), f"{name}: written beside it"

    def assert_untouched(self, name):
        assert torch.equal(bits(self.storage), self.before), f"{name}: written"


def fenced_launch(kernel, grid, tile, /, **arguments):
    """Launch on fenced copies: every tensor is only read, or written inside, and poison that is read shows."""
    written = WRITTEN[kernel.__name__]
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    fences = {name: Fenced(tensor, name in written) for name, tensor in tensors.items()}
    launch(kernel, grid, tile, **{**arguments, **{name: fence.tensor for name, fence in fences.items()}})
    for name, fence in fences.items():
        if name in written:
            fence.assert_outside_untouched(f"{kernel.__name__} {name}")
            arguments[name].copy_(fence.tensor)
        else:
            fence.assert_untouched(f"{kernel.__name__} {name}")


def padded(tensor):
    """A leaf with NaN on every side, and the storage that it is in."""
    rows, columns = tensor.shape
    storage = torch.full((rows + 6, columns + 6), torch.nan, dtype=tensor.dtype)
    storage[3:-3, 3:-3] = tensor.detach()
    return storage[3:-3, 3:-3].requires_grad_(tensor.requires_grad), storage


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_every_launch_stays_inside_its_operands(a, b, product, strategy):
    index = PAIRS.index((a, b))
    for bias in (True, False):
        call = make((a, b, *rest(index + bias)), bias=bias, product=product)
        with launching(fenced_launch):
            check(call, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("b", KINDS)
def test_every_launch_stays_inside_where_the_output_is_reused(b, strategy):
    call = make(("vector", b, "lora_3", "vector", "vector"), REUSED)
    with torch.no_grad():
        call[3].A.value[5, 0] = -1  # a row that is formed from x and W0
    with launching(fenced_launch), tiles(32, 16, 32):
        check(call, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tile", [(16, 32, 64), (64, 16, 32), (32, 64, 16)], ids=str)
def test_every_launch_stays_inside_with_tiles_larger_than_the_matrix(tile, strategy):
    for product in PRODUCTS:
        call = make(("lora_3", "lora_7", "lora_3", "vector", "constant"), (5, 7, 6), product=product)
        with launching(fenced_launch), tiles(*tile):
            check(call, strategy=strategy)


@pytest.mark.parametrize(("argument", "message"), [("RED", "nan"), ("M", "beside it"), (None, "y_ptr: written")])
def test_a_fence_notices(argument, message, monkeypatch):
    """A kernel that reads or writes one too far, and one that writes what it should only read."""

    def too_far(kernel, grid, tile, /, **arguments):
        if argument is not None and kernel.__name__ == "fused_kernel":
            arguments[argument] += 1
        fenced_launch(kernel, grid, tile, **arguments)

    if argument is None:
        monkeypatch.setitem(WRITTEN, "fused_kernel", {"b_eff_ptr"})
    call = make(("none", "lora_3", "none", "none", "none"))
    with launching(too_far), pytest.raises(AssertionError, match=message):
        check(call, strategy="fused")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("a", KINDS)
def test_nothing_beside_the_operands_of_a_call(a, product, strategy):
    """x, dy and W0 in storages of NaN; bits of all of them and of the storages of the terms stay as they are."""
    x, weight, b0, terms = make((a, "lora_3", "lora_3", "vector", "constant"), product=product)
    dy = upstream((x, weight))
    want = oracle(x, weight, b0, terms, dy)
    (x, x_storage), (weight, w_storage), (dy, dy_storage) = padded(x), padded(weight), padded(dy)
    touchable = [x_storage, w_storage, dy_storage, b0, *(s.detach() for s in terms.flatten()[0])]
    before = [bits(tensor).clone() for tensor in touchable]
    versions = [tensor._version for tensor in (x, weight, b0, *leaves_of((x, weight, b0, terms)))]
    assert_contract(run((x, weight, b0, terms), dy, strategy), *want, x.dtype)
    assert all(torch.equal(bits(tensor), value) for tensor, value in zip(touchable, before))
    assert versions == [tensor._version for tensor in (x, weight, b0, *leaves_of((x, weight, b0, terms)))]


def nan_in_x(x, weight, dy):
    x[[2, 16], [1, 20]] = torch.tensor([torch.nan, torch.inf])


def nan_in_weight(x, weight, dy):
    weight[[3, 18], [5, 22]] = torch.tensor([torch.nan, -torch.inf])


def nan_in_dy(x, weight, dy):
    dy[[4, 16], [2, 17]] = torch.tensor([torch.inf, torch.nan])


SPREADING = [
    *(("hadamard", a, b, put) for put in (nan_in_x, nan_in_weight, nan_in_dy) for a, b in zip(KINDS, KINDS)),
    *(
        ("hadamard", a, b, put)
        for put in (nan_in_x, nan_in_dy)
        for a, b in (("lora_3", "vector"), ("vector", "lora_3"))
    ),
    *(("matmul", a, "lora_3", put) for put in (nan_in_x, nan_in_dy) for a in KINDS),
    # Not with a vector or constant A: the reference's dense diagonal would spread 0 * NaN along the row of W0.
    *(("matmul", a, "lora_3", nan_in_weight) for a in ("lora_3", "none")),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("product", "a", "b", "put"), SPREADING)
def test_nan_and_infinity_spread_as_in_the_formula(product, a, b, put, strategy):
    """Not less far, and no further: the padding of blocks is masked on both sides of every product.

    Where infinities meet, one sum may give NaN and another infinity: what is not finite is compared.
    """
    call = make((a, b, "vector", "vector", "vector"), product=product)
    x, weight, *_ = call
    dy = upstream(call)
    with torch.no_grad():
        put(x, weight, dy)
    got, (want, _) = run(call, dy, strategy), oracle(*call, dy)
    for name, expected in want.items():
        assert torch.equal(got[name].isfinite(), expected.isfinite()), name
        finite = expected.isfinite()
        torch.testing.assert_close(got[name][finite].double(), expected[finite], rtol=1e-4, atol=1e-4)
