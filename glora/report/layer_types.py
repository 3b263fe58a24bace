"""Types of layers, from the names of modules that repeat from block to block."""

from __future__ import annotations

from collections.abc import Iterable


def layer_types(names: Iterable[str]) -> dict[str, str]:
    """The type of each layer: as many last components of its name as are needed to tell it from other types.

    Numbers in a name count blocks and are left out; layers whose names are then equal have one type.

    >>> layer_types(["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.0.mlp.fc1"])
    {'blocks.0.attn.qkv': 'qkv', 'blocks.1.attn.qkv': 'qkv', 'blocks.0.mlp.fc1': 'fc1'}
    """
    parts = {name: tuple(part for part in name.split(".") if not part.isdigit()) for name in names}
    short = {each: _shortest(each, set(parts.values())) for each in set(parts.values())}
    return {name: short[each] for name, each in parts.items()}


def _shortest(parts: tuple[str, ...], others: set[tuple[str, ...]]) -> str:
    """The shortest ending that only ``parts`` has; all of ``parts`` if another name ends with it."""
    for length in range(1, len(parts)):
        if sum(other[-length:] == parts[-length:] for other in others) == 1:
            return ".".join(parts[-length:])
    return ".".join(parts)
