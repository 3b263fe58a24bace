"""Layer calls whose kernels are executed as compiled, through Triton's own launcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton

from glora_kernels import glora_linear, glora_merge, use_backend
from tests.helpers import assert_contract, oracle, results, unwritten_is_nan, upstream

from .driver.device import Launch, absent_gpu
from .machine.faults import Hazards
from .running import decoded, execute

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


class HazardError(AssertionError):
    """Launches have noted hazards."""


class Executed(NamedTuple):
    """A launch that was executed.

    Attributes:
        kernel: its name, such as ``"fused"``.
        key: of its build in Triton's cache.
    """

    kernel: str
    key: str
    hazards: Hazards


@contextmanager
def executing(architecture: str, strategy: str | None = None) -> Iterator[list[Executed]]:
    """Inside, layers on CPU tensors run their compiled kernels, instruction by instruction; the list grows."""
    done: list[Executed] = []

    def run(launch: Launch) -> None:
        code = decoded(launch.kernel.asm["ptx"])
        hazards = execute(code, launch.grid[0], launch.values, launch.shared, launch.tensors)
        done.append(Executed(launch.name, launch.kernel.hash, hazards))

    with unwritten_is_nan(), absent_gpu(architecture, run, strategy), use_backend("triton", strategy=strategy):
        yield done


def check(call, architecture: str, strategy: str, dy: torch.Tensor | None = None) -> list[Executed]:
    """Forward and every gradient against the oracle, under the numerical contract, without a hazard."""
    dy = upstream(call) if dy is None else dy
    with executing(architecture, strategy) as done:
        got = results(glora_linear, *call, dy)
    assert_contract(got, *oracle(*call, dy), call[0].dtype)
    require_order(done)
    return done


def check_merging(call, architecture: str) -> list[Executed]:
    """The merged weight and bias are the bits that the assembled layer multiplies by, and y is that of the oracle."""
    x, weight, bias, terms = call
    with executing(architecture, "assemble") as done, torch.no_grad():
        merged = glora_merge(weight, bias, terms)
        y = glora_linear(x, weight, bias, terms)
    assert torch.equal(torch.nn.functional.linear(x, *merged), y)
    want, scale = oracle(*call, upstream(call))
    assert_contract({"y": y}, {"y": want["y"]}, scale, x.dtype)
    require_order(done)
    return done


def require_order(done: list[Executed]) -> None:
    assert done, "expected launches, got none"
    seen = [f"{one.kernel}: {hazard}" for one in done for hazard in one.hazards if not _of_the_compiler(hazard)]
    if seen:
        raise HazardError("\n".join(seen))


def _of_the_compiler(hazard: str) -> bool:
    """Whether Triton is known to leave out this order: before 3.8, a proxy fence behind copies (triton#9610)."""
    return TRITON < (3, 8) and hazard.startswith("a matrix unit reads what was written, without fence.proxy.async")
