"""What is compiled ahead of time is what is launched; and how many launches a layer makes, dense products included."""

import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glora_kernels._triton import builds
from glora_kernels._triton.builds import Case, launches_of, shipped
from glora_kernels._triton.device import pretended
from glora_kernels._triton.launch import recorded

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("lora", "vector", "constant", "none")
# What only makes or looks at memory.
NO_LAUNCH = {
    "empty",
    "new_empty",
    "empty_like",
    "as_strided",
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "slice",
    "detach",
    "reshape",
}


class Operations(TorchDispatchMode):
    """The names of all PyTorch operations that would run on the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("strategy", ["assemble", "fused"])
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("c", ["lora", "vector", "none"])
def test_launches_a_layer(c, product, strategy, monkeypatch):
    """At most 3 forward and 5 backward for every kind of A and B; nothing but kernels and dense products."""
    monkeypatch.setattr(builds, "recorded", counting)
    for a, b in itertools.product(KINDS, KINDS):
        case = Case(torch.bfloat16, torch.float32, product, a, b, c, 4096, 8, strategy)
        with pretended("sm_90"):
            forward, backward = launches_of(case)
        assert {str(name) for name in (*forward, *backward) if isinstance(name, str)} <= {"addmm", "mm"}, case
        assert 1 <= len(forward) <= 3, (case, forward)
        assert 2 <= len(backward) <= 5, (case, backward)


@contextmanager
def counting():
    """Launches, and dense products beside them."""
    with recorded() as launches, Operations() as operations:
        yield launches
    launches += operations.found


def test_builds_are_the_same_in_every_process():
    first, second = shipped("cuda:90"), shipped("cuda:90")
    assert [build.label for build in first] == [build.label for build in second]
    assert len({build.label for build in first}) == len(first)


def test_every_argument_is_said_once():
    for build in shipped("hip:gfx942"):
        assert set(build.signature) | set(build.constexprs) == set(build.kernel.arg_names)
        assert not set(build.signature) & set(build.constexprs)
        assert build.divisible <= set(build.signature)


def test_numbers_that_vary_are_not_built_in():
    """Tokens, ranks and places in the buffer change from call to call."""
    for build in shipped("cuda:80"):
        for name in ("M", "rank_a", "rank_b", "rank_c", "slices", "at_db", "at_a", "jobs"):
            assert name not in build.constexprs
            assert name not in build.divisible


AS_LAUNCHED = """
import torch
from triton.runtime.jit import JITFunction
from glora_kernels._aot.compiling import compiled
from glora_kernels._aot.targets import target_named
from glora_kernels._triton.builds import Case, build_of, launches_of
from glora_kernels._triton.device import pretended
from glora_kernels._triton.launch import compile_for

class Source:
    def __init__(self, *what): self.what = what

JITFunction._do_compile = lambda self, key, *rest: self.device_caches[rest[1]][0].setdefault(key, Source(key, *rest))
count = 0
for target, architecture in (("cuda:80", "sm_80"), ("cuda:90", "sm_90"), ("hip:gfx942", "gfx942")):
    for strategy in ("assemble", "fused"):
        for a, b in (("lora", "vector"), ("vector", "lora"), ("constant", "none")):
            case = Case(torch.bfloat16, torch.float32, "hadamard", a, b, "lora", 4096, 8, strategy)
            with pretended(architecture):
                forward, backward = launches_of(case)
            for launch in (*forward, *backward):
                ahead = compiled(build_of(launch, "label"), target_named(target))
                launched = compile_for(launch.kernel, tuple(launch.arguments.values()), launch.tile)
                assert ahead is launched, (target, case, launch.kernel.__name__, ahead.what, launched.what)
                count += 1
print(count)
"""


def test_the_gate_compiles_under_the_key_of_a_launch():
    """Triton finds what the gate has compiled by what a launch asks for; nothing is compiled here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", AS_LAUNCHED], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 50
