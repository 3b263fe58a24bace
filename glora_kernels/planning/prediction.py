"""What each strategy of the Triton backend would take: a pure function of shapes, kinds, types and architecture.

Every launch of a step is listed with its operations and its bytes of device memory, and is predicted to take

    overhead + max(flops / rate, bytes / bandwidth)

seconds. A dense product runs in waves of tiles over the processors (:func:`_product_seconds`). The numbers of each
machine are in ``machines.py``; nothing here has been measured by us. The lists follow ``_triton/forward.py`` and
``_triton/passes.py``, and a test compares them with what those launch.

M tokens, N out, K in, R rank. This module loads no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .durations import seconds
from .launches import PricedLaunch, launches, scratch_bytes
from .machines import machine_for
from .problem import Problem

WINS = 0.98  # fused is taken below this share of assemble's time: the rate of the vendor's library is the surer one
REMEMBERED = 1 << 15  # problems


@dataclass(frozen=True)
class Prediction:
    """What a step would take by one strategy.

    Attributes:
        strategy: ``"assemble"`` or ``"fused"``.
        forward, backward: the launches, in order.
        forward_seconds, backward_seconds: what they take on the device. Host time is not in it: where it is longer,
            as with few tokens in eager mode, the number of launches decides.
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
    """The strategy that is predicted to be faster over forward and backward; assemble where they are close.

    Decided for the tokens rounded to four significant bits, so that batches of many lengths share their decisions.

    Raises:
        ValueError: nothing is known of the architecture or of an older one of its family.
    """
    return _faster(problem._replace(tokens=rounded(problem.tokens)))


@lru_cache(maxsize=REMEMBERED)
def _faster(problem: Problem) -> str:
    assemble, fused = (predict(problem, strategy).seconds for strategy in STRATEGIES)
    return "fused" if fused < WINS * assemble else "assemble"


def rounded(tokens: int) -> int:
    """To the nearest number of four significant bits, by less than 7%."""
    step = 1 << max(0, tokens.bit_length() - 4)
    return (tokens + step // 2) // step * step


def predict(problem: Problem, strategy: str) -> Prediction:
    """The launches of a strategy and what they would take; ValueError as in :func:`strategy_for`."""
    machine = machine_for(problem.architecture)
    forward, backward = launches(problem, strategy)
    there, back = (sum(seconds(launch, problem, machine) for launch in part) for part in (forward, backward))
    return Prediction(strategy, tuple(forward), tuple(backward), there, back, scratch_bytes(problem, strategy))


# Forward.


# Backward.


# Partial sums, bytes. A pass writes one slice for each of its blocks of tokens, rows or columns.


# Time.


STRATEGIES = ("assemble", "fused")
