"""bench/stubbed.py: calls reach the launcher of the Triton route on a CPU, and nothing is left of it afterwards."""

import os
import subprocess
import sys

import pytest
import torch

from bench.stubbed import does_nothing, fault, stubbed
from glora import GLoRALinear
from glora_kernels import dispatch
from glora_kernels.ops import prepared


def launches_of(layer):
    """How often forward and backward call the compiled kernel."""
    count = 0

    def follow(_frame, event, argument):
        nonlocal count
        count += event == "c_call" and argument == does_nothing

    sys.setprofile(follow)
    try:
        layer(torch.ones(8, 32, requires_grad=True)).backward(torch.ones(8, 32))
    finally:
        sys.setprofile(None)
    return count


def test_calls_reach_the_launches_in_the_block_alone():
    if fault() is not None:
        pytest.skip(fault())
    before = torch.cuda.current_device, dispatch.automatic, prepared.automatic
    with pytest.raises(ZeroDivisionError), stubbed():
        layer = GLoRALinear(32, 32)
        assert launches_of(layer) > 2  # without what is prepared, and with it
        assert launches_of(layer) > 2
        raise ZeroDivisionError
    assert (torch.cuda.current_device, dispatch.automatic, prepared.automatic) == before
    assert launches_of(GLoRALinear(32, 32)) == 0


def test_interpreted_kernels_are_refused():
    code = "from bench.stubbed import stubbed\nwith stubbed(): pass"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "RuntimeError: stubbed: " in done.stderr
