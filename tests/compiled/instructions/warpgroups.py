"""``wgmma``: products of warpgroups (128 threads), which read shared memory and go on in the background.

Results are in their registers at once here. But until the warpgroup has waited for the group of the product, no other
instruction may access these registers, or those of a fragment of A; and of registers that were accessed since,
a product needs a ``wgmma.fence``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from ..machine.faults import Fault
from ..machine.machine import Action, Active, Machine
from ..machine.numbers import FROM, Array
from ..machine.program import Instruction
from ..machine.shared import BASE
from .decoding import Decoder, Read, listed, rule, unknown
from .fragments import G, Q, bytes_of, elements

THREADS = 128
_SWIZZLES = {1: 128, 2: 64, 3: 32}  # bytes, by the code in a descriptor


class Product(NamedTuple):
    warpgroups: Array
    group: Array  # of the warpgroup's groups, by warpgroup
    registers: frozenset[str]
    places: list[Array]  # of shared memory that is read


class Products:
    """The products in flight, and for each register who has accessed it, by warpgroup."""

    def __init__(self, machine: Machine):
        count = machine.size // THREADS
        self.flying: list[Product] = []
        self.committed = np.zeros(count, np.int64)
        self.busy: dict[str, Array] = defaultdict(lambda: np.zeros(count, np.int64))  # products that use the register
        self.unfenced: dict[str, Array] = defaultdict(lambda: np.ones(count, np.bool_))

    def accessed(self, machine: Machine, register: str, how: str) -> None:
        """By another instruction."""
        warpgroups = _warpgroups(machine, machine.active)
        if self.busy[register][warpgroups].any():
            machine.hazards.note(
                f"a {how} of a register of a product in flight", f"{register} in {machine.code.program.name}"
            )
        self.unfenced[register][warpgroups] = True

    def renamed(self, machine: Machine, target: str, source: str) -> None:
        """The target is fenced if the source is; a constant leaves it as it is."""
        warpgroups = _warpgroups(machine, machine.active)
        names = [name for name in (source, target) if name.startswith("%")]
        fenced = self.unfenced[names[0]][warpgroups]
        for name in names:
            self.accessed(machine, name, "move")
            self.unfenced[name][warpgroups] = fenced

    def begin(self, machine: Machine, product: Product, what: str) -> None:
        for register in product.registers:
            if self.unfenced[register][product.warpgroups].any():
                machine.hazards.note("a product without wgmma.fence behind the last access of a register", what)
            self.busy[register][product.warpgroups] += 1
        self.flying.append(product)

    def fence(self, warpgroups: Array, registers: frozenset[str]) -> None:
        for register in registers:
            self.unfenced[register][warpgroups] = False

    def wait(self, machine: Machine, warpgroups: Array, allowed: int) -> None:
        """Until at most so many of the warpgroups' last groups are in flight."""
        complete = np.full(self.committed.size, -1)
        complete[warpgroups] = self.committed[warpgroups] - allowed
        left = []
        for product in self.flying:
            done = product.group < complete[product.warpgroups]
            for register in product.registers:
                self.busy[register][product.warpgroups[done]] -= 1
            if done.all():
                for places in product.places:
                    machine.shared.product_ends(places)
            else:
                left.append(product._replace(warpgroups=product.warpgroups[~done], group=product.group[~done]))
        self.flying = left

    def end(self, machine: Machine) -> None:
        if self.flying:
            machine.hazards.note("products that are never waited for", machine.code.program.name)


def _warpgroups(machine: Machine, active: Active) -> Array:
    """With an active lane."""
    count = machine.size // THREADS
    return np.arange(count) if active is None else np.flatnonzero(active.reshape(count, THREADS).any(1))


def _whole_warpgroups(machine: Machine, active: Active, what: str) -> Array:
    found = _warpgroups(machine, active)
    if active is not None and not active.reshape(-1, THREADS)[found].all():
        raise Fault(f"not all threads of a warpgroup take part: {what}")
    return found


