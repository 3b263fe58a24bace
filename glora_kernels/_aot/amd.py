"""Reads AMD assembly: the record of the kernel's resources, and its instructions."""

from __future__ import annotations

import re

_MATRIX = re.compile(r"^\s*v_mfma_", re.MULTILINE)
_TRAP = re.compile(r"^\s*s_trap\b", re.MULTILINE)


def resource(amdgcn: str, name: str) -> int:
    """One entry of the record of resources, such as ``vgpr_spill_count``."""
    found = re.findall(rf"^\s*(?:- )?\.{name}:\s+(\d+)", amdgcn, re.MULTILINE)
    if not found:
        raise RuntimeError(f"assembly: expected an entry .{name}, got none")
    return max(map(int, found))


def matrix_instructions(amdgcn: str) -> int:
    return len(_MATRIX.findall(amdgcn))


def traps(amdgcn: str) -> int:
    return len(_TRAP.findall(amdgcn))
