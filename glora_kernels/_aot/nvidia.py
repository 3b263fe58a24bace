"""Reads a cubin: its resources, its instructions, and what the assembler said about it.

The tools are those inside Triton (or where ``TRITON_NVDISASM_PATH`` and the like point).
"""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections import Counter
from contextlib import redirect_stdout

from triton import knobs
from triton.compiler import CompiledKernel, make_backend

_RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+)")
_OPCODE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_TRAP = re.compile(r"^\s*(?:@!?%\w+\s+)?trap;", re.MULTILINE)
_SERIALISED = re.compile(r"serialized due to (.*?)(?: in the function|$)", re.MULTILINE)


def resources(dump: str) -> tuple[int, int]:
    """Registers and bytes of stack per thread, from ``cuobjdump --dump-resource-usage``."""
    found = [(int(registers), int(stack)) for registers, stack in _RESOURCES.findall(dump)]
    if not found:
        raise RuntimeError(f"cuobjdump: expected a line with REG and STACK, got {dump!r}")
    return max(registers for registers, _ in found), max(stack for _, stack in found)


def opcodes(sass: str) -> Counter[str]:
    """How often every opcode occurs, from ``nvdisasm -c``."""
    found = Counter(match[1] for line in sass.splitlines() if (match := _OPCODE.match(line)))
    if not found:
        raise RuntimeError(f"nvdisasm: expected instructions, got {sass[:200]!r}")
    return found


def traps(ptx: str) -> int:
    """Trap instructions that Triton wrote; those that ptxas adds around tensor memory are not in the PTX."""
    return len(_TRAP.findall(ptx))


def serialisation(log: str) -> str | None:
    """Why the assembler serialised the matrix instructions (C7515 and the like), or None if it does not say so."""
    found = _SERIALISED.search(log)
    return found[1] if found else None


def disassembled(cubin: bytes) -> tuple[str, str]:
    """The texts that ``resources`` and ``opcodes`` read."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return (
            _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name),
            _output(knobs.nvidia.nvdisasm.path, "-c", file.name),
        )


def assembler_log(kernel: CompiledKernel) -> str:
    """What ptxas says about the kernel. Triton does not keep it, so Triton assembles the kernel again, in the same way.

    Raises:
        RuntimeError: the second assembly gave other code than the kernel's, or no log.
    """
    target = kernel.metadata.target
    backend = make_backend(target)
    options = backend.parse_options({"enable_fp_fusion": kernel.metadata.enable_fp_fusion})
    log = io.StringIO()
    with knobs.nvidia.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        again = backend.make_cubin(kernel.asm["ptx"], {}, options, target.arch)
    if again != kernel.asm["cubin"] or "Used" not in log.getvalue():
        raise RuntimeError("ptxas: expected the same code as before and a log of it, got another")
    return log.getvalue()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
