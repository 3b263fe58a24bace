"""The predicted time of each strategy of the Triton backend, from shapes, kinds, types and architecture alone.

``launches.py`` lists every launch of a call, forward and backward, with its operations and its bytes of device memory.
A launch is predicted to take

    overhead + max(flops / rate, bytes / bandwidth)

seconds. A dense product runs in waves of tiles over the processors (``durations.py``). The figures of each machine are
in ``machines.py``; none of them has been measured by us. The lists follow ``_triton/forward.py`` and
``_triton/backward.py``, and a test compares them with what those launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .durations import seconds
from .launches import PricedLaunch, launches, scratch_bytes
from .machines import machine_for
from .problem import Problem

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
        scratch_bytes: see :func:`scratch_bytes`.
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


@lru_cache(maxsize=REMEMBERED)
def strategy_for(problem: Problem) -> str:
    """The strategy that is predicted to be faster over forward and backward; assemble where the two are close.

    The number of tokens is rounded to four significant bits, so that batches of many lengths share their decisions.

    Raises:
        ValueError: neither the architecture nor an older one of its family is known.
    """
    return _faster(problem._replace(tokens=rounded(problem.tokens)))


@lru_cache(maxsize=REMEMBERED)
def _faster(problem: Problem) -> str:
    assemble, fused = (predict(problem, strategy).seconds for strategy in STRATEGIES)
    return "fused" if fused < WINS * assemble else "assemble"


def rounded(tokens: int) -> int:
    """The nearest number of four significant bits, which is less than 7% away."""
    step = 1 << max(0, tokens.bit_length() - 4)
    return (tokens + step // 2) // step * step


def predict(problem: Problem, strategy: str) -> Prediction:
    """The launches of a strategy and their predicted times; raises as :func:`strategy_for` does."""
    machine = machine_for(problem.architecture)
    forward, backward = launches(problem, strategy)
    there, back = (sum(seconds(launch, problem, machine) for launch in part) for part in (forward, backward))
    return Prediction(strategy, tuple(forward), tuple(backward), there, back, scratch_bytes(problem, strategy))
