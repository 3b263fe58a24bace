"""glora_merge: fp32 inside, one rounding, the bits that the forward pass multiplies by."""

import pytest
import torch
from torch.nn import functional as F

from glora_kernels import Terms, Vector, glora_linear, glora_merge, reference, use_backend
from glora_kernels.error_bound import UNIT_ROUNDOFF
from tests.helpers import ALL_PATHS, CONTRACT, make_call

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_layer_is_bit_equal_to_the_unmerged(dtype, product):
    for path in ALL_PATHS[::7]:
        x, weight, b0, terms = make_call(path, dtype=dtype, product=product)
        with torch.no_grad():
            assert torch.equal(F.linear(x, *glora_merge(weight, b0, terms)), glora_linear(x, weight, b0, terms)), path


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_rounding(dtype, product, bias):
    """Half types: within one unit roundoff (and a little fp32 noise) of the exact W_eff, elementwise."""
    for path in ALL_PATHS[::11]:
        _, weight, b0, terms = make_call(path, (5, 19, 23), dtype=dtype, product=product, bias=bias)
        got = glora_merge(weight, b0, terms)
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


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_result_shares_nothing_with_the_arguments(backend):
    for path in ALL_PATHS[::5]:
        for bias in (True, False):
            _, weight, b0, terms = make_call(path, bias=bias)
            tensors = [weight, *([b0] if bias else []), *terms.flatten()[0]]
            with use_backend(backend):
                merged = glora_merge(weight, b0, terms)
            for tensor in merged:
                assert tensor is None or not tensor.requires_grad
                assert tensor is None or tensor.untyped_storage().data_ptr() not in {
                    other.untyped_storage().data_ptr() for other in tensors
                }


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_is_refused(bad):
    _, weight, b0, _ = make_call(("none",) * 5)
    before = weight.clone(), b0.clone()
    in_weight, in_bias = Terms(B=Vector(torch.full((7,), bad))), Terms(E=Vector(torch.full((7,), bad)))
    with pytest.raises(ValueError, match="merged weight: expected finite values, got 42"):
        glora_merge(weight, b0, in_weight)
    with pytest.raises(ValueError, match="merged bias: expected finite values, got 7"):
        glora_merge(weight, b0, in_bias)
    assert not glora_merge(weight, b0, in_weight, safe=False)[0].isfinite().any()
    assert torch.equal(weight, before[0])
    assert torch.equal(b0, before[1])


def test_autocast_does_not_touch_it():
    _, weight, b0, terms = make_call(("lora_3", "lora_3", "vector", "none", "none"), dtype=torch.float32)
    want = glora_merge(weight, b0, terms)
    with torch.autocast("cpu", torch.bfloat16):
        got = glora_merge(weight, b0, terms)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
