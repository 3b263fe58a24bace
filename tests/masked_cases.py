"""Layers with all eight storages, and their paths as masks."""

from __future__ import annotations

import torch

from glora_kernels import encode, glora_linear, masked_terms, path_masks
from tests.helpers import generator_for

RANK = 4


def config_of(path):
    kinds = {slot: choice.partition("_") for slot, choice in zip("ABCDE", path)}
    return encode({slot: (kind, int(rank or 0)) for slot, (kind, _, rank) in kinds.items()})


def make(shape=(5, 7, 6), *, product="hadamard", bias=True, dtype=torch.float64, terms_dtype=None, seed=0):
    """``(x, weight, bias, storages)``, where x and the storages require grad."""
    tokens, rows, columns = shape
    gen = generator_for(shape, product, seed)
    randn = lambda *size: torch.randn(*size, generator=gen, dtype=torch.float64).to(dtype)  # noqa: E731
    left = rows if product == "hadamard" else columns
    sizes = [(left, RANK), (RANK, columns), (rows, RANK), (RANK, columns), (columns, RANK), (RANK, 1), (rows,), (rows,)]
    x, weight, b0 = randn(tokens, columns), randn(rows, columns), randn(rows)
    storages = [(randn(*size) * 0.5).to(terms_dtype or dtype).requires_grad_() for size in sizes]
    return x.requires_grad_(), weight, b0 if bias else None, storages


def masked_linear(x, weight, bias, storages, config, product):
    return glora_linear(x, weight, bias, masked_terms(weight, bias, storages, path_masks(config, RANK), product))
