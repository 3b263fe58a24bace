"""The adapted convolution against the formula in fp64: outputs, gradients, merged bits, refusals."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from glora_kernels import LowRank, Terms, Vector, glora_conv2d, glora_linear, glora_merge, reference
from tests.helpers import ALL_PATHS, assert_contract, detached, generator_for, make_call, results

PRODUCTS = ("hadamard", "matmul")
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": 2, "padding": (1, 0)},
    "dilated": {"dilation": (1, 2), "padding": "same"},
    "grouped": {"groups": 2, "padding": 1},
}
# every kind of every tensor, and every pair of kinds of A and B
PATHS = [path for i, path in enumerate(ALL_PATHS) if i % 13 == 0]
each_product = pytest.mark.parametrize("product", PRODUCTS)
each_geometry = pytest.mark.parametrize("geometry", list(GEOMETRIES))


def make_convolution(path, geometry="plain", dtype=torch.float64, *, bias=True, product="hadamard"):
    """``(x, weight, bias, terms)`` of a convolution of 4 channels into 6, with kernels of 3 x 2."""
    inputs = 4 // GEOMETRIES[geometry].get("groups", 1)
    _, weight, b0, terms = make_call(path, (1, 6, inputs * 6), bias=bias, product=product, dtype=dtype)
    gen = generator_for("image", path)
    x = torch.randn(2, 4, 6, 7, generator=gen, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight.reshape(6, inputs, 3, 2), b0, terms


def composed(x, weight, bias, terms, **geometry):
    w_eff, b_eff = reference.glora_merge(weight.flatten(1), bias, terms)
    return F.conv2d(x, w_eff.reshape(weight.shape), b_eff, **geometry)


def oracle(x, weight, bias, terms, dy, **geometry):
    def evaluate(function):
        cast = lambda t: None if t is None else detached(t, function)  # noqa: E731
        call = (cast(x), cast(weight), cast(bias), terms.map(cast), function(dy))
        return results(lambda *a: composed(*a, **geometry), *call)

    return evaluate(lambda t: t.double()), evaluate(lambda t: t.double().abs())


@each_product
@each_geometry
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_are_within_the_contract(product, geometry, dtype):
    options = GEOMETRIES[geometry]
    for path, bias in zip(PATHS, itertools.cycle((True, False))):
        x, weight, b0, terms = make_convolution(path, geometry, dtype, bias=bias, product=product)
        y = glora_conv2d(x, weight, b0, terms, **options)
        dy = torch.randn(y.shape, generator=generator_for("dy", path), dtype=torch.float64).to(dtype)
        got = results(lambda *a: glora_conv2d(*a, **options), x, weight, b0, terms, dy)
        assert_contract(got, *oracle(x, weight, b0, terms, dy, **options), dtype)


@each_product
@each_geometry
def test_merged_weights_give_the_same_bits(product, geometry):
    options = GEOMETRIES[geometry]
    for path in PATHS:
        x, weight, b0, terms = make_convolution(path, geometry, torch.float32, product=product)
        w_eff, b_eff = glora_merge(weight.flatten(1), b0, terms)
        merged = F.conv2d(x, w_eff.reshape(weight.shape), b_eff, **options)
        assert torch.equal(glora_conv2d(x, weight, b0, terms, **options), merged), path


def test_a_pointwise_convolution_is_a_linear_layer():
    x, weight, bias, terms = make_call(("lora_3", "lora_1", "lora_3", "vector", "vector"))
    image = x.t().reshape(1, x.shape[1], 1, x.shape[0])
    y = glora_conv2d(image, weight[:, :, None, None], bias, terms)
    torch.testing.assert_close(y[0, :, 0].t(), glora_linear(x, weight, bias, terms))


def test_the_prompt_adds_one_number_a_channel_at_the_padded_border_too():
    x, weight, bias, _ = make_convolution(("none",) * 5)
    prompt = torch.randn(24, generator=generator_for("prompt"), dtype=torch.float64)
    y = glora_conv2d(x, weight, bias, Terms(C=Vector(prompt)), padding=1)
    added = (y - F.conv2d(x, weight, bias, padding=1)).detach()
    expected = weight.flatten(1) @ prompt
    torch.testing.assert_close(added, expected[:, None, None].expand_as(added))


def test_an_image_without_a_batch():
    x, weight, bias, terms = make_convolution(("vector",) * 5)
    torch.testing.assert_close(glora_conv2d(x[0], weight, bias, terms), glora_conv2d(x, weight, bias, terms)[0])


def test_channels_last():
    x, weight, bias, terms = make_convolution(("lora_3", "vector", "lora_1", "vector", "vector"))
    moved = (x.to(memory_format=torch.channels_last), weight.to(memory_format=torch.channels_last))
    torch.testing.assert_close(glora_conv2d(*moved, bias, terms), glora_conv2d(x, weight, bias, terms))


def test_x_is_not_unfolded():
    """Of all that is kept for backward nothing is larger than x, where an unfolded x would be 9 times as large."""
    x = torch.randn(1, 8, 32, 32, requires_grad=True)
    weight, down, up = torch.randn(8, 8, 3, 3), torch.randn(8, 2), torch.randn(2, 72)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        terms = Terms(A=LowRank(down.requires_grad_(), up.requires_grad_()))
        glora_conv2d(x, weight, None, terms, padding=1)
    assert max(kept) == x.numel()


def test_under_autocast():
    x, weight, bias, terms = make_convolution(("lora_3", "vector", "lora_1", "vector", "vector"), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = glora_conv2d(x, weight, bias, terms)
    expected = glora_conv2d(*(t.to(torch.bfloat16) for t in (x, weight, bias)), terms)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == terms.A.down.grad.dtype == torch.float32


@each_product
def test_second_derivatives(product):
    x, weight, bias, terms = make_convolution(("lora_3", "vector", "lora_1", "vector", "vector"), product=product)
    storages, structure = terms.map(lambda t: torch.nan_to_num(t.detach()).requires_grad_()).flatten()
    x = x[:1, :, :4, :3].detach().requires_grad_()

    def function(x, *values):
        return glora_conv2d(x, weight, bias, Terms.unflatten(values, structure))

    assert torch.autograd.gradgradcheck(function, (x, *storages))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3, 6, 7)}, ValueError, r"x: expected shape \(M, 4, height, width\)"),
        ({"x": torch.ones(4, 6)}, ValueError, r"x: expected shape \(M, 4, height, width\)"),
        ({"x": torch.ones(2, 4, 6, 7).half()}, TypeError, "x: expected the dtype of weight"),
        ({"weight": torch.ones(6, 24)}, ValueError, r"weight: expected shape \(N, I, kh, kw\)"),
        ({"weight": torch.ones(6, 4, 3, 2, requires_grad=True)}, ValueError, "weight: expected a frozen tensor"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \(6,\)"),
        ({"terms": Terms(C=Vector(torch.ones(4)))}, ValueError, "C: expected a vector"),
        ({"groups": 4}, ValueError, "groups: expected a divisor of N = 6, got 4"),
        ({"groups": True}, ValueError, "groups: expected a divisor of N = 6, got True"),
    ],
)
def test_bad_operands_are_refused(change, error, message):
    good = {"x": torch.ones(2, 4, 6, 7), "weight": torch.ones(6, 4, 3, 2), "bias": torch.ones(6), "terms": Terms()}
    with pytest.raises(error, match=message):
        glora_conv2d(**{**good, **change})
