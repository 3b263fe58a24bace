"""Every kernel build that the gate compiles for an architecture: those that layers of real models launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from ..planning.cases import Case, Layer, Path, cases, paths
from ..planning.prediction import STRATEGIES
from ..planning.problem import CONSTANT, KINDS, LOW_RANK, NONE, VECTOR
from ..planning.settings import classes
from ..terms import PRODUCTS
from .builds import Build, builds_of

VIT_B = [Layer(2304, 768), Layer(768, 768), Layer(3072, 768), Layer(768, 3072)]
SWIN_B = [Layer(3 * width, width) for width in (128, 256, 512, 1024)]
SWIN_B += [Layer(width, 4 * width) for width in (128, 256, 512, 1024)]
SWIN_B_MERGING = [Layer(2 * width, 4 * width, bias=False) for width in (128, 256, 512)]  # of patches
LLAMA_7B = [Layer(4096, 4096, bias=False), Layer(11008, 4096, bias=False), Layer(4096, 11008, bias=False)]
RANKS = (8, 4)
MANY, FEW = 12608, 64  # tokens: 64 images of a ViT-B, and a small batch of a language model


def shipped(architecture: str) -> list[Build]:
    """The builds for ``sm_90``, ``gfx942`` and the like."""
    return builds_of(cases_for(architecture))


def cases_for(architecture: str) -> Iterator[Case]:
    """Every path of a ViT-B in bf16; with few tokens, other types, models and ranks the kinds that differ there."""
    for product in PRODUCTS:
        yield from _calls(architecture, VIT_B, paths(RANKS), (MANY,), ("assemble",), product, wants_x=(True, False))
        pairs = [_path(a, b, LOW_RANK) for a, b in itertools.product(KINDS["A"], KINDS["B"])]
        yield from _calls(architecture, VIT_B, pairs, (FEW,), ("fused",), product)
        vectors = [path for path in pairs if path[0][0] == VECTOR]
        for tokens, strategy in ((MANY, "assemble"), (FEW, "fused")):
            yield from _calls(architecture, VIT_B, vectors, (tokens,), (strategy,), product, keeps_output=(False,))
    types = (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)
    routes = [("hadamard", LOW_RANK), ("hadamard", VECTOR), ("hadamard", CONSTANT), ("matmul", LOW_RANK)]
    for product, a in routes:
        path = [_path(a, LOW_RANK, NONE)]
        for dtype, factors in types:
            yield from _calls(architecture, SWIN_B, path, (MANY,), ("assemble",), product, dtype, factors)
            yield from _calls(architecture, SWIN_B, path, (FEW,), ("fused",), product, dtype, factors)
        yield from _calls(architecture, SWIN_B_MERGING, path, (MANY,), ("assemble",), product)
        yield from _calls(architecture, LLAMA_7B, path, (MANY, FEW), STRATEGIES, product)
    for product, rank in itertools.product(PRODUCTS, (RANKS[0], 64)):
        path = [_path(LOW_RANK, LOW_RANK, LOW_RANK, rank)]
        yield from _calls(architecture, VIT_B, path, classes(architecture), STRATEGIES, product, rank=rank)
    for product in PRODUCTS:
        for rank in (16, 32):
            path = [_path(LOW_RANK, LOW_RANK, LOW_RANK, rank)]
            yield from _calls(architecture, LLAMA_7B, path, (MANY, FEW), STRATEGIES, product, rank=rank)
        path = [_path(LOW_RANK, LOW_RANK, LOW_RANK, 64)]
        yield from _calls(architecture, SWIN_B, path, (256,), STRATEGIES, product, torch.float32, rank=64)


def _calls(
    architecture: str,
    layers: Sequence[Layer],
    taken: Sequence[Path] | Iterator[Path],
    tokens: Sequence[int],
    strategies: Sequence[str],
    product: str,
    dtype: torch.dtype = torch.bfloat16,
    factors: torch.dtype = torch.float32,
    rank: int = RANKS[0],
    wants_x: Sequence[bool] = (True,),
    keeps_output: Sequence[bool] = (True,),
) -> Iterator[Case]:
    return cases(
        itertools.product(layers, tokens),
        taken,
        strategies,
        rank=rank,
        product=product,
        dtype=dtype,
        factors=factors,
        architecture=architecture,
        wants_x=wants_x,
        keeps_output=keeps_output,
    )


def _path(a: str, b: str, c: str, rank: int = RANKS[0]) -> Path:
    return tuple((kind, rank if kind == LOW_RANK else 0) for kind in (a, b, c, VECTOR, CONSTANT))
