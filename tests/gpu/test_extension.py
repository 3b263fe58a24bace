"""The CUDA extension on a real GPU against the fp64 oracle: every pair of kinds, odd shapes, the same bits."""

import itertools

import pytest
import torch

from glora_kernels import available_backends, glora_linear, glora_merge, use_backend
from tests.helpers import assert_contract, make_call, oracle, results, upstream

if not torch.cuda.is_available():
    pytest.skip("no GPU here: the extension was compiled, and run on a CPU, only", allow_module_level=True)
if available_backends()["cuda"] is not None:
    pytest.skip(str(available_backends()["cuda"]), allow_module_level=True)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("lora_3", "vector", "constant", "none")
RESTS = (("lora_3", "vector", "constant"), ("vector", "constant", "vector"), ("none", "none", "vector"))
SHAPES = ((300, 257, 129), (64, 768, 768), (5, 3072, 768))  # M, N, K


def to_gpu(call):
    x, weight, bias, terms = call
    leaf = lambda t: t.detach().cuda().requires_grad_()  # noqa: E731
    return leaf(x), weight.cuda(), None if bias is None else bias.cuda(), terms.map(leaf)


@pytest.fixture(autouse=True)
def backend():
    with use_backend("cuda"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(shape, product, dtype):
    for index, (a, b) in enumerate(itertools.product(KINDS, KINDS)):
        call = make_call((a, b, *RESTS[index % 3]), shape, bias=bool(index % 2), product=product, dtype=dtype)
        dy = upstream(call)
        got = results(glora_linear, *to_gpu(call), dy.cuda())
        got = {name: None if value is None else value.cpu() for name, value in got.items()}
        assert_contract(got, *oracle(*call, dy), dtype)


@pytest.mark.parametrize("path", [("lora_3", "lora_3"), ("vector", "lora_3"), ("constant", "vector")], ids="-".join)
def test_same_call_same_bits(path):
    call = to_gpu(make_call((*path, "lora_3", "vector", "vector"), (1023, 513, 769), dtype=torch.bfloat16))
    dy = upstream(call).cuda()
    first = results(glora_linear, *call, dy)
    for _ in range(250):
        again = results(glora_linear, *call, dy)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging(dtype):
    for a, b in itertools.product(KINDS, KINDS):
        x, weight, bias, terms = to_gpu(make_call((a, b, *RESTS[0]), (17, 257, 129), dtype=dtype))
        merged = glora_merge(weight, bias, terms, safe=False)
        assert torch.equal(torch.nn.functional.linear(x, *merged), glora_linear(x, weight, bias, terms))


def test_fp64_is_left_to_the_torch_backend():
    with pytest.raises(RuntimeError, match="fp64 on a GPU is served by the torch backend"):
        glora_linear(*to_gpu(make_call(("lora_3", "none", "none", "none", "none"))))
