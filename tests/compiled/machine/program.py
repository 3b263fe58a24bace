"""The text of a PTX kernel as blocks of instructions.

A block begins at a label that is jumped to, or behind a jump, and is executed from its first instruction to its last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .faults import Fault

_PARAMETER = re.compile(r"\.param \.(\w+)[^,)]*?(\w+)\s*(?:[,)]|$)")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(%[a-zA-Z_]+)<\d+>")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_LABEL = re.compile(r"(\$\w+):")
_PLACE = re.compile(r"\.loc\s+[^/]*?(?:inlined_at (\d+) (\d+) \d+\s*)?//\s*(\S+)")
_FILE = re.compile(r"^\s*\.file\s+(\d+)\s+\"(?:.*/)?(.*?)\"", re.M)
_IGNORED = (".loc", ".reg", ".file", ".pragma")
_JUMPS = ("bra", "ret", "exit")


class Parameter(NamedTuple):
    kind: str  # u64, b32 and the like
    name: str


@dataclass(eq=False)
class Instruction:
    """``@predicate opcode operands``; an operand may be a list in braces or an address in brackets."""

    text: str
    opcode: tuple[str, ...]  # split at the dots
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    place: str  # in the source, as far as the compiler says

    @property
    def form(self) -> str:
        """The whole opcode."""
        return ".".join(self.opcode)

    @property
    def shown(self) -> str:
        """For messages: the instruction, and the line it comes from."""
        return f"{self.text} ({self.place})" if self.place else self.text


class Program:
    """A kernel.

    Attributes:
        name: of the entry.
        parameters: in their order.
        threads: of a CTA, as the entry says.
        registers: bits of the registers with a prefix, such as ``{"%rd": 64}``; 1 for predicates.
        blocks: instructions that are executed one after the other.
        labels: the block that each label begins.
    """

    def __init__(self, ptx: str):
        head, body = _entry(ptx)
        self.name = head[: head.index("(")].split()[-1]
        self.parameters = _parameters(head)
        threads = re.search(r"\.reqntid (\d+)(?:, 1)*\s*$", head, re.M)
        if threads is None:
            raise Fault(f"{self.name}: expected .reqntid with one number, got none")
        self.threads = int(threads[1])
        self.registers = {prefix: 1 if kind == "pred" else int(kind[1:]) for kind, prefix in _REGISTERS.findall(body)}
        self.blocks, self.labels = _blocks(body, dict(_FILE.findall(ptx)))

    @property
    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block

    @property
    def loops(self) -> Iterator[range]:
        """The blocks from a label to a jump back to it, for each such jump."""
        for place, block in enumerate(self.blocks):
            for found in block:
                if found.opcode[0] == "bra" and self.labels[found.operands[0]] <= place:
                    yield range(self.labels[found.operands[0]], place + 1)

    def bits(self, register: str) -> int:
        """How wide a register is; 1 for a predicate."""
        return self.registers[register.rstrip("0123456789")]


def parameters_of(ptx: str) -> list[Parameter]:
    """The parameters of the entry; the rest of the text is not read."""
    return _parameters(_entry(ptx)[0])


def _parameters(head: str) -> list[Parameter]:
    return [Parameter(*found) for found in _PARAMETER.findall(head)]


def _entry(ptx: str) -> tuple[str, str]:
    text = ptx[ptx.index(".entry") :]
    text = text[: text.index("\n}")]
    opening = text.index("\n{")
    return text[:opening], text[opening + 2 :]


def _blocks(body: str, files: dict[str, str]) -> tuple[list[list[Instruction]], dict[str, int]]:
    targets = set(re.findall(r"\bbra[\w.]*\s+(\$\w+)", body))
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement, place in _statements(body, files):
        if label := _LABEL.fullmatch(statement):
            if label[1] in targets:
                if blocks[-1]:
                    blocks.append([])
                labels[label[1]] = len(blocks) - 1
            continue
        instruction = _instruction(statement, place)
        blocks[-1].append(instruction)
        if instruction.opcode[0] in _JUMPS:
            blocks.append([])
    if missing := targets - set(labels):
        raise Fault(f"expected a place for each label that is jumped to, got none for {sorted(missing)}")
    return blocks, labels


def _statements(body: str, files: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Instructions and labels, each with the line of the source it comes from, and the line that calls this code."""
    place = ""
    for line in body.splitlines():
        if found := _PLACE.search(line):
            file, caller, place = found.groups()
            place += f" from {files.get(file, file)}:{caller}" if file else ""
        for part in line.split("//")[0].split(";"):
            statement = part.strip()
            while statement.startswith("{") and not re.match(r"\{\s*%", statement):  # a scope of inline assembly
                statement = statement[1:].strip()
            if statement.strip("} ") and statement.split()[0] not in _IGNORED:
                yield statement, place


def _instruction(statement: str, place: str) -> Instruction:
    found = _INSTRUCTION.fullmatch(statement)
    if found is None:
        raise Fault(f"expected an instruction, got {statement!r}")
    negated, predicate, opcode, rest = found.groups()
    text = " ".join(statement.split())
    return Instruction(text, tuple(opcode.split(".")), tuple(operands_of(rest)), predicate, negated == "!", place)


def operands_of(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "{[") - (sign in "}]")
        if sign == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*found, last] if last else found
