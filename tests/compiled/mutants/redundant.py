"""Why a mutant that no test has noticed takes away nothing: another instruction gives the same order.

The reasons come from the text of the program, in its order, and not from the machine that executes it. They are asked
for survivors alone.
"""

from __future__ import annotations

from itertools import chain
from math import gcd

from ..instructions.decoding import listed
from ..machine.program import Instruction, Program
from .operators import Site


def reason(program: Program, site: Site) -> str | None:
    """Why the change at the site has no effect; None for a change that may have one."""
    block, place = program.blocks[site.block], site.place
    before, after = block[:place], block[place + 1 :]
    following = _following(program, site)
    if site.operator == "proxy_fence_dropped" and _first(following, "fence.proxy", "wgmma.mma_async") == "fence.proxy":
        return "another proxy fence comes before the next product"
    if site.operator == "product_fence_dropped":
        if _fenced_before(before, after):
            return "a fence before it in the block, and since then the product's registers are only moved"
        earlier = list(chain.from_iterable(program.blocks[: site.block]))
        if not any(site.block in loop for loop in program.loops) and _fenced_before([*earlier, *before], after):
            return (
                "a fence in an earlier block, and since then the product's registers are only moved; no loop is around"
            )
    if site.operator == "product_commit_dropped":
        waits = [at for at, found in enumerate(after) if found.form.startswith("wgmma.wait")]
        if waits and _waits_again([*before, *after[: waits[0]]], after[waits[0] + 1 :], commits=True):
            return "the products are in the next group, for which the block waits before it uses them"
    is_wait = block[place].opcode[:2] == ("wgmma", "wait_group")
    if is_wait and site.operator in ("product_wait_dropped", "wait_for_one_less") and _waits_again(before, after):
        return "a later wait in the block; up to there nothing touches what the products read and write"
    if site.operator == "copy_commit_dropped" and _together_with_the_next(program, site):
        return "the next group is waited for together with this one"
    return None


def _following(program: Program, site: Site) -> list[Instruction]:
    """What comes after the site in the text, up to a jump back to its block or before."""
    found: list[Instruction] = []
    for instruction in chain(program.blocks[site.block][site.place + 1 :], *program.blocks[site.block + 1 :]):
        found.append(instruction)
        if instruction.opcode[0] == "bra" and program.labels[instruction.operands[0]] <= site.block:
            break
    return found


def _first(instructions: list[Instruction], *starts: str) -> str | None:
    """Which of the starts of an opcode comes first."""
    return next((start for found in instructions for start in starts if found.form.startswith(start)), None)


def _registers(product: Instruction) -> set[str]:
    return {name for operand in product.operands[:2] if operand.startswith("{") for name in listed(operand)}


def _touches(instruction: Instruction, registers: set[str]) -> bool:
    return any(name in registers for operand in instruction.operands for name in listed(operand))


def _fenced_before(before: list[Instruction], after: list[Instruction]) -> bool:
    fences = [place for place, found in enumerate(before) if found.form.startswith("wgmma.fence")]
    if not fences:
        return False
    products = []
    for found in after:
        if found.form.startswith("wgmma.fence"):
            break
        if found.form.startswith("wgmma.mma_async"):
            products.append(found)
    if not products:
        return False
    registers = set().union(*map(_registers, products))
    first = after.index(products[0])
    between = [*before[fences[-1] + 1 :], *after[:first]]
    return not any(_touches(found, registers) for found in between if found.opcode[0] not in ("wgmma", "mov"))


def _waits_again(before: list[Instruction], after: list[Instruction], commits: bool = False) -> bool:
    """The next wait is for every group, and neither registers nor shared memory are touched before it.

    Args:
        commits: whether a group has to end before that wait, too.
    """
    products = [found for found in before if found.form.startswith("wgmma.mma_async")]
    if not products:
        return False
    registers = set().union(*map(_registers, products))
    for found in after:
        commits = commits and not found.form.startswith("wgmma.commit_group")
        if found.form.startswith("wgmma.wait_group"):
            return found.operands == ("0",) and not commits
        if found.opcode[0] != "wgmma" and _touches(found, registers):
            return False
        if found.opcode[0] in ("st", "stmatrix", "cp") or found.opcode[0].startswith(("bar", "bra", "ret")):
            return False
    return False


def _together_with_the_next(program: Program, site: Site) -> bool:
    """Groups of copies are waited for by several at a time, and this is not the last one of those several."""
    commits, waits, place = [], [], None
    for number, block in enumerate(program.blocks):
        for at, found in enumerate(block):
            if found.form == "cp.async.commit_group":
                if (number, at) == (site.block, site.place):
                    place = len(commits)
                commits.append((number, at))
            elif found.form == "cp.async.wait_group":
                waits.append(int(found.operands[0], 0))
    several = gcd(*waits)
    assert place is not None
    if several == 0:  # all waits are for every group
        return _first(_following(program, site), "cp.async.commit", "cp.async.wait") == "cp.async.commit"
    return place % several != several - 1
