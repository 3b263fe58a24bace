"""Every build that the gate compiles for sm_80 and sm_90 is executed, in a layer call that is held against the oracle.

Layers of real models are too large for that. A build does not depend on the size of a layer beyond what Triton asks of
a number, nor on the number of tokens beyond its class: so the layers here are small, and have the tiles of the real
number of tokens. That the builds are the same ones, their keys in Triton's cache say.
"""

from functools import cache
from unittest.mock import patch

import pytest
import torch
import triton

from glora_kernels._aot.compiling import compiled
from glora_kernels._aot.covering import cover, traits
from glora_kernels._aot.targets import gpu_named
from glora_kernels._triton.builds import Build, builds_of
from glora_kernels._triton.plan import plan
from glora_kernels._triton.shipped import cases_for, shipped
from glora_kernels.planning import schedule, settings
from glora_kernels.planning.cases import Case, Layer
from glora_kernels.planning.problem import LOW_RANK, keeps_output
from tests.compiled.driver import library
from tests.compiled.layers import Executed, executing, require_order
from tests.helpers import assert_contract, make_call, oracle, upstream
from tests.triton_host.keys import key_of

if library.fault() is not None:
    pytest.skip(f"no launches here: {library.fault()}", allow_module_level=True)

PARTS = 16  # tests for each architecture
SIZE, TOKENS = 256, 200  # at most


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_build_is_executed(architecture, part):
    for case in calls(architecture)[part::PARTS]:
        want = {key_of_build(build, architecture) for build in builds_of([case])}
        assert {one.key for one in execute_case(case)} == want, str(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_build_is_left_out(architecture):
    executed = set().union(*(map(traits, builds_of([case])) for case in calls(architecture)))
    assert executed == set(map(traits, shipped(architecture)))


@cache
def calls(architecture: str) -> list[Case]:
    """A few calls of small layers that launch every build."""
    found = list(dict.fromkeys(small(case.representative) for case in cases_for(architecture)))
    return [found[place] for place in cover([frozenset(map(traits, builds_of([case]))) for case in found])]


def small(case: Case) -> Case:
    outputs, inputs, bias = case.layer
    return case._replace(layer=Layer(min(outputs, SIZE), min(inputs, SIZE), bias))


def key_of_build(build: Build, architecture: str) -> str:
    with patch.object(triton.runtime.driver, "_active", None):
        return key_of(compiled, build, gpu_named(architecture.replace("sm_", "cuda:")))


def execute_case(case: Case) -> list[Executed]:
    """Forward and backward with few tokens and the tiles of many, within the contract and without a hazard."""
    kinds = tuple(f"lora_{rank}" if kind == LOW_RANK else kind for kind, rank in case.path)
    shape = (min(case.tokens, TOKENS), case.layer.outputs, case.layer.inputs)
    types = {"dtype": case.dtype, "terms_dtype": case.factors, "storage_rank": case.rank}
    x, weight, bias, terms = make_call(kinds, shape, bias=case.layer.bias, product=case.product, **types)
    x.requires_grad_(case.wants_x)
    dy = upstream((x, weight))
    of_many = settings.class_of(case.architecture, case.tokens)
    with executing(case.architecture) as done, torch.no_grad(), patch.object(schedule, "class_of", lambda *_: of_many):
        planned = plan(weight, bias, terms, case.problem.wanted, case.wants_x, case.strategy)
        storages, _ = terms.flatten()
        y, projected, b_eff = planned.forward(x, weight, bias, storages)
        output = y if case.keeps_output and keeps_output(case.problem, case.tokens) else None
        dx, grads = planned.backward(dy, x, weight, bias, storages, output, b_eff, projected, None)
    names = [f"{slot}{number}" for slot, term in terms.active for number in range(len(term.storages))]
    got = {"y": y, **({"x": dx} if case.wants_x else {}), **dict(zip(names, grads))}
    assert_contract(got, *oracle(x, weight, bias, terms, dy), case.dtype)
    require_order(done)
    return done
