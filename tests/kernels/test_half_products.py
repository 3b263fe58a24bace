"""Half types on a CPU: backward is in fp32 where PyTorch has no fast products for them. Both ways keep the contract."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glora_kernels import glora_linear
from tests.helpers import assert_contract, make_call, oracle, results, upstream

PATHS = [
    ("lora_3", "lora_3", "lora_3", "vector", "constant"),
    ("vector", "lora_3", "none", "vector", "vector"),
    ("vector", "vector", "vector", "none", "vector"),
    ("constant", "constant", "none", "constant", "none"),
    ("none", "vector", "none", "none", "vector"),
    ("none", "none", "lora_3", "vector", "vector"),
]


class Products(TorchDispatchMode):
    """Types of the operands of matrix products."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in ("aten::mm", "aten::addmm"):
            self.types.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS, ids="-".join)
def test_the_contract_with_and_without_fast_products(path, dtype, product, capability, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    call = make_call(path, (70, 65, 66), product=product, dtype=dtype)
    dy = upstream(call)
    y = glora_linear(*call)
    with Products() as products:
        y.backward(dy)
    assert products.types
    assert (dtype in products.types) == (capability == "AVX512")
    got = results(glora_linear, *call, dy)
    assert_contract(got, *oracle(*call, dy), dtype)
    assert got["x"].dtype == dtype
