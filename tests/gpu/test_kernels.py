"""The Triton kernels on a real GPU against the fp64 oracle: every kind, every shipped tile, the same bits."""

import itertools

import pytest
import torch

from glora_kernels import glora_linear, glora_merge, reference, use_backend
from tests.helpers import assert_contract, make_call, oracle, results, upstream

if not torch.cuda.is_available():
    pytest.skip("no GPU here: kernels were interpreted and compiled only", allow_module_level=True)

from glora_kernels._triton.device import architecture
from glora_kernels.planning.settings import forced_tiles, rules

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("lora_3", "vector", "constant", "none")
RESTS = (("lora_3", "vector", "constant"), ("vector", "constant", "vector"), ("none", "none", "vector"))
SHAPES = ((300, 257, 129), (64, 768, 768))  # M, N, K
TILES = [
    pytest.param(kernel, rule.tile, rule.elements[0], id=f"{kernel}-{index}")
    for kernel, found in rules(architecture(torch.device("cuda"))).items()
    for index, rule in enumerate(found)
]


def to_gpu(call):
    x, weight, bias, terms = call
    leaf = lambda t: t.detach().cuda().requires_grad_()  # noqa: E731
    return leaf(x), weight.cuda(), None if bias is None else bias.cuda(), terms.map(leaf)


def check(call, strategy):
    """Against the oracle, which runs on the CPU."""
    dy = upstream(call)
    with use_backend("triton", strategy=strategy):
        got = results(glora_linear, *to_gpu(call), dy.cuda())
    got = {name: None if value is None else value.cpu() for name, value in got.items()}
    return assert_contract(got, *oracle(*call, dy), call[0].dtype)


@pytest.mark.parametrize("strategy", ["assemble", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(shape, product, dtype, strategy):
    for index, (a, b) in enumerate(itertools.product(KINDS, KINDS)):
        check(make_call((a, b, *RESTS[index % 3]), shape, bias=bool(index % 2), product=product, dtype=dtype), strategy)


@pytest.mark.parametrize(("kernel", "tile", "element"), TILES)
def test_every_shipped_tile(kernel, tile, element):
    dtypes = (torch.bfloat16, torch.float16) if element == 2 else (torch.float32,)
    for dtype, product, a in itertools.product(dtypes, ("hadamard", "matmul"), KINDS):
        call = make_call((a, "lora_3", "lora_3", "vector", "vector"), (200, 130, 150), product=product, dtype=dtype)
        with forced_tiles({kernel: tile}):
            check(call, "fused" if kernel in ("fused", "gemm_contract") else "assemble")


@pytest.mark.parametrize("strategy", ["assemble", "fused"])
@pytest.mark.parametrize("path", [("lora_3", "lora_3"), ("vector", "lora_3"), ("constant", "vector")], ids="-".join)
def test_same_call_same_bits(path, strategy):
    call = to_gpu(make_call((*path, "lora_3", "vector", "vector"), (1023, 513, 769), dtype=torch.bfloat16))
    dy = upstream(call).cuda()
    with use_backend("triton", strategy=strategy):
        first = results(glora_linear, *call, dy)
        for _ in range(250):
            again = results(glora_linear, *call, dy)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("bias_scale", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("b", ["lora_3", "vector", "constant", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_solved_row_scale(dtype, b, bias_scale):
    x, weight, bias, terms = make_call(("vector", b, "vector", "vector", "vector"), (256, 72, 96), dtype=dtype)
    with torch.no_grad():
        terms.A.value[::3, 0] = -1 + 1e-3
    for strategy in ("assemble", "fused"):
        check((x, weight, bias * bias_scale, terms), strategy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging(dtype):
    """The merged layer's weight is the bits that the assembled layer multiplies by."""
    for a, b in itertools.product(KINDS, KINDS):
        x, weight, bias, terms = to_gpu(make_call((a, b, *RESTS[0]), (64, 72, 96), dtype=dtype))
        with use_backend("triton", strategy="assemble"), torch.no_grad():
            merged = glora_merge(weight, bias, terms)
            assert torch.equal(torch.nn.functional.linear(x, *merged), glora_linear(x, weight, bias, terms))


def test_offsets_beyond_two_to_the_31():
    """Tokens whose last element lies beyond 2^31 elements."""
    tokens, outputs, inputs = 2**16 + 64, 16, 2**15
    gen = torch.Generator("cuda").manual_seed(0)
    x = torch.zeros(tokens, inputs, dtype=torch.bfloat16, device="cuda")
    x[-64:] = torch.randn(64, inputs, generator=gen, device="cuda")
    _, weight, bias, terms = make_call(("lora_3", "lora_3", "none", "none", "none"), (1, outputs, inputs))
    weight, bias = weight.bfloat16().cuda() * 0.01, bias.bfloat16().cuda()
    terms = terms.map(lambda t: (t.detach() * 0.1).bfloat16().cuda())
    want = reference.glora_linear(x[-64:].double(), weight.double(), bias.double(), terms.map(torch.Tensor.double))
    for strategy in ("assemble", "fused"):
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
