"""glora_merge through the kernels: fp32 inside, one rounding, the bits that the forward pass multiplies by."""

import pytest
import torch
from torch.nn import functional as F

from glora_kernels import glora_linear, glora_merge, reference
from glora_kernels.error_bound import UNIT_ROUNDOFF
from tests.helpers import ALL_PATHS, CONTRACT
from tests.interpreter.cases import DTYPES, PRODUCTS, bits, kernels, laid_out, make


def merged(weight, b0, terms, **options):
    with kernels():
        return glora_merge(weight, b0, terms, **options)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_layer_is_bit_equal_to_the_unmerged(dtype, product):
    for path in ALL_PATHS[::83]:
        x, weight, b0, terms = make(path, dtype=dtype, product=product)
        with kernels("assemble"), torch.no_grad():
            assert torch.equal(F.linear(x, *merged(weight, b0, terms)), glora_linear(x, weight, b0, terms)), path


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fused_product_multiplies_by_the_merged_bits(dtype, product):
    """x = 1 reads W_eff, x = 0 reads b_eff."""
    for path in ALL_PATHS[::89]:
        _, weight, b0, terms = make(path, dtype=dtype, product=product)
        w_eff, b_eff = merged(weight, b0, terms)
        one = torch.eye(weight.shape[1], dtype=dtype)
        with kernels("fused"), torch.no_grad():
            assert torch.equal(glora_linear(torch.zeros_like(one), weight, b0, terms)[0], b_eff), path
            without_bias = terms if terms.C is None and terms.E is None else None
            if without_bias is not None:
                assert torch.equal(glora_linear(one, weight, None, without_bias).t(), w_eff), path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding(dtype, product, bias):
    """Half types: within one unit roundoff (and a little fp32 noise) of the exact W_eff, elementwise."""
    for path in ALL_PATHS[(13 if bias else 0) :: 79]:
        _, weight, b0, terms = make(path, dtype=dtype, product=product, bias=bias)
        got = merged(weight, b0, terms)
        wide = terms.map(lambda s: s.detach().double())
        want = reference.glora_merge(weight.double(), None if b0 is None else b0.double(), wide)
        scale = reference.glora_merge(
            weight.double().abs(), None if b0 is None else b0.double().abs(), wide.map(torch.abs)
        )
        allowed = 1.02 if dtype in (torch.float16, torch.bfloat16) else CONTRACT[dtype]
        for g, w, s in zip(got, want, scale):
            if w is None:
                assert g is None
                continue
            assert g.dtype == dtype
            assert ((g.double() - w).abs() <= allowed * UNIT_ROUNDOFF[dtype] * s + torch.finfo(dtype).tiny).all(), path


@pytest.mark.parametrize("order", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_any_strides(product, order):
    _, weight, b0, terms = make(("lora_3", "lora_3", "lora_3", "vector", "constant"), product=product)
    want = merged(laid_out(weight, order).contiguous(), b0, terms)
    got = merged(laid_out(weight, order), b0, terms)
    assert all(torch.equal(g, w) and g.is_contiguous() for g, w in zip(got, want))


def test_result_shares_nothing_with_the_arguments():
    for path in ALL_PATHS[::37]:
        for bias in (True, False):
            _, weight, b0, terms = make(path, (5, 7, 6), bias=bias)
            tensors = [weight, *([b0] if bias else []), *terms.flatten()[0]]
            taken = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            for tensor in merged(weight, b0, terms):
                assert tensor is None or not tensor.requires_grad
                assert tensor is None or tensor.untyped_storage().data_ptr() not in taken


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_is_refused(bad):
    _, weight, b0, terms = make(("none", "vector", "none", "none", "none"))
    with torch.no_grad():
        terms.B.value[4, 0] = bad
    with pytest.raises(ValueError, match="merged weight: expected finite values, got 23"):
        merged(weight, b0, terms)
    w_eff, _ = merged(weight, b0, terms, safe=False)
    assert (~w_eff.isfinite()).nonzero()[:, 0].unique().tolist() == [4]


@pytest.mark.parametrize(
    "path", [("vector", "none"), ("constant", "none"), ("lora_3", "none"), ("none", "vector"), ("none", "lora_3")]
)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_absent_term_changes_no_bit(dtype, product, path):
    """Beside a term of zeros (of -0 where it is added), zeros of W0 keep their signs, and infinities stay."""
    _, weight, b0, terms = make((*path, "none", "none", "none"), dtype=dtype, product=product)
    projected = path[0] == "lora_3" and product == "matmul"
    added = terms.A is None or projected
    terms = terms.map(lambda storage: torch.full_like(storage.detach(), -0.0 if added else 0.0))
    weight = weight.detach()
    weight[::3] = -0.0
    if not projected:  # W0 Ad would be NaN
        weight[1], weight[2] = torch.inf, -torch.inf
    if "lora_3" in path and added:
        weight = weight.abs()  # the product of two zeros is +0
    w_eff, _ = merged(weight, b0, terms, safe=False)
    assert torch.equal(bits(w_eff), bits(weight))


@pytest.mark.parametrize("path", [("none", "none"), ("vector", "none"), ("none", "vector")])
def test_absent_parts_of_the_bias_make_no_nan(path):
    """An infinite W0 or b0 is not multiplied with the zero that C or D would be."""
    _, weight, b0, terms = make((*path, "none", "none", "vector"))
    weight, b0 = weight.detach(), b0.detach()
    weight[1], b0[2], b0[3] = torch.inf, torch.inf, -0.0
    _, b_eff = merged(weight, b0, terms, safe=False)
    assert torch.equal(b_eff, b0 + terms.E.value.detach().flatten())
