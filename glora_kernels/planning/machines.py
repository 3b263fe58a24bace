"""The figures of GPUs that the cost model needs, and the architecture that stands in for an unknown one. Pure data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

INTERPRETER = "interpreter"
INTERPRETED_AS = "sm_90"  # Triton's interpreter has no speed of its own to predict


@dataclass(frozen=True)
class Machine:
    """The figures of an architecture that the cost model needs.

    Attributes:
        processors: multiprocessors (compute units).
        half, single: FLOP/s that the vendor's BLAS reaches in half types and in fp32. TF32 reaches half of ``half``.
        triton: the rate of a plain product written in Triton, as a share of the vendor's rate.
        assembled: the same share for a product whose operand is formed in registers.
        bandwidth: bytes/s of device memory.
        cache, cache_bandwidth: a launch of fewer bytes than ``cache`` moves them at this rate, from the L2.
        overhead: seconds from the end of one launch to the start of the work of the next.
    """

    processors: int
    half: float
    single: float
    triton: float
    assembled: float
    bandwidth: float
    cache: float
    cache_bandwidth: float
    overhead: float


# Sources: [M] measured by us (none yet), [P] published by the vendor, [E] our own estimate. 1 and 3 are sections of a
# study that is not in this repository: its figures come from compiled code, published timings and a model, not a run.
# ``assembled`` is ``triton`` times section 3's ratio of matrix cycles to all cycles of the loop, A and B low rank.
MACHINES = {
    "sm_80": Machine(  # A100 SXM 80 GB: 108 processors, 312 TFLOP/s, fp32 19.5, 2.04 TB/s, L2 2 x 20 MB [P]
        processors=108,
        half=250e12,  # [E] 0.80 of the peak
        single=17e12,  # [E]
        triton=0.95,  # [E] 1
        assembled=0.76,  # [E] 0.95 x 0.80 of 3
        bandwidth=1.75e12,  # [E] 0.86 of the peak
        cache=20e6,  # [E] one half of the L2
        cache_bandwidth=3.0e12,  # [E]
        overhead=2.0e-6,  # [E] 1
    ),
    "sm_86": Machine(  # RTX 3090: 82 processors, 71 TFLOP/s, fp32 35.6, 0.936 TB/s, L2 6 MB [P]
        processors=82,
        half=65e12,  # [E] 1
        single=25e12,  # [E]
        triton=0.95,  # [E] 1
        assembled=0.76,  # [E] as sm_80
        bandwidth=0.84e12,  # [E] 1
        cache=0.0,  # [E] 1: too small to matter
        cache_bandwidth=0.84e12,
        overhead=2.0e-6,  # [E] 1
    ),
    "sm_89": Machine(  # RTX 4090: 128 processors, 165 TFLOP/s, fp32 82.6, 1.008 TB/s, L2 72 MB [P]
        processors=128,
        half=155e12,  # [E] 1
        single=60e12,  # [E]
        triton=0.95,  # [E] 1
        assembled=0.81,  # [E] 0.95 x 0.85 of 3
        bandwidth=0.93e12,  # [E] 1
        cache=40e6,  # [E] 1
        cache_bandwidth=2.5e12,  # [E] 1
        overhead=1.5e-6,  # [E] 1
    ),
    "sm_90": Machine(  # H200: 132 processors, 989 TFLOP/s, fp32 67, 4.8 TB/s, L2 50 MB [P]; an H100 has 3.35 TB/s
        processors=132,
        half=790e12,  # [E] 1
        single=50e12,  # [E]
        triton=0.87,  # [E] 1
        assembled=0.50,  # [E] 0.87 x 0.57 of 3
        bandwidth=4.3e12,  # [E] 1
        cache=30e6,  # [E] 1
        cache_bandwidth=6.5e12,  # [E] 1
        overhead=1.5e-6,  # [E] 1
    ),
    "sm_100": Machine(  # B200: 148 processors, 2250 TFLOP/s, fp32 75, 8 TB/s, L2 126 MB [P]
        processors=148,
        half=1650e12,  # [E] 0.73 of the peak
        single=55e12,  # [E]
        triton=0.80,  # [E] below Hopper's: its accumulators need their own memory and pipeline
        assembled=0.45,  # [E] 0.80 x 0.57, as sm_90
        bandwidth=7.0e12,  # [E] 0.87 of the peak
        cache=60e6,  # [E] one half of the L2
        cache_bandwidth=10e12,  # [E]
        overhead=1.5e-6,  # [E] as sm_90
    ),
    "sm_120": Machine(  # RTX 5090: 170 processors, 210 TFLOP/s, fp32 105, 1.79 TB/s, L2 96 MB [P]
        processors=170,
        half=195e12,  # [E] 0.93 of the peak
        single=75e12,  # [E]
        triton=0.95,  # [E] as sm_89, whose matrix instructions it shares
        assembled=0.81,  # [E] as sm_89
        bandwidth=1.6e12,  # [E] 0.89 of the peak
        cache=50e6,  # [E]
        cache_bandwidth=4.0e12,  # [E]
        overhead=1.5e-6,  # [E] as sm_89
    ),
    "gfx942": Machine(  # MI300X: 304 units, 1307 TFLOP/s, fp32 163, 5.3 TB/s, last-level cache 256 MB [P]
        processors=304,
        half=700e12,  # [P] AMD's "max-achievable FLOPs", rounded
        single=100e12,  # [E]
        triton=0.80,  # [E]
        assembled=0.50,  # [E] as sm_90; not examined
        bandwidth=4.3e12,  # [E] 0.81 of the peak
        cache=128e6,  # [E] one half of the last-level cache
        cache_bandwidth=8.0e12,  # [E]
        overhead=2.5e-6,  # [E]
    ),
}


@lru_cache(maxsize=64)
def machine_for(architecture: str) -> Machine:
    """The machine of an architecture, or of the nearest older one of its family.

    Raises:
        ValueError: there is no such machine.
    """
    name = nearest(INTERPRETED_AS if architecture == INTERPRETER else architecture, MACHINES)
    if name is None:
        known = ", ".join((*MACHINES, INTERPRETER))
        raise ValueError(f"architecture: expected one of {known}, or a newer relative of one; got {architecture!r}")
    return MACHINES[name]


def nearest(architecture: str, known: Iterable[str]) -> str | None:
    """The architecture itself or the newest older one of its family (``sm_``, ``gfx9``); None if there is none."""
    if architecture in known:
        return architecture
    family, number = _parts(architecture)
    older = [(other, name) for name in known for kin, other in [_parts(name)] if kin == family and other < number]
    return max(older)[1] if family and older else None


def _parts(architecture: str) -> tuple[str, int]:
    """Family and number: ``("sm_", 90)``, ``("gfx9", 0x42)``; no family for a name that is neither."""
    if found := re.fullmatch(r"(sm_)(\d+)", architecture):
        return found[1], int(found[2])
    if found := re.fullmatch(r"(gfx\d{1,2})([\da-f]{2})", architecture):
        return found[1], int(found[2], 16)
    return "", 0
