"""What is compiled ahead of time is what is launched; and how many launches a layer makes, dense products included."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glora_kernels._triton import builds
from glora_kernels._triton.builds import Case, launches_of, shipped
from glora_kernels._triton.device import pretended
from glora_kernels._triton.launch import recorded

KINDS = ("lora", "vector", "constant", "none")
# What only makes or looks at memory.
NO_LAUNCH = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "t", "transpose", "slice", "detach", "reshape"}


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
