"""The keys by which Triton's cache keeps kernels: layers must ask for what was compiled ahead of time.

    python -m tests.triton_host.keys

Layers of a ViT-B take random paths on tensors without memory: every kernel that they would launch is asked for as on a
GPU, up to the look-up in the cache. The keys must be those of the builds that are listed for these calls. Prints, for
each architecture, how many keys were asked for. For another Triton: ``PYTHONPATH=.venv/triton-3.6.0``.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from triton.compiler import compiler
from triton.runtime import driver

import glora
from bench import stubbed
from glora.config import make_path
from glora_kernels._aot.compiling import AbsentGPU, compiled
from glora_kernels._aot.targets import architecture_of, gpu_named
from glora_kernels._triton import launch, plan
from glora_kernels._triton.builds import builds_of
from glora_kernels.ops import autograd, prepared
from glora_kernels.planning.cases import Layer, Path, cases, paths
from glora_kernels.planning.problem import LOW_RANK
from glora_kernels.terms import PRODUCTS

SHAPES = ((2304, 768), (768, 3072))
RANKS = (8, 4)
TOKENS = {"assemble": 12608, "fused": 64}


class AskedError(Exception):
    """Triton has asked its cache for a kernel."""


def key_of(compile_one: Callable[..., Any], *arguments: Any) -> str:
    """The key under which a kernel is looked for in the cache; nothing is compiled."""

    def ask(key: str) -> None:
        raise AskedError(key)

    with patch.object(compiler, "get_cache_manager", ask):
        try:
            compile_one(*arguments)
        except AskedError as found:
            return str(found)
    raise AssertionError("expected that the cache is asked")


@contextmanager
def noted(gpu: Any, strategy: str, keeps: bool) -> Iterator[set[str]]:
    """The keys of the kernels that layers would launch inside the block."""
    found: set[str] = set()
    compile_one = launch.compile_for

    def compile_for(*arguments: Any) -> Any:
        found.add(key_of(compile_one, *arguments))
        return stubbed.COMPILED

    driver.set_active(AbsentGPU(gpu))  # type: ignore[arg-type]
    with (
        patch.object(stubbed, "ARCHITECTURE", architecture_of(gpu)),
        stubbed.stubbed(strategy),
        patch.object(launch, "compile_for", compile_for),
        patch.object(launch, "_compiled", {}),
        patch.object(plan, "_plan", cache(plan._plan.__wrapped__)),
        patch.object(prepared, "_runs", {}),
        patch.object(autograd, "_can_be_kept", lambda *_: keeps),  # what has no values is not kept otherwise
    ):
        yield found


def train(product: str, taken: list[Path], tokens: int) -> None:
    """Each layer on each path, where x wants a gradient and where not."""
    for outputs, inputs in SHAPES:
        on_meta = {"device": "meta", "dtype": torch.bfloat16}
        layer = glora.GLoRALinear(inputs, outputs, rank=max(RANKS), product=product, **on_meta)
        for path, wanted in itertools.product(taken, (True, False)):
            layer.path = make_path(*(f"lora_{rank}" if kind == LOW_RANK else kind for kind, rank in path))
            y = layer(torch.empty(tokens, inputs, requires_grad=wanted, **on_meta))
            if y.requires_grad:
                y.backward(torch.empty_like(y))


def asked(gpu: Any, product: str, strategy: str, tokens: int, keeps: bool, taken: list[Path]) -> int:
    """How many keys layers ask for; they are those of the builds for the same calls."""
    with noted(gpu, strategy, keeps) as launched:
        train(product, taken, tokens)
    calls = [(Layer(*shape), tokens) for shape in SHAPES]
    types = {"dtype": torch.bfloat16, "factors": torch.float32, "architecture": architecture_of(gpu)}
    grads = {"wants_x": (True, False), "keeps_output": (keeps,)}
    builds = builds_of(cases(calls, taken, [strategy], rank=max(RANKS), product=product, **types, **grads))
    ahead = [key_of(compiled, build, gpu) for build in builds]
    assert len(set(ahead)) == len(ahead), f"{len(ahead)} builds with {len(set(ahead))} keys"
    assert launched == set(ahead), f"{len(launched)} keys, {len(launched - set(ahead))} of them not compiled ahead"
    return len(launched)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.triton_host.keys", description="Compare cache keys.")
    parser.add_argument("--paths", type=int, default=40, metavar="N", help="how many are drawn")
    taken = random.Random(0).sample(list(paths(RANKS)), parser.parse_args(argv).paths)
    for name in ("cuda:80", "cuda:90", "hip:gfx942"):
        calls = itertools.product(PRODUCTS, TOKENS.items(), (True, False))
        counts = [asked(gpu_named(name), product, *call, keeps, taken) for product, call, keeps in calls]
        print(name, sum(counts))


if __name__ == "__main__":
    main()
