"""Errors planted in a layer's launches: tests of layers see each of them."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from glora_kernels import glora_linear
from glora_kernels._triton import launch as launching
from glora_kernels._triton import run as running
from tests.compiled import layers
from tests.compiled.driver import library
from tests.compiled.driver.device import absent_gpu
from tests.compiled.instructions import code_of
from tests.compiled.machine.faults import Fault
from tests.compiled.machine.program import Program
from tests.helpers import make_call

if library.fault() is not None:
    pytest.skip(f"no launches here: {library.fault()}", allow_module_level=True)

NEEDS_FENCES = pytest.mark.skipif(layers.TRITON < (3, 8), reason="this Triton leaves some out itself (layers.py)")
KINDS = ("lora_3", "lora_3", "vector", "vector", "constant")


def call():
    return make_call(KINDS, (150, 136, 208), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("architecture", "strategy", "form", "seen"),
    [
        ("sm_80", "assemble", "bar.sync", "without a barrier"),
        ("sm_80", "fused", "bar.sync", "without a barrier"),
        ("sm_80", "fused", "cp.async.wait_group", "nan"),
        ("sm_90", "assemble", "bar.sync", "without a barrier"),
        ("sm_90", "assemble", "wgmma.wait_group", "a product in flight"),
        pytest.param("sm_90", "assemble", "fence.proxy", "without fence.proxy.async", marks=NEEDS_FENCES),
        ("sm_90", "fused", "cp.async.wait_group", "nan"),
    ],
)
def test_instructions_left_out(architecture, strategy, form, seen):
    left_out = []

    def without(ptx):
        program = Program(ptx)
        for place, block in enumerate(program.blocks):
            program.blocks[place] = [one for one in block if not one.form.startswith(form)]
            left_out.append(len(block) - len(program.blocks[place]))
        return code_of(program)

    with patch.object(layers, "decoded", without):
        noticed(architecture, strategy, seen)
    assert sum(left_out), f"expected some {form}, got none"


@pytest.mark.parametrize(
    ("kernel", "name", "by", "seen"),
    [
        ("assemble", "N", 1, "out of bounds.*of a_ptr"),
        ("assemble", "stride_wn", 8, "out of bounds.*of w_ptr"),
        ("token_pass", "at_db", 16, "error over"),
        ("finish", "slices", 1, "out of bounds.*of partials_ptr"),
        ("finish", "jobs", 1, "out of bounds.*of table_ptr"),
    ],
)
def test_arguments_that_are_wrong(kernel, name, by, seen):
    with arguments_changed(kernel, name, by) as changed:
        noticed("sm_90", "assemble", seen)
    assert changed, f"expected launches of {kernel}, got none"


@contextmanager
def arguments_changed(kernel, name, by):
    changed = []

    def change(launch):
        source = launch.kernel.src
        if launch.name != kernel:
            return launch
        passed = [other for place, other in enumerate(source.fn.arg_names) if (place,) not in source.constants]
        values = [value + by * (passed[place : place + 1] == [name]) for place, value in enumerate(launch.values)]
        changed.append(name)
        return launch._replace(values=tuple(values))

    def absent(architecture, on_launch, strategy):
        return absent_gpu(architecture, lambda launch: on_launch(change(launch)), strategy)

    with patch.object(layers, "absent_gpu", absent):
        yield changed


def test_a_launch_that_does_not_ask_for_alignment():
    x, weight, bias, terms = call()
    moved = torch.zeros(x.numel() + 4, dtype=x.dtype)[4:].view(x.shape)
    with (
        patch.object(launching, "ALIGNMENT", 1),
        patch.object(running, "ALIGNMENT", 1),
        layers.executing("sm_90", "fused"),
        torch.no_grad(),
    ):
        glora_linear(x, weight, bias, terms)
        with pytest.raises(Fault, match="misaligned access of 16 bytes"):
            glora_linear(moved, weight, bias, terms)


def noticed(architecture, strategy, seen):
    with pytest.raises((Fault, AssertionError), match=seen):
        layers.check(call(), architecture, strategy)
