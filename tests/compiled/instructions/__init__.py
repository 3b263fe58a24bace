"""What each instruction does. A form that has no rule is an error that names it."""

from __future__ import annotations

from ..machine.faults import UnknownInstructionError
from ..machine.machine import Action, Code, Step
from ..machine.program import Instruction, Program
from . import arithmetic, conversions, fragments, moves, warps  # noqa: F401  (they name rules)
from .copies import Copies
from .decoding import RULES, Decoder, unknown
from .warpgroups import Products

_JUMPS = {"bra", "bra.uni", "ret"}


def decode(ptx: str) -> Code:
    """The program of a PTX text. See :func:`code_of`."""
    return code_of(Program(ptx))


def code_of(program: Program) -> Code:
    """What the instructions of a program do.

    Raises:
        UnknownInstructionError: a form of an instruction that has no rule.
    """
    decoder = Decoder(program)
    blocks = [[Step(found, _action(decoder, found)) for found in block] for block in program.blocks]
    in_flight = {"copies": Copies} | ({"products": Products} if decoder.fragments else {})
    return Code(program, blocks, decoder.granule, frozenset(decoder.fragments), in_flight)


def _action(decoder: Decoder, instruction: Instruction) -> Action | None:
    opcode = instruction.form
    if opcode in _JUMPS:
        return None
    for pattern, rule in RULES.get(instruction.opcode[0], ()):
        if found := pattern.fullmatch(opcode):
            try:
                return rule(decoder, found, instruction)
            except (UnknownInstructionError, KeyError, ValueError, IndexError) as error:  # operands of another form
                raise unknown(instruction, error) from error
    raise UnknownInstructionError(f"expected an instruction that there is a rule for, got {instruction.shown}")
