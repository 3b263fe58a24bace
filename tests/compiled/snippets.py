"""Short pieces of PTX and what becomes of them: registers by lane, hazards, and messages of faults.

A snippet may use the registers ``%p<n>`` (predicates), ``%rs<n>`` (16 bits), ``%r<n>`` (32) and ``%rd<n>`` (64).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .instructions import decode
from .machine.faults import Hazards
from .machine.machine import Machine
from .machine.memory import Memory
from .machine.numbers import UNSIGNED
from .running import execute

_ENTRY = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry t({parameters})
.reqntid {threads}
{{
	.reg .pred %p<99>;
	.reg .b16 %rs<99>;
	.reg .b32 %r<999>;
	.reg .b64 %rd<99>;
	.reg .b32 %thread<1>;
	.reg .b32 %program<1>;
	.reg .b32 %own<1>;
	.reg .b32 %next<1>;
	.reg .b32 %across<1>;
{body}
	ret;
}}
"""
# %thread0: the thread; %program0: its program. In shared memory, %own0: the thread's word; %next0: that of the next
# thread of its warp; %across0: that of the thread with its place in the next warp.
_PROLOGUE = """
	mov.u32 %thread0, %tid.x;
	mov.u32 %program0, %ctaid.x;
	shl.b32 %own0, %thread0, 2;
	and.b32 %next0, %own0, -128;
	add.s32 %across0, %own0, 128;
	and.b32 %across0, %across0, {last};
	add.s32 %own0, %own0, 4;
	and.b32 %own0, %own0, 124;
	or.b32 %next0, %next0, %own0;
	shl.b32 %own0, %thread0, 2;
	mov.b32 %r998, global_smem;
	add.s32 %own0, %own0, %r998;
	add.s32 %next0, %next0, %r998;
	add.s32 %across0, %across0, %r998;
"""


def entry(body: str, threads: int = 32, parameters: Sequence[str] = ()) -> str:
    """The text of a kernel ``t`` with pointers as parameters."""
    listed = ", ".join(f".param .u64 .ptr .global .align 1 {name}" for name in parameters)
    return _ENTRY.format(parameters=listed, threads=threads, body=body)


def lanes(body: str, out: str, threads: int = 32, **inputs: Sequence[int] | int):
    """What the register ``out`` holds at the end, or each of several (``"r1 r2"``), as unsigned numbers.

    The inputs are the bits of registers at the start: one number for all lanes, or one per lane. If fewer are given,
    the other lanes repeat the last one, and as many results are returned as the longest of the inputs has.
    """
    machine = Machine(decode(entry(body, threads)), [0], [], 0, Memory({}, Hazards()))
    taken = max((len(given) for given in inputs.values() if not isinstance(given, int)), default=threads)
    for name, given in inputs.items():
        listed = [given] if isinstance(given, int) else [*given] + [given[-1]] * (threads - len(given))
        bits = machine.code.program.bits(f"%{name}")
        machine.registers[f"%{name}"] = np.array(listed, np.bool_ if bits == 1 else UNSIGNED[bits])
    machine.run()
    assert not machine.hazards
    found = [machine.whole(machine.register(f"%{name}"))[:taken].astype(np.uint64).tolist() for name in out.split()]
    return found if len(found) > 1 else found[0]


def run(body: str, threads: int = 32, shared: int = 0, grid: int = 1, **tensors: torch.Tensor) -> Hazards:
    """The hazards of a launch. The k-th tensor's address is in ``%rd<k>``, counted from 1; see _PROLOGUE for others."""
    loads = "".join(f"\tld.param.b64 %rd{place}, [{name}];\n" for place, name in enumerate(tensors, 1))
    text = entry(loads + _PROLOGUE.format(last=4 * threads - 1) + body, threads, tuple(tensors))
    return execute(decode(text), grid, [tensor.data_ptr() for tensor in tensors.values()], shared, tensors)


def noted(body: str, threads: int = 32, shared: int = 1024, grid: int = 1, **tensors: torch.Tensor) -> list[str]:
    """What kinds of hazards a launch has, in the order of the alphabet."""
    return sorted({hazard.split(": ")[0] for hazard in run(body, threads, shared, grid, **tensors)})


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def at_a_multiple_of_16(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    storage = zeros(count + 16, dtype)
    return storage[-storage.data_ptr() % 16 // storage.element_size() :][:count]


def zeros(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)
