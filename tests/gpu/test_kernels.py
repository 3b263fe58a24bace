"""The Triton kernels on a real GPU against the fp64 oracle: every kind, every shipped tile, the same bits."""

import pytest
import torch

from glora_kernels import glora_linear, glora_merge, reference, use_backend
from tests.gpu.calls import DTYPES, KINDS, PAIRS, RESTS, call_of, check, check_bits, to_gpu
from tests.helpers import make_call, upstream
from tests.shipped_calls import calls, check_case

if not torch.cuda.is_available():
    pytest.skip("no GPU here: kernels were interpreted, compiled and executed only", allow_module_level=True)

from glora_kernels._triton.device import architecture
from glora_kernels.planning.settings import forced_tiles, rules

HERE = architecture(torch.device("cuda"))
STRATEGIES = ("assemble", "fused")
PRODUCTS = ("hadamard", "matmul")
SHAPES = ((300, 257, 129), (64, 768, 768))  # M, N, K
TILES = [
    pytest.param(kernel, rule.tile, dtype, id=f"{kernel}-{index}-{str(dtype).removeprefix('torch.')}")
    for kernel, found in rules(HERE).items()
    for index, rule in enumerate(found)
    for dtype in DTYPES
    if dtype.itemsize in rule.elements
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_contract(pair, shape, product, dtype, strategy):
    with use_backend("triton", strategy=strategy):
        check(call_of(pair, shape, product, dtype))


@pytest.mark.parametrize(("kernel", "tile", "dtype"), TILES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("a", KINDS)
def test_every_shipped_tile(a, product, kernel, tile, dtype):
    call = make_call((a, "lora_3", "lora_3", "vector", "vector"), (200, 130, 150), product=product, dtype=dtype)
    strategy = "fused" if kernel in ("fused", "gemm_contract") else "assemble"
    with forced_tiles({kernel: tile}), use_backend("triton", strategy=strategy):
        check(call)


@pytest.mark.parametrize("number", range(len(calls(HERE))))
def test_every_shipped_build(number):
    check_case(calls(HERE)[number], "cuda")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("path", [("lora_3", "lora_3"), ("vector", "lora_3"), ("constant", "vector")], ids="-".join)
def test_same_call_same_bits(path, strategy):
    with use_backend("triton", strategy=strategy):
        check_bits(path)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bias_scale", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("b", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_solved_row_scale(dtype, b, bias_scale, strategy):
    x, weight, bias, terms = make_call(("vector", b, "vector", "vector", "vector"), (256, 72, 96), dtype=dtype)
    with torch.no_grad():
        terms.A.value[::3, 0] = -1 + 1e-3
    with use_backend("triton", strategy=strategy):
        check((x, weight, bias * bias_scale, terms))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_merging(pair, dtype):
    """The merged layer's weight is the bits that the assembled layer multiplies by."""
    x, weight, bias, terms = to_gpu(make_call((*pair, *RESTS[0]), (64, 72, 96), dtype=dtype))
    with use_backend("triton", strategy="assemble"), torch.no_grad():
        merged = glora_merge(weight, bias, terms)
        assert torch.equal(torch.nn.functional.linear(x, *merged), glora_linear(x, weight, bias, terms))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_offsets_beyond_two_to_the_31(strategy):
    """Tokens whose last element lies beyond 2^31 elements."""
    tokens, outputs, inputs = 2**16 + 64, 16, 2**15
    gen = torch.Generator("cuda").manual_seed(0)
    x = torch.zeros(tokens, inputs, dtype=torch.bfloat16, device="cuda")
    x[-64:] = torch.randn(64, inputs, generator=gen, device="cuda")
    _, weight, bias, terms = make_call(("lora_3", "lora_3", "none", "none", "none"), (1, outputs, inputs))
    weight, bias = weight.bfloat16().cuda() * 0.01, bias.bfloat16().cuda()
    terms = terms.map(lambda t: (t.detach() * 0.1).bfloat16().cuda())
    want = reference.glora_linear(x[-64:].double(), weight.double(), bias.double(), terms.map(torch.Tensor.double))
    with use_backend("triton", strategy=strategy), torch.no_grad():
        got = glora_linear(x, weight, bias, terms)[-64:]
    torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("a", ["lora_3", "vector", "constant"])
def test_captured_in_a_graph(a):
    """After a warm-up forward and backward can be captured, and replay to the same bits."""
    call = to_gpu(make_call((a, "lora_3", "vector", "vector", "vector"), (128, 72, 96), dtype=torch.bfloat16))
    dy, leaves = upstream(call).cuda(), [call[0], *call[3].flatten()[0]]
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with use_backend("triton"):
        want = torch.autograd.grad(glora_linear(*call), leaves, dy)
        with torch.cuda.stream(side):
            torch.autograd.grad(glora_linear(*call), leaves, dy)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            got = torch.autograd.grad(glora_linear(*call), leaves, dy)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want))
