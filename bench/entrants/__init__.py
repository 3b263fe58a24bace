"""Ours and its peers, made from one backbone with the same factors."""

from .field import ENTRANTS, Entrant, Field, make_field

__all__ = ["ENTRANTS", "Entrant", "Field", "make_field"]
