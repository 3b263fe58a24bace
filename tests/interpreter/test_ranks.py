"""Any whole rank up to that of the storage, 64; what lies beyond it is NaN."""

import pytest
import torch

from glora_kernels import LowRank, Terms, glora_linear
from tests.interpreter.cases import PRODUCTS, STRATEGIES, check, kernels, make, tiles

RANKS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 63, 64)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rank", RANKS)
def test_any_rank(rank, product, strategy):
    """Another rank for each term."""
    index = RANKS.index(rank)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[index % 3]
    others = [RANKS[(index + step) % len(RANKS)] for step in (5, 9)]
    path = (f"lora_{rank}", f"lora_{others[0]}", f"lora_{others[1]}", "vector", "vector")
    with tiles(32, 16, 32):
        check(make(path, product=product, dtype=dtype, storage_rank=64), strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("a", ["vector", "constant", "none"])
@pytest.mark.parametrize("rank", [1, 13, 16, 17, 64])
def test_any_rank_of_b_alone(rank, a, strategy):
    """In half types db lies beside the gradient of Bd, unless the padded rank is full."""
    with tiles(32, 16, 32):
        check(make((a, f"lora_{rank}", "none", "none", "none"), storage_rank=64), strategy=strategy)
        half = make((a, f"lora_{rank}", "none", "constant", "vector"), dtype=torch.bfloat16, storage_rank=64)
        check(half, strategy=strategy)


def test_all_of_a_storage():
    """``rank=None`` reads every column."""
    x, weight, b0, terms = make(("lora_8", "lora_8", "lora_8", "none", "none"))
    whole = Terms(*(LowRank(term.down, term.up) for _, term in terms.active))
    for strategy in STRATEGIES:
        check((x, weight, b0, whole), strategy=strategy)


def test_a_rank_above_64_is_refused():
    call = make(("none", "lora_65", "none", "none", "none"), storage_rank=65)
    with kernels(), pytest.raises(RuntimeError, match="rank 65 is above 64"):
        glora_linear(*call)
