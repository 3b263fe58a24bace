"""Ways to break a compiled kernel: each is one change of one block of its instructions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..machine.program import Instruction, Program

Block = list[Instruction]
Operator = Callable[[Block, int], "Block | None"]  # the block with the instruction at that place changed, if it can be
OPERATORS: dict[str, Operator] = {}
ORDERS = {"wait_for_one_less"}  # those that take away an order, which need not change a result in every execution


class Site(NamedTuple):
    """Where an operator applies, in a program."""

    operator: str
    block: int
    place: int


def operator(name: str) -> Callable[[Operator], Operator]:
    def add(function: Operator) -> Operator:
        OPERATORS[name] = function
        return function

    return add


def sites(program: Program) -> Iterator[Site]:
    for number, block in enumerate(program.blocks):
        for place in range(len(block)):
            for name, change in OPERATORS.items():
                if change(block, place) is not None:
                    yield Site(name, number, place)


def broken(ptx: str, site: Site) -> Program:
    program = Program(ptx)
    changed = OPERATORS[site.operator](program.blocks[site.block], site.place)
    assert changed is not None, f"{site}: the operator does not apply there"
    program.blocks[site.block] = changed
    return program


def described(name: str) -> str:
    return (OPERATORS[name].__doc__ or "").strip()


def _dropped(name: str, form: str, what: str, order: bool = True) -> None:
    pattern = re.compile(form)

    def drop(block: Block, place: int) -> Block | None:
        return _with(block, place, []) if pattern.fullmatch(block[place].form) else None

    drop.__doc__ = f"{what} is left out"
    operator(name)(drop)
    if order:
        ORDERS.add(name)


def _without_predicate(name: str, form: str, what: str) -> None:
    pattern = re.compile(form)

    def drop(block: Block, place: int) -> Block | None:
        found = block[place]
        if found.predicate is None or not pattern.fullmatch(found.form):
            return None
        return _with(block, place, [replace(found, predicate=None)])

    drop.__doc__ = f"{what} is executed whatever its predicate says"
    operator(name)(drop)


_dropped("barrier_dropped", r"bar(rier)?\.(warp\.)?sync.*", "a barrier of a program or of a warp")
_dropped("copy_wait_dropped", r"cp\.async\.wait_group", "a wait for copies to shared memory")
_dropped("copy_commit_dropped", r"cp\.async\.commit_group", "the end of a group of copies")
_dropped("product_wait_dropped", r"wgmma\.wait_group.*", "a wait for products of a warpgroup")
_dropped("product_commit_dropped", r"wgmma\.commit_group.*", "the end of a group of products")
_dropped("product_fence_dropped", r"wgmma\.fence.*", "a fence between registers and products")
_dropped("proxy_fence_dropped", r"fence\.proxy.*", "a fence between shared memory and products")
_dropped("store_dropped", r"st\.(shared|global).*|stmatrix.*", "a store", order=False)
_without_predicate("load_unmasked", r"ld\.global.*", "a masked load")
_without_predicate("store_unmasked", r"st\.global.*", "a masked store to global memory")
_without_predicate("branch_unconditional", r"bra.*", "a branch")


@operator("copy_unmasked")
def _copy_unmasked(block: Block, place: int) -> Block | None:
    """a masked copy to shared memory reads whatever its mask says"""
    found = block[place]
    if found.opcode[:2] != ("cp", "async") or len(found.operands) != 4:
        return None
    return _with(block, place, [replace(found, operands=found.operands[:3])])


@operator("wait_for_one_less")
def _wait_for_one_less(block: Block, place: int) -> Block | None:
    """a wait for copies or products leaves one more group in flight"""
    found = block[place]
    if "wait_group" not in found.opcode:
        return None
    return _with(block, place, [replace(found, operands=(str(int(found.operands[0], 0) + 1),))])


@operator("stores_exchanged")
def _stores_exchanged(block: Block, place: int) -> Block | None:
    """two stores of one kind, one after the other, store each other's values"""
    pair = block[place : place + 2]
    if len(pair) < 2 or pair[0].opcode != pair[1].opcode or pair[0].opcode[0] not in ("st", "stmatrix"):
        return None
    first, second = ((instruction.operands[0], instruction.operands[1]) for instruction in pair)
    if first[1] == second[1]:
        return None
    swapped = [replace(pair[0], operands=(first[0], second[1])), replace(pair[1], operands=(second[0], first[1]))]
    return _with(block, place, swapped)


@operator("address_moved")
def _address_moved(block: Block, place: int) -> Block | None:
    """a load, store or copy goes to the next place: the address grows by the bytes of one access"""
    found = block[place]
    at = 1 if found.opcode[0] in ("ld", "ldmatrix") else 0
    if found.opcode[0] not in ("ld", "st", "ldmatrix", "stmatrix", "cp") or len(found.operands) < 2:
        return None
    address = re.fullmatch(r"\[\s*(%\w+)\s*(?:\+\s*(-?\w+))?\s*\]", found.operands[at])
    if address is None:  # of a parameter
        return None
    moved = f"[{address[1]}+{int(address[2] or '0', 0) + _bytes(found)}]"
    return _with(block, place, [replace(found, operands=(*found.operands[:at], moved, *found.operands[at + 1 :]))])


def _bytes(access: Instruction) -> int:
    if access.opcode[0] in ("ldmatrix", "stmatrix", "cp"):
        return 16
    count = next((int(part[1]) for part in access.opcode if re.fullmatch(r"v\d", part)), 1)
    return count * int(re.search(r"\d+$", access.opcode[-1])[0]) // 8


def _with(block: Block, place: int, instead: Sequence[Instruction]) -> Block:
    width = max(1, len(instead))
    return [*block[:place], *instead, *block[place + width :]]
