"""First derivatives through the kernels, second ones through the composed formula, against finite differences; fp64."""

import itertools

import pytest
import torch

from glora_kernels import Terms, glora_linear
from tests.interpreter.cases import PRODUCTS, STRATEGIES, kernels, make, route, tiles, watched

KINDS = ("lora_2", "vector", "constant", "none")
PAIRS = list(itertools.product(KINDS, KINDS))
RESTS = [("lora_1", "none", "none"), ("vector", "vector", "none"), ("none", "constant", "vector")]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def function_of_leaves(path, shape, product):
    """The layer as a function of x and the storages, at a point without NaN."""
    x, weight, b0, terms = make(path, shape, product=product, dtype=torch.float64, storage_rank=2)
    storages, structure = terms.map(lambda s: s.detach().nan_to_num(0.3).requires_grad_()).flatten()

    def function(x, *storages):
        return glora_linear(x, weight, b0, Terms.unflatten(storages, structure))

    return function, [x, *storages]


@each_strategy
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_first_derivatives(a, b, product, strategy):
    """In a random direction of each input; also that a second backward gives the same bits."""
    others = RESTS[(PAIRS.index((a, b)) + PRODUCTS.index(product) + STRATEGIES.index(strategy)) % 3]
    function, leaves = function_of_leaves((a, b, *others), (3, 4, 5), product)
    with kernels(strategy):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_second_derivatives(a, b, product):
    others = RESTS[(PAIRS.index((a, b)) + PRODUCTS.index(product)) % 3]
    function, leaves = function_of_leaves((a, b, *others), (3, 4, 5), product)
    with kernels("fused"):
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@each_strategy
@pytest.mark.parametrize(
    ("product", "a", "b"),
    [
        ("hadamard", "lora_2", "lora_2"),
        ("hadamard", "vector", "lora_2"),
        ("matmul", "lora_2", "vector"),
        ("matmul", "vector", "lora_2"),
        ("hadamard", "constant", "constant"),
    ],
)
def test_every_entry_of_the_jacobian(product, a, b, strategy):
    function, leaves = function_of_leaves((a, b, "none", "vector", "none"), (2, 3, 2), product)
    with kernels(strategy):
        assert torch.autograd.gradcheck(function, leaves)


@each_strategy
@pytest.mark.parametrize("b", KINDS)
def test_derivatives_where_the_output_is_reused(b, strategy):
    """The second backward of gradcheck forms da the other way, so that its last bits may differ."""
    function, leaves = function_of_leaves(("vector", b, "vector", "none", "vector"), (64, 4, 64), "hadamard")
    with kernels(strategy), tiles(64, 16, 64), watched() as found:
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, nondet_tol=1e-9)
    assert route(found[:5]) == "solved" or route(found) in ("solved", "dense")