@rule(r"fence\.proxy\.async(?:\.shared::cta)?")
def _fence_proxies(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    return lambda machine, active: machine.shared.fence(None if active is None else machine.lanes(active))


@rule(r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned")
def _order(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    kind = found[1]
    allowed = int(instruction.operands[0], 0) if kind == "wait_group" else 0
    registers = frozenset(at.fragments)

    def order(machine: Machine, active: Active) -> None:
        warpgroups, products = _whole_warpgroups(machine, active, instruction.shown), machine.in_flight["products"]
        if kind == "fence":
            products.fence(warpgroups, registers)
        elif kind == "commit_group":
            products.committed[warpgroups] += 1
        else:
            products.wait(machine, warpgroups, allowed)

    return order


@rule(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(bf16|f16|tf32)\.(bf16|f16|tf32)")
def _product(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """``D = A B^T + D`` or, without the addend, ``A B^T``: 64 x N. A lies in registers or, as B does, in memory."""
    columns, depth, kind = int(found[1]), int(found[2]), found[3]
    names, operand, second, keep, *flags = instruction.operands
    targets, in_registers = listed(names), operand.startswith("{")
    transposed = [flag == "1" for flag in flags[2:]]
    expected = 0 if kind == "tf32" else 1 if in_registers else 2
    bad_shape = found[4] != kind or depth * bytes_of(kind) != 32 or len(targets) != columns // 2 or columns % 8
    if bad_shape or flags[:2] != ["1", "1"] or len(transposed) != expected or not set(flags) <= {"0", "1"}:
        raise unknown(instruction)
    transposed = [False] * (2 - len(transposed)) + transposed
    a_reads = at.sources(operand, "u32", product=True) if in_registers else [at.source(operand, "u64")]
    b_read, keeps = at.source(second, "u64"), at.source(keep, "pred")
    addends = [at.source(name, "f32", product=True) for name in targets]
    registers = frozenset(targets) | (frozenset(listed(operand)) if in_registers else frozenset())
    widen, width = FROM[kind], bytes_of(kind)

    def multiply(machine: Machine, active: Active) -> None:
        warpgroups, products = _whole_warpgroups(machine, active, instruction.shown), machine.in_flight["products"]
        read = []

        def tile(descriptor: Read, rows: int, across: bool) -> Array:
            """``rows`` x ``depth``, by warpgroup."""
            words = machine.whole(descriptor(machine)).reshape(-1, THREADS)[warpgroups]
            if (words != words[:, :1]).any():
                raise Fault(f"descriptors that differ within a warpgroup: {instruction.shown}")
            offsets = where(words[:, 0], rows, depth, width, across, instruction)
            cta = machine.shared.cta[warpgroups * THREADS]
            values, places = machine.shared.product_reads(cta, offsets, width, instruction.shown)
            read.append(places)
            return widen(values).astype(np.float64)

        if in_registers:
            a = _fragment(machine, a_reads, warpgroups, depth, kind)
        else:
            a = tile(a_reads[0], 64, transposed[0])
        b = tile(b_read, columns, transposed[1])
        products.begin(machine, Product(warpgroups, products.committed[warpgroups], registers, read), instruction.shown)
        product = (a @ b.transpose(0, 2, 1)).reshape(-1, 4, 16, columns)
        kept = machine.whole(keeps(machine)).reshape(-1, 4, 32)[warpgroups]
        for number, (name, addend) in enumerate(zip(targets, addends)):
            block, part = divmod(number, 4)
            value = product[:, :, G + 8 * (part // 2), 8 * block + 2 * Q + part % 2]
            before = machine.whole(addend(machine)).reshape(-1, 4, 32)
            result = before.copy()
            result[warpgroups] = np.where(kept, value + before[warpgroups], value).astype(np.float32)
            machine.write(name, result.reshape(-1).view(np.uint32), active)

    return multiply


def _fragment(machine: Machine, reads: list[Read], warpgroups: Array, depth: int, kind: str) -> Array:
    a = np.zeros((len(warpgroups), 4, 16, depth))
    for read, (row, column) in zip(reads, ((0, 0), (8, 0), (0, depth // 2), (8, depth // 2))):
        words = machine.whole(read(machine)).reshape(-1, 4, 32)[warpgroups]
        for place, part in elements(words, kind):
            a[:, :, G + row, column + place] = part
    return a.reshape(len(warpgroups), 64, depth)


def where(descriptors: Array, rows: int, depth: int, width: int, across: bool, instruction: Instruction) -> Array:
    """The offsets in shared memory of a matrix that a descriptor names: by descriptor, row and column.

    A descriptor holds, in units of 16 bytes, the start (bits 0 to 13) and two strides (16 to 29, and 32 to 45), then
    the swizzle (62 and 63). Memory is cut into atoms of 8 lines, each as long as the swizzle. A line is a row of the
    matrix or, if ``across``, a column of it.
    """
    if (descriptors >> np.uint64(49) & np.uint64(7)).any():
        raise unknown(instruction)  # a base offset
    field = lambda low: ((descriptors >> np.uint64(low) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)  # noqa: E731
    start, leading, stride = (field(low)[:, None, None] for low in (0, 16, 32))
    swizzles = np.unique(descriptors >> np.uint64(62))
    if swizzles.size > 1:
        raise unknown(instruction)
    swizzle = int(swizzles[0])
    row, column = np.arange(rows)[:, None], np.arange(depth)[None, :] * width
    if not swizzle:
        if across:
            raise unknown(instruction)
        address = start + row // 8 * stride + column // 16 * leading + row % 8 * 16 + column % 16
        return address - BASE
    line = _SWIZZLES[swizzle]
    if not across:
        address = start + row // 8 * stride + row % 8 * line + column
    else:
        along, index = np.arange(rows)[:, None] * width, np.arange(depth)[None, :]
        address = start + along // line * leading + index // 8 * stride + index % 8 * line + along % line
    mask = line // 16 - 1
    return (address ^ ((address >> 7 & mask) << 4)) - BASE
