"""What one compiled kernel shows. Reading takes as long as compiling, so the result is kept in Triton's cache too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from triton.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

from . import amd, nvidia
from .chains import chained_dots

_FILE = "glora_reading.json"
_SOURCES = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))


class Reading(NamedTuple):
    """What a compiled kernel shows; a count is absent or 0 where the target has no such thing."""

    registers: int  # per thread
    stack: int  # bytes per thread, in memory
    spills: dict[str, int]  # NVIDIA: local loads and stores in the code; AMD: spilled registers
    shared: int  # bytes
    tensor_memory: int  # columns
    matrix: dict[str, int]  # matrix instructions
    traps: int
    serialised: str | None  # why the assembler serialised matrix instructions
    chained: list[str]  # dots of one loop that add to each other


def read(kernel: CompiledKernel) -> Reading:
    """What the kernel shows; from the cache if the same code was read before."""
    cache = get_cache_manager(_key(kernel))
    path = cache.get_file(_FILE)
    if path is not None:
        return Reading(**json.loads(Path(path).read_text()))
    reading = _read_nvidia(kernel) if "cubin" in kernel.asm else _read_amd(kernel)
    cache.put(json.dumps(reading._asdict()), _FILE, binary=False)
    return reading


def _key(kernel: CompiledKernel) -> str:
    """A key that changes with the kernel and the compiler (both are in the hash), the output and the reading code."""
    key = hashlib.sha256(kernel.hash.encode() + _SOURCES)
    for text in kernel.asm.values():
        key.update(text if isinstance(text, bytes) else text.encode())
    return key.hexdigest()


def _read_nvidia(kernel: CompiledKernel) -> Reading:
    dump, sass = nvidia.disassembled(kernel.asm["cubin"])
    registers, stack = nvidia.resources(dump)
    opcodes = nvidia.opcodes(sass)
    return Reading(
        registers=registers,
        stack=stack,
        spills={name: opcodes[name] for name in ("STL", "LDL") if name in opcodes},
        shared=kernel.metadata.shared,
        tensor_memory=kernel.metadata.tmem_size or 0,
        matrix={name: count for name, count in opcodes.items() if name.endswith("MMA")},
        traps=nvidia.traps(kernel.asm["ptx"]),
        serialised=nvidia.serialisation(nvidia.assembler_log(kernel)) if "HGMMA" in opcodes else None,
        chained=chained_dots(kernel.asm["ttir"]),
    )


def _read_amd(kernel: CompiledKernel) -> Reading:
    text = kernel.asm["amdgcn"]
    spills = {name: amd.resource(text, f"{name}_spill_count") for name in ("vgpr", "sgpr")}
    matrix = amd.matrix_instructions(text)
    return Reading(
        registers=amd.resource(text, "vgpr_count"),
        stack=amd.resource(text, "private_segment_fixed_size"),
        spills={name: count for name, count in spills.items() if count},
        shared=kernel.metadata.shared,
        tensor_memory=0,
        matrix={"v_mfma": matrix} if matrix else {},
        traps=amd.traps(text),
        serialised=None,
        chained=chained_dots(kernel.asm["ttir"]),
    )
