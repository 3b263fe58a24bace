"""Ours and its peers, made from one backbone with the same factors."""

from .field import ENTRANTS, Entrant, Field, make_field
from .names import (
    ASSEMBLED,
    FROZEN,
    GLORA,
    HIRA,
    LORA,
    LYCORIS,
    LYCORIS_BYPASS,
    OFFICIAL,
    OURS,
    OURS_MATMUL,
    all_low_rank,
    hira,
    lora,
    lycoris,
)

__all__ = [
    "ASSEMBLED",
    "ENTRANTS",
    "FROZEN",
    "GLORA",
    "HIRA",
    "LORA",
    "LYCORIS",
    "LYCORIS_BYPASS",
    "OFFICIAL",
    "OURS",
    "OURS_MATMUL",
    "Entrant",
    "Field",
    "all_low_rank",
    "hira",
    "lora",
    "lycoris",
    "make_field",
]
