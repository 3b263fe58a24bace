"""The file of the settings, as it is written: one rule per line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .settings import FILE, KERNELS, Rule, Tile


def write(architecture: str, table: Mapping[str, Sequence[Rule]], file: Path) -> None:
    """Write the settings in force, with these rules for one architecture; readers see the old file or the new one."""
    content = json.loads(FILE.read_text())
    entry = {kernel: [{**calls_of(rule), **entry_of(rule.tile)} for rule in table[kernel]] for kernel in KERNELS}
    content["architectures"][architecture] = entry
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_text(render(content))
    os.replace(unfinished, file)


def render(content: dict[str, Any]) -> str:
    blocks = []
    for name, table in content["architectures"].items():
        if isinstance(table, str):
            blocks.append(f"    {json.dumps(name)}: {json.dumps(table)}")
            continue
        kernels = [
            f"      {json.dumps(kernel)}: [\n"
            + ",\n".join(f"        {json.dumps(rule)}" for rule in found)
            + "\n      ]"
            for kernel, found in table.items()
        ]
        blocks.append(f"    {json.dumps(name)}: {{\n" + ",\n".join(kernels) + "\n    }")
    body = ",\n".join(blocks)
    return f'{{\n  "version": {content["version"]},\n  "architectures": {{\n{body}\n  }}\n}}\n'


def calls_of(rule: Rule) -> dict[str, Any]:
    """The part of a rule's entry that says which calls it is meant for."""
    entry: dict[str, Any] = {"elements": list(rule.elements)}
    entry |= {"max_tokens": rule.max_tokens} if rule.max_tokens is not None else {}
    return entry | ({"max_rank": rule.max_rank} if rule.max_rank is not None else {})


def entry_of(tile: Tile) -> dict[str, Any]:
    """The part that is its tile."""
    entry = {"block": [tile.tokens, tile.rows, tile.columns], "warps": tile.warps, "stages": tile.stages}
    return entry | ({"swap": True} if tile.swap else {})
