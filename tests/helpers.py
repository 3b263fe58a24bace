"""Inputs, the fp64 oracle and the numerical contract, for every test of a kernel."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from glora_kernels import Constant, LowRank, Terms, Vector, reference
from glora_kernels.error_bound import PROMISED as CONTRACT
from glora_kernels.error_bound import largest_constant

WEIGHT_CHOICES = ("lora_1", "lora_3", "vector", "constant", "none")
PROMPT_CHOICES = ("lora_1", "lora_3", "vector", "none")
BIAS_CHOICES = ("vector", "constant", "none")
ALL_PATHS = list(itertools.product(WEIGHT_CHOICES, WEIGHT_CHOICES, PROMPT_CHOICES, BIAS_CHOICES, BIAS_CHOICES))

# Generated cases are the same in every run; another seed draws others.
TEST_SEED = int(os.environ.get("GLORA_TEST_SEED", "0"))


def generator_for(*key) -> torch.Generator:
    """A generator whose seed is a pure function of ``key``."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def make_term(choice: str, slot: str, rows: int, columns: int, storage_rank: int, randn):
    """One term of the kind ``choice`` over a storage of ``storage_rank``, NaN where it is not read."""
    if choice == "none":
        return None
    if slot in "DE":
        value = randn(rows)
        if choice == "vector":
            return Vector(value)
        value[1:] = torch.nan
        return Constant(value)
    down = randn(rows, storage_rank) * 0.5
    up = randn(storage_rank, columns) * 0.5
    if choice.startswith("lora"):
        rank = int(choice.split("_")[1])
        down[:, rank:] = torch.nan
        up[rank:] = torch.nan
        return LowRank(down, up, rank)
    down[:, 1:] = torch.nan
    if choice == "vector":
        return Vector(down)
    down[1:] = torch.nan
    return Constant(down)


def make_call(
    path: tuple[str, ...],
    shape: tuple[int, int, int] = (5, 7, 6),
    *,
    bias: bool = True,
    product: str = "hadamard",
    dtype: torch.dtype = torch.float64,
    terms_dtype: torch.dtype | None = None,
    storage_rank: int = 4,
    seed: int = 0,
    leading: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Terms]:
    """``(x, weight, bias, terms)`` for ``shape = (M, N, K)``; x and the storages require grad."""
    tokens, rows, columns = shape
    gen = generator_for(path, shape, bias, product, seed)
    terms_dtype = terms_dtype or dtype

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    x = randn(*((tokens,) if leading is None else leading), columns).to(dtype).requires_grad_()
    weight = randn(rows, columns).to(dtype)
    b0 = randn(rows).to(dtype) if bias else None
    sides = {
        "A": (rows if product == "hadamard" else columns, columns),
        "B": (rows, columns),
        "C": (columns, 1),
        "D": (rows, 1),
        "E": (rows, 1),
    }
    slots = {slot: make_term(choice, slot, *sides[slot], storage_rank, randn) for slot, choice in zip("ABCDE", path)}
    terms = Terms(**slots, product=product).map(lambda t: t.to(terms_dtype).requires_grad_())
    return x, weight, b0, terms


def upstream(call, seed: int = 0) -> Tensor:
    """A gradient of the output, of its shape and dtype."""
    x, weight, *_ = call
    shape = (*x.shape[:-1], weight.shape[0])
    return torch.randn(shape, generator=generator_for("dy", seed), dtype=torch.float64).to(x.dtype)


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Inside, what torch allocates is NaN, or the largest integer: an output left unwritten shows, in C++ too."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def results(function, x, weight, bias, terms, dy) -> dict[str, Tensor | None]:
    """y and every gradient of ``function`` at ``dy``, by name."""
    storages, _ = terms.flatten()
    leaves = [x, *storages]
    y = function(x, weight, bias, terms)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(y, wanted, dy, allow_unused=True) if wanted else ()
    by_leaf = iter(grads)
    names = ["x", *(f"{slot}{i}" for slot, term in terms.active for i in range(len(term.storages)))]
    found = {name: next(by_leaf) for name, leaf in zip(names, leaves) if leaf.requires_grad}
    return {"y": y.detach(), **found}


def detached(tensor: Tensor, function=lambda t: t) -> Tensor:
    return function(tensor.detach()).requires_grad_(tensor.requires_grad)


def oracle(x, weight, bias, terms, dy) -> tuple[dict, dict]:
    """Results in fp64 on the given values, and S: the same formula with |.| on every input."""

    def evaluate(function):
        cast = lambda t: None if t is None else detached(t, function)  # noqa: E731
        call = (cast(x), cast(weight), cast(bias), terms.map(cast), function(dy.detach()))
        return results(reference.glora_linear, *call)

    return evaluate(lambda t: t.double()), evaluate(lambda t: t.double().abs())


def worst_constant(got: dict, want: dict, scale: dict, dtype: torch.dtype) -> dict[str, float]:
    """``max (|got - want| - tiny) / (u S)`` for each result; infinite where S is 0 and the error is not."""
    worst = {}
    for name, expected in want.items():
        actual = got[name]
        if expected is None:
            assert actual is None, f"{name}: expected no gradient"
            continue
        assert actual is not None, f"{name}: no gradient"
        worst[name] = largest_constant(actual, expected, scale[name], dtype)
    return worst


# For sums over equal tokens in fp32: their errors do not average out (docs/numerics.md, 'What it does not cover').
EQUAL_TOKENS = 9.0


def assert_contract(got: dict, want: dict, scale: dict, dtype: torch.dtype, equal_tokens: bool = False) -> float:
    """Require ``|err| <= c u S + tiny`` of every element; return the worst constant seen."""
    worst = worst_constant(got, want, scale, dtype)
    allowed = EQUAL_TOKENS if equal_tokens and dtype == torch.float32 else CONTRACT[dtype]
    over = {name: value for name, value in worst.items() if not value <= allowed}
    assert not over, f"error over u*S: {over}, allowed {allowed}"
    return max(worst.values(), default=0.0)
