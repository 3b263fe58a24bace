"""Layer calls on the GPU, held against the fp64 oracle, which runs on the CPU."""

import itertools

import torch

from bench.gpu.rehearsal import is_rehearsal
from glora_kernels import glora_linear
from tests.helpers import assert_contract, make_call, oracle, results, upstream

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("lora_3", "vector", "constant", "none")
PAIRS = list(itertools.product(KINDS, KINDS))  # of A and B
RESTS = (("lora_3", "vector", "constant"), ("vector", "constant", "vector"), ("none", "none", "vector"))


def call_of(pair, shape, product, dtype):
    """A call with A and B of these kinds; C, D, E and the bias vary with the pair."""
    index = PAIRS.index(pair)
    return make_call((*pair, *RESTS[index % 3]), shape, bias=bool(index % 2), product=product, dtype=dtype)


def to_gpu(call):
    x, weight, bias, terms = call
    leaf = lambda t: t.detach().cuda().requires_grad_()  # noqa: E731
    return leaf(x), weight.cuda(), None if bias is None else bias.cuda(), terms.map(leaf)


def check(call):
    """y and every gradient of the backend that is in use, under the numerical contract."""
    dy = upstream(call)
    got = results(glora_linear, *to_gpu(call), dy.cuda())
    got = {name: None if value is None else value.cpu() for name, value in got.items()}
    return assert_contract(got, *oracle(*call, dy), call[0].dtype)


def check_bits(path):
    """The same call gives the same bits, forward and backward, each time."""
    call = to_gpu(make_call((*path, "lora_3", "vector", "vector"), (1023, 513, 769), dtype=torch.bfloat16))
    dy = upstream(call).cuda()
    first = results(glora_linear, *call, dy)
    differ = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(2 if is_rehearsal() else 1000):
        again = results(glora_linear, *call, dy)
        for name, value in first.items():
            differ |= (value.view(torch.int8) != again[name].view(torch.int8)).any()  # read once, at the end
    assert not differ
