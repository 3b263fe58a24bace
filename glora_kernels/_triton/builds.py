"""The builds of kernels that layer calls launch, from their schedules: no tensor is made and nothing is compiled."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from triton import knobs

from ..planning.cases import Case
from ..planning.operands import ADDED
from ..planning.steps import Amount, Launch, Schedule, cdiv
from .kernels import KERNELS

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_TABLE = POINTERS[torch.int64]  # of ``finish``, which a schedule holds as rows
_VARIES, _ASKED, _CONSTANT, _POINTER = range(4)


class Build(NamedTuple):
    """One kernel for one set of types, constants and block sizes: what Triton compiles once.

    Attributes:
        kernel: its name, such as ``"token_pass"``.
        label: the kernel, a call that launches it, and its block sizes, warps and stages; no two builds share one.
        signature: the types of the arguments that are not constants, in Triton's words.
        divisible: those of them that are multiples of 16, or point to one.
        constexprs: the values of the other arguments: constants, None for absent tensors, and numbers that are 1.
        num_warps, num_stages: warps of a program, stages of its pipelines.
        matrix: whether matrix units are meant to be used.
        plain_loop: whether their operands are meant to come straight from memory.
    """

    kernel: str
    label: str
    signature: dict[str, str]
    divisible: frozenset[str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool
    plain_loop: bool

    @property
    def function(self) -> Any:
        """The kernel itself."""
        return KERNELS[self.kernel]


def require_compiler() -> None:
    """Raise ValueError in a process whose kernels are interpreted."""
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET: expected unset, since interpreted kernels cannot be compiled, got set")


def builds_of(cases: Iterable[Case], training: bool = True) -> list[Build]:
    """The distinct builds that the calls launch, in the order in which they do; without ``training``, forward alone."""
    require_compiler()
    firsts: dict[Case, Case] = {}
    for case in cases:
        firsts.setdefault(case.representative, case)
    found: dict[tuple, Build] = {}
    for alike, first in firsts.items():
        schedules = alike.schedules if training else alike.schedules[:1]
        for direction, schedule in zip(("forward", "backward"), schedules):
            for step in schedule.steps:
                if isinstance(step, Launch):
                    key = _key(step, schedule, alike.tokens)
                    if key not in found:
                        found[key] = _build(step, key, f"{step.kernel} {direction} {first}", first.dtype)
    return list(found.values())


@cache
def _parameters(kernel: str) -> tuple[tuple[str, int], ...]:
    """The names of the kernel's parameters, each with what Triton makes of its values."""

    def role(parameter: Any) -> int:
        if parameter.is_constexpr:
            return _CONSTANT
        if parameter.name.endswith("_ptr"):
            return _POINTER
        return _VARIES if parameter.do_not_specialize else _ASKED

    return tuple((parameter.name, role(parameter)) for parameter in KERNELS[kernel].params)


def _key(step: Launch, schedule: Schedule, tokens: int) -> tuple:
    """What a build depends on: kernel, warps, stages; of each argument: is it constant, value or type, divisible."""
    key: list[Any] = [step.kernel, step.tile.warps, step.tile.stages]
    for name, role in _parameters(step.kernel):
        value = step.arguments[name]
        if isinstance(value, Amount):
            assert role == _VARIES, f"{step.kernel}: {name} depends on the number of tokens and is not among VARYING"
            value = value.of(tokens, cdiv(tokens, schedule.token_block) if schedule.token_block else 0)
        if role == _CONSTANT or value is None or (role == _ASKED and type(value) is int and value == 1):
            key.append((True, value, False))
        elif role == _POINTER:
            key.append((False, POINTERS[schedule.dtypes[value]] if isinstance(value, str) else _TABLE, True))
        else:
            key.append((False, _type_of(value), role == _ASKED and type(value) is int and value % 16 == 0))
    return tuple(key)


def _build(step: Launch, key: tuple, label: str, dtype: torch.dtype) -> Build:
    names = [name for name, _ in _parameters(step.kernel)]
    arguments, tile = list(zip(names, key[3:])), step.tile
    half, plain = dtype.itemsize == 2, step.kernel == "contract" and step.arguments["dy_ptr"] is not None
    return Build(
        step.kernel,
        f"{label} [{tile}]",
        {name: found for name, (constant, found, _) in arguments if not constant},
        frozenset(name for name, (_, _, divisible) in arguments if divisible),
        {name: found for name, (constant, found, _) in arguments if constant},
        tile.warps,
        tile.stages,
        matrix=half and (plain or step.kernel == "fused" or _multiplies_by_factors(step)),
        plain_loop=half and plain,
    )


def _multiplies_by_factors(step: Launch) -> bool:
    """Whether this is a token pass with products with low ranks in it."""
    return step.kernel == "token_pass" and (step.arguments["A"] == ADDED or step.arguments["THIN_B"])


def _type_of(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
