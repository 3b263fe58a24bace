"""How to measure, as the options of ``pytest bench/`` say."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from glora_kernels.error_bound import PROMISED

from .shapes import SHAPE_SETS, ShapeSet
from .timing import ClockWatch, EventWatch, Watch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SEED = 0
EAGER, COMPILED, GRAPHS = MODES = ("eager", "compiled", "graphs")
# The largest relative error in the 2-norm of a whole model, of a training step and of inference. In half types deep
# models are far off, whoever computes them: check in fp32 first, then again with a looser tolerance.
STEP_TOLERANCES = {torch.float32: 2e-4, torch.float16: 1e-1, torch.bfloat16: 3e-1}
INFERENCE_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        shapes: names of shape sets.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: the type of weights and inputs.
        rounds: timed rounds of every interleaved run.
        clock: on a CPU, ``"wall"`` (the time that a user waits) or ``"cpu"`` (CPU time of the process).
        threads: torch's threads on a CPU.
        modes: in which a whole training step is timed.
        preparing: after so many seconds no further mode of it is prepared; None: all are.
    """

    shapes: tuple[str, ...] = ("small",)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    rounds: int = 7
    clock: str = "wall"
    threads: int = 1
    modes: tuple[str, ...] = MODES
    preparing: float | None = None

    @property
    def sets(self) -> dict[str, ShapeSet]:
        return {name: SHAPE_SETS[name] for name in self.shapes}

    @property
    def layer_tolerance(self) -> float:
        """The tolerance of the numerical contract, in units of u S."""
        return PROMISED[self.dtype]

    @property
    def step_tolerance(self) -> float:
        """The relative tolerance of a training step."""
        return STEP_TOLERANCES[self.dtype]

    @property
    def inference_tolerance(self) -> float:
        """The relative tolerance of inference."""
        return INFERENCE_TOLERANCES[self.dtype]

    def in_fp32(self) -> Settings:
        return replace(self, dtype=torch.float32)

    def watch(self) -> Watch:
        return EventWatch() if self.device != "cpu" else ClockWatch(CLOCKS[self.clock])

    def randn(self, *size: int) -> torch.Tensor:
        """Random numbers from torch's CPU generator, whatever the device."""
        return torch.randn(*size).to(self.device, self.dtype)
