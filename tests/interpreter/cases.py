"""Calls of the Triton backend for this suite: made, run, compared; and an interpreter quick enough for thousands."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from glora_kernels import Terms, glora_linear, use_backend
from glora_kernels._triton.launch import launch
from glora_kernels.planning.operands import ADDED, COLUMN, NONE
from glora_kernels.planning.settings import KERNELS, Tile, forced_tiles
from tests.helpers import assert_contract, generator_for, make_call, make_term, oracle, results, upstream

STRATEGIES = ("assemble", "fused")
PRODUCTS = ("hadamard", "matmul")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = ("lora_3", "vector", "constant", "none")
WEIGHT_KINDS = ("lora_1", "lora_3", "lora_7", "vector", "constant", "none")
PROMPT_KINDS = ("lora_1", "lora_3", "lora_7", "vector", "none")
BIAS_KINDS = ("vector", "constant", "none")
STORAGE_RANK = 8

RAGGED = (17, 19, 23)  # M, N, K: two blocks of 16 each, and none of them full
REUSED = (70, 19, 67)  # enough tokens and inputs for the output to be reused


def rest(index: int) -> tuple[str, str, str]:
    """Kinds of C, D and E: six neighbours have every kind of each."""
    return PROMPT_KINDS[index % 5], BIAS_KINDS[index % 3], BIAS_KINDS[index // 2 % 3]


def make(
    path: tuple[str, ...],
    shape: tuple[int, int, int] = RAGGED,
    *,
    bias: bool = True,
    product: str = "hadamard",
    dtype: torch.dtype = torch.float32,
    terms_dtype: torch.dtype | None = None,
    storage_rank: int = STORAGE_RANK,
    seed: int = 0,
    leading: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Terms]:
    """As :func:`tests.helpers.make_call`, over storages of any rank."""
    none = make_call(("none",) * 5, shape, bias=bias, product=product, dtype=dtype, seed=seed, leading=leading)
    gen = generator_for("terms", path, shape, bias, product, seed)
    _, rows, columns = shape

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, dtype=torch.float64)

    sides = {"A": (rows if product == "hadamard" else columns, columns), "B": (rows, columns), "C": (columns, 1)}
    slots = {
        slot: make_term(choice, slot, *sides.get(slot, (rows, 1)), storage_rank, randn)
        for slot, choice in zip("ABCDE", path)
    }
    terms = Terms(**slots, product=product).map(lambda t: t.to(terms_dtype or dtype).requires_grad_())
    return (*none[:3], terms)


def lost_rows(launches: list[Call]) -> Tensor:
    """The rows of da that the weight pass has marked, (N,); given all launches."""
    arguments = next(one.arguments for one in launches if one.kernel == "weight_pass_kernel")
    at = arguments["at_lost"]
    return arguments["partials_ptr"][at : at + arguments["N"]].bool()


def leaves_of(call) -> list[Tensor]:
    """x and the storages."""
    return [call[0], *call[3].flatten()[0]]


@contextmanager
def kernels(strategy: str | None = None, overflow: bool = False) -> Iterator[None]:
    """The Triton backend.

    Args:
        strategy: as in ``use_backend``.
        overflow: whether to look for int32 overflow, which takes half the time: of use where offsets are large.
    """
    builder = interpreter.interpreter_builder
    before = builder.options
    builder.options = dataclasses.replace(before, debug=overflow, sanitize_overflow=overflow)
    try:
        with use_backend("triton", strategy):
            yield
    finally:
        builder.options = before


def run(call, dy: Tensor, strategy: str | None = None, overflow: bool = False) -> dict[str, Tensor | None]:
    """y and every gradient, from the kernels."""
    with kernels(strategy, overflow):
        return results(glora_linear, *call, dy)


def check(call, dy: Tensor | None = None, strategy: str | None = None, equal_tokens: bool = False) -> float:
    """Hold y and every gradient to the contract; returns the worst constant seen."""
    dy = upstream(call) if dy is None else dy
    return assert_contract(run(call, dy, strategy), *oracle(*call, dy), call[0].dtype, equal_tokens)


class Call(NamedTuple):
    """A launch that has run: the kernel's name, and its arguments by name, outputs among them."""

    kernel: str
    arguments: dict[str, Any]


@contextmanager
def launching(function: Callable) -> Iterator[None]:
    """Call ``function(kernel, grid, tile, **arguments)`` in place of ``launch``, inside the ``with`` block."""
    modules = [
        m for name, m in sys.modules.items() if name.startswith("glora_kernels._triton.") and hasattr(m, "launch")
    ]
    modules = [m for m in modules if m.launch is launch]
    try:
        for module in modules:
            module.launch = function
        yield
    finally:
        for module in modules:
            module.launch = launch


@contextmanager
def watched() -> Iterator[list[Call]]:
    """The launches inside the ``with`` block."""
    found: list[Call] = []

    def noted(kernel, grid, tile, /, **arguments):
        launch(kernel, grid, tile, **arguments)
        found.append(Call(kernel.__name__, arguments))

    with launching(noted):
        yield found


def route(found: list[Call]) -> str:
    """Which route a watched backward pass took, by what it launched; see ``glora_kernels/planning/backward.py``."""
    by_name = {call.kernel: call.arguments for call in found}
    if "contract_kernel" in by_name:
        return "solved" if by_name["contract_kernel"]["ONLY_LOST"] else "dense"
    kind = by_name["token_pass_kernel"]["A"] if "token_pass_kernel" in by_name else NONE
    return {ADDED: "projected", COLUMN: "scaled", NONE: "thin"}[kind]


@contextmanager
def tiles(tokens: int, rows: int, columns: int, swap: bool = False) -> Iterator[None]:
    """The same tile for every kernel."""
    with forced_tiles(dict.fromkeys(KERNELS, Tile(tokens, rows, columns, 4, 2, swap))):
        yield


def laid_out(tensor: Tensor, order: str) -> Tensor:
    """The values of a matrix (one row for all where expanded) behind other strides; what lies between is NaN."""
    if order == "transposed":
        return tensor.t().contiguous().t()
    if order == "sliced":
        padded = torch.full((tensor.shape[0] + 2, 2 * tensor.shape[1] + 1), torch.nan, dtype=tensor.dtype)
        padded[1:-1, 1::2] = tensor
        return padded[1:-1, 1::2]
    return tensor[:1].expand_as(tensor) if order == "expanded" else tensor


def bits(tensor: Tensor) -> Tensor:
    """For comparisons in which NaN equals itself."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def quicken() -> None:
    """Take two wastes out of the interpreter, two thirds of its time: nothing else changes.

    A kernel's function that calls another looks through triton.language again for what to patch, at every call. All of
    it is patched by then, but for what the modules of ``triton.language`` itself see: once is enough.
    """
    patched: set[str] = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call

    find, known = interpreter._get_np_dtype, {}

    def numpy_type(dtype):
        if dtype.scalar.is_ptr():
            return find(dtype)
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = numpy_type


assert tl.core is not tl  # both are patched by name in ``interpreter._patch_lang``
quicken()
