"""An H200 that is not there, for a whole process: what asks torch for a GPU gets the CPU, with that GPU's answers.

Layers plan, compile and launch as on the GPU, over the stub of libcuda (``tests.compiled.driver``). Nothing executes
kernels: results are those of the torch backend. So everything is rehearsed but the arithmetic of kernels, and time.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim import adam
from torch.overrides import TorchFunctionMode

from bench.gpu.rehearsal import HANG, WRONG, fault
from glora.graphs import capture
from glora_kernels import Terms, _cuda, _torch, dispatch
from glora_kernels._triton.plan import TritonPlan
from glora_kernels.backend import ForwardResult, Plan
from tests.compiled.driver.device import Launch, absent_gpu
from tests.graph_emulation import EmulatedGraphs, Recorder

ARCHITECTURE = "sm_90"
HANGS_AT = 20  # launches; before it, a part has something to write
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200, absent",
    major=9,
    minor=0,
    total_memory=150 << 30,
    multi_processor_count=132,
    L2_cache_size=60 << 20,
)
_state = SimpleNamespace(launches=0, is_capturing=False)
_entered = ExitStack()  # never left


@cache
def enter() -> None:
    """From now on this process has an absent GPU."""
    _entered.enter_context(absent_gpu(ARCHITECTURE, _launched))
    _entered.enter_context(_OnCpu())
    for name, stand_in in _STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    torch.Generator = _Generator  # type: ignore[misc]
    torch.compile = lambda function=None, **_: function if function is not None else torch.compile
    _emulate_graphs()
    _give_results()
    adam._get_capturable_supported_devices = lambda supports_xla=True: ["cpu"]
    _give_extension()


def hang() -> None:
    """Never return, and hear no interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        time.sleep(60)


def _launched(_: Launch | None = None) -> None:
    _state.launches += 1
    if fault() == WRONG and sys.argv[0].endswith("/tune.py"):
        raise RuntimeError("a launch that fails")  # the tuner does not look at results
    if fault() == HANG and _state.launches >= HANGS_AT:
        hang()


class _OnCpu(TorchFunctionMode):
    """Puts tensors on the CPU that are asked for on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if _is_gpu(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.to:
            args = tuple("cpu" if _is_gpu(one) else one for one in args)
        return function(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class _Generator(torch.Generator):
    def __new__(cls, device: str | torch.device = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if _is_gpu(device) else device)


# Results ------------------------------------------------------------------------------------------------------------


class _Results:
    """A plan without a GPU: what the torch backend finds, spoilt in y and W_eff if that is the fault to be shown."""

    reads_token_sums = False

    def __init__(self, plan: Plan, assembles: bool):
        self._plan, self._assembles = plan, assembles

    def forward(self, x, weight, bias, storages):
        if self._assembles:  # a merged layer has the same bits
            y = torch.nn.functional.linear(x, *self._plan.assemble(weight, bias, storages))
        else:
            y = self._plan.forward(x, weight, bias, storages).y
        return ForwardResult(_spoilt(y), None, None)

    def backward(self, dy, x, weight, bias, storages, *at_hand):
        # Without what is at hand: it is what launches left, and with it the host would look at values.
        return self._plan.backward(dy, x, weight, bias, storages, None, None, None, None)

    def assemble(self, weight, bias, storages):
        w_eff, b_eff = self._plan.assemble(weight, bias, storages)
        return _spoilt(w_eff), b_eff


def _spoilt(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1.5 if fault() == WRONG else tensor


def _give_results() -> None:
    """Let plans launch, and then return results."""

    def launching(name: str) -> Any:
        launched = getattr(TritonPlan, name)
        first = {"forward": 1, "backward": 2, "assemble": 0}[name]

        def run(self, *operands):
            found = launched(self, *operands)
            (weight, bias, storages), problem = operands[first : first + 3], self.problem
            wanted = problem.wanted - {"D"} if bias is None else problem.wanted
            plan = _torch.plan(weight, bias, Terms.unflatten(storages, problem.structure), wanted, problem.wants_x)
            results = getattr(_Results(plan, self.strategy == "assemble"), name)(*operands)
            return found._replace(y=results.y) if name == "forward" else results

        return run

    for name in ("forward", "backward", "assemble"):
        setattr(TritonPlan, name, launching(name))


class _Extension:
    whole_layer = None
    reads_values = False

    def plan(self, weight, bias, terms, wanted, wants_x):
        _launched()
        return _Results(_torch.plan(weight, bias, terms, wanted, wants_x), assembles=True)


def _give_extension() -> None:
    """Let the extension seem to be built."""
    dispatch._extension_fault = lambda: None
    dispatch._extension_unfit = lambda weight: dispatch.triton_unfit(weight, Terms())
    _cuda.ExtensionBackend = _Extension  # type: ignore[misc]


# torch.cuda ---------------------------------------------------------------------------------------------------------


class _Event:
    def __init__(self, **_: Any):
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end._at - self._at)


class _Stream:
    def __init__(self, *_: Any, **__: Any):
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Graph:
    def replay(self) -> None:
        self.recorder.replay()


@contextmanager
def _capturing(graph: _Graph, **_: Any) -> Iterator[None]:
    _state.is_capturing = True
    try:
        with Recorder() as graph.recorder:
            yield
    finally:
        _state.is_capturing = False


def _emulate_graphs() -> None:
    graphs = EmulatedGraphs()
    capture.CudaGraphs.warm_up = lambda _, function: graphs.warm_up(function)
    capture.CudaGraphs.capture = lambda _, function: graphs.capture(function)
    capture.CudaGraphs.capture_pieces = lambda _, pieces, inputs: graphs.capture_pieces(pieces, inputs)
    capture.graphs_for.__code__ = _graphs_for.__code__  # in every module that has it by name


def _graphs_for(device: torch.device) -> capture.CudaGraphs:
    return CudaGraphs(device)  # noqa: F821  (a name of the module that this is put into)


_STAND_INS: dict[str, Any] = {
    "CUDAGraph": _Graph,
    "Event": _Event,
    "Stream": _Stream,
    "current_stream": lambda device=None: _Stream(),
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "graph": _capturing,
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: _state.is_capturing,
    "is_initialized": lambda: True,
    "max_memory_allocated": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "stream": lambda stream: nullcontext(),
    "synchronize": lambda device=None: None,
}
