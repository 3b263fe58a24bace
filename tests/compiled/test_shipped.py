"""Every build that the gate compiles for sm_80 and sm_90 is executed, in a layer call that is held against the oracle.

The calls are those of ``tests/shipped_calls.py``. That the builds are the same ones, their keys in Triton's cache say.
"""

from unittest.mock import patch

import pytest
import triton

from glora_kernels._aot.compiling import compiled
from glora_kernels._aot.covering import traits
from glora_kernels._aot.targets import gpu_named
from glora_kernels._triton.builds import Build, builds_of
from glora_kernels._triton.shipped import shipped
from glora_kernels.planning.cases import Case
from tests.compiled.driver import library
from tests.compiled.layers import Executed, executing, require_order
from tests.shipped_calls import calls, check_case
from tests.triton_host.keys import key_of

if library.fault() is not None:
    pytest.skip(f"no launches here: {library.fault()}", allow_module_level=True)

PARTS = 16  # tests for each architecture


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


def key_of_build(build: Build, architecture: str) -> str:
    with patch.object(triton.runtime.driver, "_active", None):
        return key_of(compiled, build, gpu_named(architecture.replace("sm_", "cuda:")))


def execute_case(case: Case) -> list[Executed]:
    with executing(case.architecture) as done:
        check_case(case)
    require_order(done)
    return done
