"""Which changes can matter in the launches that are executed: an instruction that no lane reaches cannot.

The unbroken program is executed with a probe in front of every instruction that has sites. Each operator says what a
probe has to see once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ..instructions.decoding import Decoder, listed
from ..machine.machine import Active, Code, Machine, Step
from ..machine.numbers import Array
from ..machine.program import Instruction
from .operators import Site, sites

Probe = Callable[[Machine, Array, Array], bool]  # the lanes there, and those of them that execute the instruction


def probed(code: Code, seen: set[Site]) -> Code:
    """The program with probes: the sites whose change can matter go to ``seen`` while it is executed."""
    decoder, blocks = Decoder(code.program), [list(block) for block in code.blocks]
    for site in reversed(list(sites(code.program))):
        block = code.blocks[site.block]
        after = block[site.place + 1].instruction if site.place + 1 < len(block) else None
        probe = _probe(decoder, site.operator, block[site.place].instruction, after)
        blocks[site.block].insert(site.place, _step(block[site.place].instruction, probe, site, seen))
    return code._replace(blocks=blocks)


def _step(instruction: Instruction, probe: Probe, site: Site, seen: set[Site]) -> Step:
    def look(machine: Machine, active: Active) -> None:
        if site in seen:
            return
        there = np.ones(machine.size, np.bool_) if active is None else active
        executes = there
        if instruction.predicate is not None:
            holds = machine.whole(machine.register(instruction.predicate))
            executes = there & (~holds if instruction.negated else holds)
        if probe(machine, there, executes):
            seen.add(site)

    return Step(replace(instruction, predicate=None, opcode=("probe",)), look)


def _probe(decoder: Decoder, operator: str, instruction: Instruction, after: Instruction | None) -> Probe:
    if operator in ("load_unmasked", "branch_unconditional"):
        return lambda machine, there, executes: bool((there & ~executes).any())
    if operator == "store_unmasked":
        return _stores_more(decoder, instruction)
    if operator == "copy_unmasked":
        size = decoder.source(instruction.operands[3], "u32")
        return lambda machine, there, executes: not machine.whole(size(machine))[executes].all()
    if operator == "stores_exchanged":
        assert after is not None
        return _values_differ(instruction, after)
    if operator in ("copy_wait_dropped", "product_wait_dropped", "wait_for_one_less"):
        return _completes(instruction, one_less=operator == "wait_for_one_less")
    if operator == "proxy_fence_dropped":
        return lambda machine, there, executes: bool(machine.shared.unfenced.any())
    return lambda machine, there, executes: bool(executes.any())


def _stores_more(decoder: Decoder, instruction: Instruction) -> Probe:
    """Whether lanes that are masked would store what no other lane stores."""
    address, names = decoder.address(instruction.operands[0], "u64"), listed(instruction.operands[1])

    def probe(machine: Machine, there: Array, executes: Array) -> bool:
        columns = [machine.whole(address(machine))]
        columns += [machine.whole(machine.register(name)).astype(np.uint64) for name in names]
        rows = np.stack(columns, axis=1)
        stored = set(map(tuple, rows[executes].tolist()))
        return any(tuple(row) not in stored for row in rows[there & ~executes].tolist())

    return probe


def _values_differ(first: Instruction, second: Instruction) -> Probe:
    pairs = list(zip(listed(first.operands[1]), listed(second.operands[1])))

    def probe(machine: Machine, there: Array, executes: Array) -> bool:
        values = [[machine.whole(machine.register(name))[executes] for name in pair] for pair in pairs]
        return any((one != other).any() for one, other in values)

    return probe


def _completes(instruction: Instruction, one_less: bool) -> Probe:
    """Whether some copy or product is in flight whose group the wait completes (``one_less``: is the last of them)."""
    kind = "products" if instruction.opcode[0] == "wgmma" else "copies"
    allowed = int(instruction.operands[0], 0)

    def probe(machine: Machine, there: Array, executes: Array) -> bool:
        operations = machine.in_flight[kind]
        for one in operations.flying:
            left = operations.committed[one[0]] - allowed - 1 - one.group  # negative: still in flight afterwards
            if (left == 0).any() if one_less else (left >= 0).any():
                return True
        return False

    return probe
