"""The direct launch: what is compiled once, what is handed over, and on which device; without a GPU."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from glora_kernels._triton import launch as module
from glora_kernels._triton.launch import launch, recorded
from glora_kernels.planning.settings import Tile

TILE = Tile(0, 16, 16, 4, 2)


@triton.jit
def toy_kernel(x_ptr, y_ptr, N, stride, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets * stride, tl.load(x_ptr + offsets), mask=offsets < N)


class FakeTensor:
    """A tensor on a device that is not there."""

    def __init__(self, pointer=0, dtype=torch.float32, index=0):
        self.pointer, self.dtype, self.device = pointer, dtype, SimpleNamespace(index=index)

    def data_ptr(self):
        return self.pointer


@pytest.fixture
def gpu(monkeypatch):
    """Two GPUs, 0 being current; what is compiled and launched on them is written down."""
    state = SimpleNamespace(current=0, compiled=[], launched=[])

    def compile_for(kernel, values, tile):
        state.compiled.append(values)
        number = len(state.compiled)

        def run(*arguments):
            state.launched.append((number, state.current, arguments))

        return SimpleNamespace(run=run, function=f"function {number}", packed_metadata="metadata")

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, state.current = state.current, self.index

        def __exit__(self, *_):
            state.current = self.before

    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: f"stream {device}"))
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "direct", True)
    monkeypatch.setattr(module, "compile_for", compile_for)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(triton.runtime, "driver", driver)
    return state


def run(x=None, y=None, grid=3, tile=TILE, n=10, stride=1, block=16):
    x, y = x or FakeTensor(), y or FakeTensor()
    launch(toy_kernel, grid, tile, x_ptr=x, y_ptr=y, N=n, stride=stride, BLOCK=block)
    return x, y


def test_what_is_handed_over(gpu):
    x, y = run()
    hooks = (None, None, None)
    expected = (3, 1, 1, "stream 0", "function 1", "metadata", *hooks, x, y, 10, 1, 16)
    assert gpu.launched == [(1, 0, expected)]


def test_compiled_once_for_the_same_numbers_and_types(gpu):
    run(FakeTensor(16))
    run(FakeTensor(32), grid=7)
    assert (len(gpu.compiled), len(gpu.launched)) == (1, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"n": 11},
        {"stride": 2},
        {"block": 32},
        {"tile": Tile(0, 16, 16, 8, 2)},
        {"x": FakeTensor(dtype=torch.bfloat16)},
        {"y": FakeTensor(pointer=8)},
        {"x": FakeTensor(index=1), "y": FakeTensor(index=1)},
    ],
    ids="-".join,
)
def test_anything_else_is_another_build(gpu, other):
    """Alignment too: a wide load from a pointer that is not aligned would fault."""
    run()
    run(**other)
    assert len(gpu.compiled) == 2
    run()
    run(**other)
    assert len(gpu.compiled) == 2


def test_runs_on_the_device_of_the_tensors(gpu):
    run(FakeTensor(index=1), FakeTensor(index=1))
    (_, current, arguments) = gpu.launched[0]
    assert (current, arguments[3], gpu.current) == (1, "stream 1", 0)


def test_absent_tensors_are_none(gpu):
    """Also the first: the device is that of one that is there."""
    y = FakeTensor(index=1)
    launch(toy_kernel, 1, TILE, x_ptr=None, y_ptr=y, N=1, stride=1, BLOCK=16)
    assert gpu.launched[0][1:] == (1, gpu.launched[0][2])
    assert gpu.launched[0][2][-5:] == (None, y, 1, 1, 16)


def test_arguments_in_another_order_are_refused(gpu):
    """They go by position: a swapped pair would be read as something else."""
    with pytest.raises(AssertionError, match=r"toy_kernel: expected \['x_ptr', 'y_ptr'.* got \['y_ptr', 'x_ptr'"):
        launch(toy_kernel, 1, TILE, y_ptr=FakeTensor(), x_ptr=FakeTensor(), N=1, stride=1, BLOCK=16)


def test_recorded_launches_do_not_run(gpu):
    with recorded() as found:
        x, y = run()
    assert not gpu.launched
    assert found[0].arguments == {"x_ptr": x, "y_ptr": y, "N": 10, "stride": 1, "BLOCK": 16}
    run()
    assert len(gpu.launched) == 1


class Changed:
    """A kernel of a Triton whose direct call is not what it was."""

    def __init__(self, missing):
        self.missing, self.public = missing, []
        self.fn, self.params, self.arg_names = toy_kernel.fn, toy_kernel.params, toy_kernel.arg_names

    def warmup(self, *values, grid, **options):
        if self.missing == "warmup":
            raise TypeError("warmup() got an unexpected keyword argument 'grid'")
        return SimpleNamespace(**{name: part for name, part in self.parts().items() if name != self.missing})

    def parts(self):
        def run(*arguments):
            raise TypeError(f"function takes exactly 20 arguments ({len(arguments)} given)")

        return {"run": run, "function": "function", "packed_metadata": "metadata"}

    def __getitem__(self, grid):
        return lambda *values, **options: self.public.append((grid, values, options))


@pytest.mark.parametrize("missing", ["run", "function", "packed_metadata", "warmup", "arguments"])
def test_another_direct_call_goes_the_public_way(monkeypatch, missing):
    """It is said once; the arguments are the same."""
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "direct", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    active = SimpleNamespace(get_current_stream=lambda device: f"stream {device}")
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    kernel, x, y = Changed(missing), FakeTensor(), FakeTensor()
    arguments = {"x_ptr": x, "y_ptr": y, "N": 10, "stride": 1, "BLOCK": 16}
    with pytest.warns(RuntimeWarning, match=r"cannot be called directly .*; every launch takes longer"):
        launch(kernel, 3, TILE, **arguments)
    launch(kernel, 3, TILE, **arguments)
    assert kernel.public == [((3,), (x, y, 10, 1, 16), {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True})] * 2
    with pytest.raises(AssertionError, match="toy_kernel: expected"):
        launch(kernel, 3, TILE, **{"y_ptr": y, **arguments})


def test_kernels_have_their_keys_before_any_is_launched():
    """In Triton 3.6 and 3.7 a key depends on what was known of other kernels at the time."""
    told = (
        "from glora_kernels._triton import launch; print([kernel.hash is None for kernel in launch.KERNELS.values()])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", told], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == str([False] * len(module.KERNELS)).split()
