"""How many launches a layer takes: at most 2 forward and 5 backward, dense products and torch's own kernels included.

Launches are written down instead of run; beside them every operation that torch dispatches counts, but for views and
allocations.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glora_kernels import glora_linear
from glora_kernels._triton import TritonBackend, device, plan
from glora_kernels._triton import run as running
from glora_kernels._triton.launch import recorded
from tests.helpers import upstream
from tests.interpreter.cases import KINDS, PRODUCTS, RAGGED, REUSED, STRATEGIES, kernels, leaves_of, make

FREE = {"view", "_unsafe_view", "t", "transpose", "detach", "alias", "slice", "select", "expand", "as_strided"}
FREE |= {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
FREE |= {"device"}  # asked of fake tensors
FREE |= {"lift_fresh"}  # the table of a path's gradients: copied to the device once, then kept
FORWARD = {"assemble": 2, "fused": 2}
BACKWARD = {"thin": 4, "projected": 4, "scaled": 4, "solved": 5, "dense": 5}  # as backward.py says


class Operations(TorchDispatchMode):
    """The names of what torch dispatches that is neither a view nor an allocation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def counted(call, strategy, dy=None):
    """What forward launches, and what backward does: names of kernels and of torch's operations."""
    dy = upstream(call) if dy is None else dy
    with kernels(strategy), recorded() as found, Operations() as operations:
        y = glora_linear(*call)
        forward = [launch.kernel.__name__ for launch in found] + operations.names
        found.clear()
        operations.names.clear()
        wanted = [leaf for leaf in leaves_of(call) if leaf.requires_grad]
        torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return forward, [launch.kernel.__name__ for launch in found] + operations.names


def expected_route(product, a):
    if a == "constant" or (a == "vector" and product == "matmul"):
        return "scaled"
    return {"none": "thin", "vector": "solved", "lora_3": "dense" if product == "hadamard" else "projected"}[a]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("a", "b"), list(itertools.product(KINDS, KINDS)))
def test_every_path(a, b, product, strategy):
    """All 432 paths, with each product and strategy, with a bias and without."""
    most = BACKWARD[expected_route(product, a)]
    prompts, biases = ("lora_3", "vector", "none"), ("vector", "constant", "none")
    for c, d, e, bias in itertools.product(prompts, biases, biases, (True, False)):
        call = make((a, b, c, d, e), REUSED, bias=bias, product=product, dtype=torch.bfloat16)
        forward, backward = counted(call, strategy, torch.zeros(REUSED[0], REUSED[1], dtype=torch.bfloat16))
        for names in (forward, backward):
            assert {name for name in names if not name.endswith("_kernel")} <= {"mm", "addmm"}, names
        assert len(forward) <= FORWARD[strategy] and len(backward) <= most, (c, d, e, bias, forward, backward)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_the_output_at_hand(strategy):
    """Too few tokens for a row scale to be solved from the output: dW is formed."""
    forward, backward = counted(make(("vector", "lora_3", "lora_3", "vector", "vector"), RAGGED), strategy)
    assert len(forward) <= 2 and len(backward) <= 5
    assert backward.count("contract_kernel") == 1 and "weight_pass_kernel" not in backward


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("wanted", "assemble", "fused"),
    [
        ("x", ["weight_pass_kernel", "mm"], ["fused_kernel"]),
        ("E", ["token_pass_kernel", "finish_kernel"], ["token_pass_kernel", "finish_kernel"]),
        ("C", ["token_pass_kernel", "weight_pass_kernel", "finish_kernel"], None),
        ("B", ["token_pass_kernel", "finish_kernel"], None),
        ("A", ["contract_kernel", "finish_kernel", "mm"], ["contract_kernel", "finish_kernel"]),
        ("xB", ["token_pass_kernel", "weight_pass_kernel", "finish_kernel", "mm"], None),
    ],
)
def test_nothing_is_launched_that_is_not_wanted(wanted, assemble, fused, strategy):
    call = make(("lora_3", "lora_3", "vector", "vector", "vector"))
    call[0].requires_grad_("x" in wanted)
    for slot, term in call[3].active:
        for storage in term.storages:
            storage.requires_grad_(slot in wanted)
    _, backward = counted(call, strategy)
    if strategy == "assemble":
        assert backward == assemble
    elif fused is not None:
        assert backward == fused


def test_a_bias_path_needs_no_new_weight():
    forward, backward = counted(make(("none", "none", "lora_3", "vector", "vector")), "fused")
    assert forward == ["assemble_kernel", "addmm"]
    assert backward == ["token_pass_kernel", "weight_pass_kernel", "finish_kernel", "mm"]
    assert counted(make(("none",) * 5), "fused") == (["addmm"], ["mm"])


@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_on_a_gpu(dtype, strategy, architecture, monkeypatch):
    """The host code on fake CUDA tensors: what it does for each type there, fp32 sums of dW for fp16 among it."""
    monkeypatch.setattr(device, "_gpu", lambda _: architecture)
    monkeypatch.setattr(
        running, "table", lambda numbers, device: torch.empty(len(numbers) // 8, device=device)
    )  # as FREE
    monkeypatch.setattr(plan, "_plan", plan._plan.__wrapped__)  # those of fake tensors are not kept
    backend, (tokens, outputs, inputs) = TritonBackend(strategy), (4096, 768, 512)
    for product, a, b in itertools.product(PRODUCTS, KINDS, ("lora_3", "vector")):
        path = (a, b, "lora_3", "vector", "constant")
        *_, terms = make(path, (1, outputs, inputs), product=product)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
            terms = terms.map(lambda s, fake=fake: fake.from_tensor(s).to("cuda"))
            x, y = (torch.empty(tokens, size, dtype=dtype, device="cuda") for size in (inputs, outputs))
            weight, bias = (torch.empty(size, dtype=dtype, device="cuda") for size in ((outputs, inputs), outputs))
            wanted, storages = frozenset(slot for slot, _ in terms.active), terms.storages
            planned = backend.plan(weight, bias, terms, wanted, True)
            with recorded() as forward, Operations() as operations:
                _, projected, b_eff = planned.forward(x, weight, bias, storages)
                assert len(forward) + len(operations.names) <= 2, (path, forward, operations.names)
            output = y if expected_route(product, a) == "solved" else None
            with recorded() as backward, Operations() as operations:
                planned.backward(y, x, weight, bias, storages, output, b_eff, projected, None)
            assert set(operations.names) <= {"mm"}
            assert len(backward) + len(operations.names) <= BACKWARD[expected_route(product, a)], path
