"""Every shipped tile, computed with; tiles that are larger than the matrix, and longer one way than the other."""

import itertools

import pytest
import torch

from glora_kernels.planning.settings import KERNELS, Tile, forced_tiles, load
from tests.interpreter.cases import PRODUCTS, STRATEGIES, check, make, tiles, watched

DTYPE = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
# For each kernel calls that launch it, with all that it can do: A, B, product and strategy.
LAUNCHED = {
    "assemble": [("lora", "lora", "matmul", "assemble")],
    "weight_pass": [("vector", "lora", "hadamard", "assemble"), ("lora", "lora", "matmul", "assemble")],
    "fused": [("lora", "lora", "hadamard", "fused")],
    "token_pass": [("lora", "lora", "matmul", "fused"), ("constant", "lora", "hadamard", "fused")],
    "contract": [("lora", "lora", "hadamard", "assemble")],
    "gemm_contract": [("lora", "lora", "hadamard", "fused")],
}


def shipped():
    """``kernel, tile, element, rank``: each tile of the file once, with the largest rank that it is meant for."""
    found = {}
    for name, kernel in itertools.product(sorted(load()), KERNELS):
        for rule in load()[name][kernel]:
            for element in rule.elements:
                rank, _ = found.get((kernel, rule.tile), (0, 0))
                found[kernel, rule.tile] = max((rank, element), (min(rule.max_rank or 64, 64), element))
    return [(*key, element, rank) for key, (rank, element) in found.items()]


def label(case):
    kernel, tile, element, rank = case
    return f"{kernel}-{tile.tokens}x{tile.rows}x{tile.columns}{'-swap' * tile.swap}-{8 * element}bit-rank{rank}"


@pytest.mark.parametrize("case", shipped(), ids=label)
def test_shipped(case):
    """At its largest rank; each way two blocks of it, or one that is larger than the matrix."""
    kernel, tile, element, rank = case
    others = dict.fromkeys(KERNELS, Tile(64, 64, 64, 4, 2)) | {kernel: tile}
    for a, b, product, strategy in LAUNCHED[kernel]:
        path = tuple(kind.replace("lora", f"lora_{rank}") for kind in (a, b, "lora", "vector", "vector"))
        least = 64 if a == "vector" else 1  # tokens and inputs, for the weight pass to look for lost rows
        tokens, rows, columns = (min(size + 3, 70) if size else 20 for size in (tile.tokens, tile.rows, tile.columns))
        shape = (max(tokens, least), rows, max(columns, least))
        call = make(path, shape, product=product, dtype=DTYPE[element], storage_rank=64)
        with forced_tiles(others), watched() as found:
            check(call, strategy=strategy)
        assert f"{kernel.replace('gemm_', '')}_kernel" in {launched.kernel for launched in found}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tile", list(itertools.permutations((16, 32, 64))), ids=str)
def test_tiles_longer_one_way(tile, strategy):
    """Rows taken for columns, or tokens for either, would show."""
    for product, a, shape in (
        ("hadamard", "lora_3", (33, 34, 35)),
        ("matmul", "lora_3", (33, 34, 35)),
        ("hadamard", "vector", (65, 34, 66)),
        ("matmul", "vector", (33, 34, 35)),
    ):
        call = make((a, "lora_7", "lora_3", "vector", "constant"), shape, product=product)
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
