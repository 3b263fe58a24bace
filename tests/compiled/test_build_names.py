"""Short names of builds (``bench/gpu/builds.py``): the same for what is listed and for what is compiled for a launch."""

from types import SimpleNamespace

import pytest
from triton.runtime.jit import JITFunction

from bench.gpu.builds import is_ours, name_of, name_of_source
from glora_kernels._triton.builds import builds_of
from glora_kernels._triton.shipped import shipped
from tests.compiled.driver import library
from tests.compiled.driver.device import absent_gpu
from tests.shipped_calls import calls, check_case

if library.fault() is not None:
    pytest.skip(f"no launches here: {library.fault()}", allow_module_level=True)

ARCHITECTURE = "sm_90"


@pytest.mark.parametrize("number", range(0, 114, 28))
def test_names_of_launches_are_those_of_the_list(number):
    case, launched = calls(ARCHITECTURE)[number], []
    with absent_gpu(ARCHITECTURE, lambda launch: launched.append(launch.kernel)), pytest.raises(AssertionError):
        check_case(case)  # nothing is computed
    assert all(is_ours(kernel.src) for kernel in launched)
    names = {name_of_source(kernel.src, kernel.metadata._asdict()) for kernel in launched}
    assert names == set(map(name_of, builds_of([case])))


def test_no_two_builds_have_one_name():
    listed = shipped(ARCHITECTURE)
    assert len(set(map(name_of, listed))) == len(listed)


def test_others_kernels_are_not_ours():
    assert not is_ours(SimpleNamespace(fn=JITFunction(test_others_kernels_are_not_ours))) and not is_ours(object())
