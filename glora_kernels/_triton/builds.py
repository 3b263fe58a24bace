"""Every kernel build that this package ships for an architecture.

They are found by running the host code on meta tensors and recording what it would launch. So what is compiled ahead of
time is what is launched.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gradient_routes import reuses_output
from ..planning.operands import ADDED
from ..terms import SLOTS, Constant, LowRank, Terms, Vector
from .backend import TritonBackend
from .device import pretended
from .kernels.contract import contract_kernel
from .kernels.fused import fused_kernel
from .kernels.token_pass import token_pass_kernel
from .launch import Launch, recorded

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SIZE = (768, 1024)  # N, K: divisible by 16, as in nearly all layers
TOKENS = (16, 256, 8192, 16384)
RANKS = (8, 64)


class Build(NamedTuple):
    """One kernel for one set of types, constants and tile sizes; see aot.py."""

    kernel: Any
    label: str
    signature: dict[str, str]
    divisible: frozenset[str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    matrix: bool
    plain_loop: bool
    launches: int


class Case(NamedTuple):
    """One layer call whose launches are recorded."""

    dtype: torch.dtype
    factors: torch.dtype
    product: str
    a: str
    b: str
    c: str
    tokens: int
    rank: int
    strategy: str

    def __str__(self) -> str:
        kinds = f"A={self.a} B={self.b} C={self.c}"
        types = f"{str(self.dtype)[6:]}/{str(self.factors)[6:]}"
        return f"{self.product} {kinds} {types} M={self.tokens} R={self.rank} {self.strategy}"


def shipped(target: str) -> list[Build]:
    """The builds for ``cuda:90``, ``hip:gfx942`` and the like."""
    backend, _, name = target.partition(":")
    architecture = f"sm_{name}" if backend == "cuda" else name
    builds: dict[tuple, Build] = {}
    labels: Counter[str] = Counter()
    for case in _cases():
        for build in _builds_of(case, architecture):
            key = (build.kernel, *map(str, build[2:7]))
            if key not in builds:
                labels[build.label] += 1
                builds[key] = build._replace(label=f"{build.label} #{labels[build.label]}")
    return list(builds.values())


def _cases() -> Iterator[Case]:
    """Every kind with each product in bf16; in other types, ranks and numbers of tokens the kinds that differ there."""
    kinds = ("lora", "vector", "constant", "none")
    others = ("lora", "vector", "none")  # of B; a constant is a vector of stride 0, summed elsewhere
    for product, a, b, strategy in itertools.product(("hadamard", "matmul"), kinds, others, ("assemble", "fused")):
        tokens = 64 if strategy == "fused" else 4096
        yield Case(torch.bfloat16, torch.float32, product, a, b, "lora", tokens, 8, strategy)
    types = (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)
    routes = (("hadamard", "lora"), ("hadamard", "vector"), ("hadamard", "constant"), ("matmul", "lora"))
    for (dtype, factors), (product, a), strategy in itertools.product(types, routes, ("assemble", "fused")):
        yield Case(dtype, factors, product, a, "lora", "none", 64 if strategy == "fused" else 4096, 8, strategy)
    heaviest = (("hadamard", "lora"), ("matmul", "lora"))
    for rank, tokens, (product, a), strategy in itertools.product(RANKS, TOKENS, heaviest, ("assemble", "fused")):
        yield Case(torch.bfloat16, torch.float32, product, a, "lora", "lora", tokens, rank, strategy)
    for (product, a), strategy in itertools.product(heaviest, ("assemble", "fused")):
        yield Case(torch.float32, torch.float32, product, a, "lora", "lora", 256, RANKS[-1], strategy)


def _builds_of(case: Case, architecture: str) -> Iterator[Build]:
    with pretended(architecture):
        forward, backward = launches_of(case)
    launches = [*forward, *backward]
    for launch in launches:
        same = sum(other.kernel is launch.kernel for other in launches)
        yield build_of(launch, f"{launch.kernel.fn.__name__} {case}", same)


def launches_of(case: Case, size: tuple[int, int] = SIZE, device: str = "meta") -> tuple[list[Launch], list[Launch]]:
    """What forward and backward of a layer of ``size`` (N, K) would launch; meta tensors need ``pretended``."""
    x, weight, bias, terms = _operands(case, size, device)
    wanted = frozenset(slot for slot in SLOTS if getattr(terms, slot) is not None)
    plan = TritonBackend(case.strategy).plan(weight, bias, terms, wanted, True)
    with recorded() as first:
        y, projected, b_eff = plan.forward(x, weight, bias, terms.storages)
    output = y if reuses_output(x.shape[0], x.shape[1], terms) else None
    with recorded() as second:
        plan.backward(y, x, weight, bias, terms.storages, output, b_eff, projected, None)
    return first, second


def _operands(case: Case, size: tuple[int, int], device: str) -> tuple[Tensor, Tensor, Tensor, Terms]:
    outputs, inputs = size

    def random(*shape: int, dtype: torch.dtype = case.factors) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def term(kind: str, rows: int, columns: int) -> LowRank | Vector | Constant | None:
        down, up = random(rows, 64), random(64, columns)
        if kind == "lora":
            return LowRank(down, up, case.rank)
        return None if kind == "none" else Vector(down) if kind == "vector" else Constant(down)

    a_rows = outputs if case.product == "hadamard" else inputs
    terms = Terms(
        term(case.a, a_rows, inputs),
        term(case.b, outputs, inputs),
        term(case.c, inputs, 1),  # type: ignore[arg-type]
        Vector(random(outputs)),
        Constant(random(outputs)),
        case.product,
    )
    x, weight = random(case.tokens, inputs, dtype=case.dtype), random(outputs, inputs, dtype=case.dtype)
    return x, weight, random(outputs, dtype=case.dtype), terms


def build_of(launch: Launch, label: str, launches: int = 1) -> Build:
    """The build that Triton would make for a launch: it takes 1 as a constant and knows multiples of 16."""
    signature, divisible, constexprs = {}, set(), {}
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        special = type(value) is int and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            constexprs[name] = value
            continue
        signature[name] = _type_of(value)
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            divisible.add(name)
    tile = launch.tile
    size = f"[{tile.tokens}x{tile.rows}x{tile.columns} w{tile.warps} s{tile.stages}{' swap' if tile.swap else ''}]"
    half = launch.arguments.get("x_ptr", launch.arguments.get("w_ptr"))
    half_type = isinstance(half, Tensor) and half.dtype.itemsize == 2
    plain = launch.kernel is contract_kernel and bool(constexprs["GEMM"])
    return Build(
        launch.kernel,
        f"{label} {size}",
        signature,
        frozenset(divisible),
        constexprs,
        tile.warps,
        tile.stages,
        matrix=half_type and (plain or launch.kernel is fused_kernel or _thin_dots(launch)),
        plain_loop=half_type and plain,
        launches=launches,
    )


def _thin_dots(launch: Launch) -> bool:
    """Whether this is a token pass with products with factors in it."""
    if launch.kernel is not token_pass_kernel:
        return False
    return launch.arguments["A"] == ADDED or launch.arguments["THIN_B"]


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
