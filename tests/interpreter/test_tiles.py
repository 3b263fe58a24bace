"""Every shipped tile, computed with; tiles that are larger than the matrix, and longer one way than the other."""

import itertools

import pytest
import torch

from glora_kernels._triton.settings import KERNELS, Tile, forced_tiles, load
from tests.interpreter.cases import PRODUCTS, STRATEGIES, check, make, tiles, watched

DTYPE = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
# For each kernel a call that launches it, with all that it can do: A, B, product, strategy, M, N, K.
LAUNCHED = {
    "assemble": [("lora", "lora", "hadamard", "assemble"), ("lora", "lora", "matmul", "assemble")],
    "weight_pass": [("vector", "lora", "hadamard", "assemble"), ("lora", "lora", "matmul", "assemble")],
    "fused": [("lora", "lora", "hadamard", "fused"), ("vector", "lora", "matmul", "fused")],
    "token_pass": [("lora", "lora", "matmul", "fused"), ("constant", "lora", "hadamard", "fused")],
    "contract": [("lora", "lora", "hadamard", "assemble")],
    "gemm_contract": [("lora", "lora", "hadamard", "fused")],
}
SHAPE = (70, 66, 74)


def shipped():
    """``kernel, tile, element, largest rank`` of every rule of every architecture, each once."""
    found = {}
    for table, kernel in itertools.product(load().values(), KERNELS):
        for rule in table[kernel]:
            for element in rule.elements:
                found[kernel, rule.tile, element, min(rule.max_rank or 64, 64)] = None
    return list(found)


def label(case):
    kernel, tile, element, rank = case
    return f"{kernel}-{tile.tokens}x{tile.rows}x{tile.columns}{'-swap' * tile.swap}-{8 * element}bit-rank{rank}"


@pytest.mark.parametrize("case", shipped(), ids=label)
def test_shipped(case):
    """At its largest rank, over more than one block each way where the tile is not larger than the matrix."""
    kernel, tile, element, rank = case
    others = dict.fromkeys(KERNELS, Tile(32, 32, 32, 4, 2)) | {kernel: tile}
    for a, b, product, strategy in LAUNCHED[kernel]:
        path = tuple(kind.replace("lora", f"lora_{rank}") for kind in (a, b, "lora", "vector", "vector"))
        call = make(path, SHAPE, product=product, dtype=DTYPE[element], storage_rank=64)
        with forced_tiles(others), watched() as found:
            check(call, strategy=strategy)
        name = f"{kernel.replace('gemm_', '')}_kernel"
        assert name in {launched.kernel for launched in found}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tile", list(itertools.permutations((16, 32, 64))), ids=str)
def test_tiles_longer_one_way(tile, strategy):
    """Rows taken for columns, or tokens for either, would show."""
    for product, a in (("hadamard", "lora_3"), ("matmul", "lora_3"), ("hadamard", "vector"), ("matmul", "vector")):
        call = make((a, "lora_7", "lora_3", "vector", "constant"), (65, 34, 66), product=product)
        with tiles(*tile):
            check(call, strategy=strategy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(3, 40, 50), (70, 20, 66), (17, 19, 23)], ids=str)
def test_swapped_product(shape, product, dtype):
    """``W_eff x^T`` in place of ``x W_eff^T``, in forward and for dx."""
    for a, b in (("lora_3", "lora_3"), ("vector", "none"), ("none", "vector"), ("constant", "lora_3")):
        with tiles(16, 32, 32, swap=True):
            check(make((a, b, "vector", "vector", "vector"), shape, product=product, dtype=dtype), strategy="fused")
