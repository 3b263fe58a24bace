"""The predicted time of each strategy of the Triton backend, from shapes, kinds, types and architecture alone.

``schedule.py`` lists every launch of a call, forward and backward; ``prices.py`` adds its operations and its bytes of
device memory. A launch is predicted to take

    overhead + max(flops / rate, bytes / bandwidth)

seconds. A dense product runs in waves of tiles over the processors (``durations.py``). The figures of each machine are
in ``machines.py``; none of them has been measured by us.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .durations import seconds
from .machines import machine_for
from .prices import PricedLaunch, priced, scratch_bytes
from .problem import Problem, keeps_output
from .schedule import Call, Schedule, backward, forward
from .settings import forced_now

STRATEGIES = ("assemble", "fused")
WINS = 0.98  # fused is taken below this share of assemble's time: the vendor's rate is known better
REMEMBERED = 1 << 15  # problems


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a call, forward and backward, by one strategy.

    Attributes:
        strategy: ``"assemble"`` or ``"fused"``.
        forward, backward: the launches, in order.
        forward_seconds, backward_seconds: the time of the launches on the device. Host time is not counted: where it
            is longer, as with few tokens in eager mode, the number of launches decides.
        scratch_bytes: the larger of forward and backward: see :func:`~glora_kernels.planning.prices.scratch_bytes`.
    """

    strategy: str
    forward: tuple[PricedLaunch, ...]
    backward: tuple[PricedLaunch, ...]
    forward_seconds: float
    backward_seconds: float
    scratch_bytes: int

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


def strategy_for(problem: Problem, tokens: int) -> str:
    """The strategy that is predicted to be faster over forward and backward; assemble where the two are close.

    The number of tokens is rounded to four significant bits, so that batches of many lengths share their decisions.

    Raises:
        ValueError: neither the architecture nor an older one of its family is known.
    """
    return _faster(problem.whole, rounded(tokens), forced_now())


@lru_cache(maxsize=REMEMBERED)
def _faster(problem: Problem, tokens: int, forced: tuple) -> str:
    """``forced`` are the tiles in force, which the sizes of partial sums depend on."""
    assemble, fused = (predict(problem, tokens, strategy).seconds for strategy in STRATEGIES)
    return "fused" if fused < WINS * assemble else "assemble"


def rounded(tokens: int) -> int:
    """The nearest number of four significant bits, which is less than 7% away."""
    step = 1 << max(0, tokens.bit_length() - 4)
    return (tokens + step // 2) // step * step


def predict(problem: Problem, tokens: int, strategy: str) -> Prediction:
    """The launches of a strategy and their predicted times; raises as :func:`strategy_for` does."""
    machine = machine_for(problem.architecture)
    schedules = schedules_of(problem, tokens, strategy)
    ahead, behind = (tuple(priced(schedule, problem, tokens)) for schedule in schedules)
    there, back = (sum(seconds(launch, problem, machine) for launch in part) for part in (ahead, behind))
    scratch = max(scratch_bytes(schedule, tokens) for schedule in schedules)
    return Prediction(strategy, ahead, behind, there, back, scratch)


def schedules_of(problem: Problem, tokens: int, strategy: str) -> tuple[Schedule, Schedule]:
    """Forward and backward for contiguous operands; the output is kept wherever that can pay off."""
    call = Call.of(problem, strategy, tokens, output=keeps_output(problem, tokens))
    return forward(problem, call), backward(problem, call)
