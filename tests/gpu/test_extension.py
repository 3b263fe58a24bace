"""The CUDA extension on a real GPU against the fp64 oracle: every pair of kinds, odd shapes, the same bits."""

import pytest
import torch

from glora_kernels import available_backends, glora_linear, glora_merge, use_backend
from tests.gpu.calls import DTYPES, PAIRS, RESTS, call_of, check, check_bits, to_gpu
from tests.helpers import make_call

if not torch.cuda.is_available():
    pytest.skip("no GPU here: the extension was compiled, and run on a CPU, only", allow_module_level=True)
if available_backends()["cuda"] is not None:
    pytest.skip(str(available_backends()["cuda"]), allow_module_level=True)

SHAPES = ((300, 257, 129), (64, 768, 768), (5, 3072, 768))  # M, N, K


@pytest.fixture(autouse=True)
def backend():
    with use_backend("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_contract(pair, shape, product, dtype):
    check(call_of(pair, shape, product, dtype))


@pytest.mark.parametrize("path", [("lora_3", "lora_3"), ("vector", "lora_3"), ("constant", "vector")], ids="-".join)
def test_same_call_same_bits(path):
    check_bits(path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_merging(pair, dtype):
    x, weight, bias, terms = to_gpu(make_call((*pair, *RESTS[0]), (17, 257, 129), dtype=dtype))
    merged = glora_merge(weight, bias, terms, safe=False)
    assert torch.equal(torch.nn.functional.linear(x, *merged), glora_linear(x, weight, bias, terms))


def test_fp64_is_left_to_the_torch_backend():
    with pytest.raises(RuntimeError, match="fp64 on a GPU is served by the torch backend"):
        glora_linear(*to_gpu(make_call(("lora_3", "none", "none", "none", "none"))))
