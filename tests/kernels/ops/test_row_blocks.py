"""W0 by blocks of rows: the same results as with the whole, and nothing dense kept."""

import itertools

import pytest
import torch

from glora_kernels import Terms, Vector, blocked_linear, glora_linear, terms_of_rows
from tests.helpers import ALL_PATHS, assert_contract, make_call, oracle, results

PRODUCTS = ("hadamard", "matmul")
PATHS = [path for i, path in enumerate(ALL_PATHS) if i % 13 == 0]
each_product = pytest.mark.parametrize("product", PRODUCTS)


class Blocks:
    """A dense weight handed out in blocks of 3 rows, the last of one row; counts what is asked for."""

    def __init__(self, weight, height=3):
        self.weight, self.height, self.asked = weight, height, []

    @property
    def shape(self):
        return tuple(self.weight.shape)

    @property
    def bounds(self):
        rows = self.weight.shape[0]
        return [(start, min(start + self.height, rows)) for start in range(0, rows, self.height)]

    def rows(self, start, stop):
        self.asked.append((start, stop))
        return self.weight[start:stop].clone()


def blocked(x, weight, bias, terms):
    return blocked_linear(x, Blocks(weight), bias, terms)


@each_product
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_the_contract(product, dtype):
    for path, bias in zip(PATHS, itertools.cycle((True, False))):
        call = make_call(path, (5, 7, 6), bias=bias, product=product, dtype=dtype, terms_dtype=torch.float64)
        dy = torch.randn(5, 7, dtype=torch.float64).to(dtype)
        assert_contract(results(blocked, *call, dy), *oracle(*call, dy), dtype)


@each_product
def test_the_output_is_that_of_the_whole(product):
    for path in PATHS:
        x, weight, bias, terms = make_call(path, (5, 7, 6), product=product, leading=(2, 3))
        torch.testing.assert_close(blocked(x, weight, bias, terms), glora_linear(x, weight, bias, terms))


def test_dx_is_summed_in_fp32():
    """1024 blocks that each add 1: a sum in bf16 would stop at 256."""
    x = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    blocked_linear(x, Blocks(torch.ones(1024, 4, dtype=torch.bfloat16), 1), None, Terms()).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1024))


def test_many_blocks_are_within_the_contract():
    """256 blocks in bf16, each rounded once."""
    call = make_call(("lora_3", "lora_1", "vector", "vector", "vector"), (4, 256, 8), dtype=torch.bfloat16)
    dy = torch.randn(4, 256).to(torch.bfloat16)
    single = lambda x, weight, bias, terms: blocked_linear(x, Blocks(weight, 1), bias, terms)  # noqa: E731
    assert_contract(results(single, *call, dy), *oracle(*call, dy), torch.bfloat16)


@each_product
def test_blocks_are_had_again_in_backward_and_nothing_dense_is_kept(product):
    x, weight, bias, terms = make_call(("lora_3", "lora_3", "lora_3", "vector", "vector"), (5, 7, 6), product=product)
    blocks, kept = Blocks(weight), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = blocked_linear(x, blocks, bias, terms)
    assert blocks.asked == blocks.bounds
    assert set(kept) <= {t.data_ptr() for t in (x, bias, *terms.flatten()[0])}
    y.sum().backward()
    assert blocks.asked == 2 * blocks.bounds


def test_terms_of_rows_are_views():
    terms = make_call(("lora_3", "vector", "lora_1", "vector", "constant"))[3]
    part = terms_of_rows(terms, 2, 5)
    assert torch.equal(part.A.down.nan_to_num(), terms.A.down[2:5].nan_to_num())
    assert part.A.up is terms.A.up
    assert part.D.value.data_ptr() == terms.D.value[2:].data_ptr()
    assert part.C is terms.C
    assert part.E is terms.E


def test_torch_func_and_second_derivatives():
    x, weight, bias, terms = make_call(("vector", "none", "none", "none", "vector"))
    x, terms = x.detach(), terms.map(lambda t: t.detach().nan_to_num())
    jacobian = torch.func.jacrev(lambda x: blocked(x, weight, bias, terms).sum(0))(x)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda x: glora_linear(x, weight, bias, terms).sum(0))(x))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(blocked(x, weight, bias, terms).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_under_autocast():
    x, weight, bias, terms = make_call(("lora_3", "vector", "lora_1", "vector", "vector"), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = blocked(x, weight, bias, terms)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, blocked(x.bfloat16(), weight, bias.bfloat16(), terms))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_bad_operands_are_refused():
    with pytest.raises(ValueError, match="x: expected the last dimension to be K = 6"):
        blocked(torch.ones(2, 5), torch.ones(7, 6), None, Terms())
    with pytest.raises(ValueError, match=r"E: expected a vector of shape \(7,\)"):
        blocked(torch.ones(2, 6), torch.ones(7, 6), None, Terms(E=Vector(torch.ones(6))))
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        blocked([1.0], torch.ones(7, 6), None, Terms())
