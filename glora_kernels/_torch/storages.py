"""The part of each storage that is read, and gradients in the shape of the storages: what to do is decided once.

Parts and their gradients stand in the places of ``path_encoding.PLACES``: Ad, Au, Bd, Bu, Cd, Cu, D, E.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter, methodcaller

import torch
from torch import Tensor
from torch.nn import functional as F

from ..path_encoding import STORAGES, places_of
from ..terms import LowRank, Term, Terms, Vector

Change = Callable[[Tensor], Tensor]
Parts = tuple[Tensor, ...]  # by place; None where nothing is read, which the kinds of the terms tell


def reader(terms: Terms, dtype: torch.dtype) -> Callable[[Sequence[Tensor]], Parts]:
    """A function of the storages, in the order of ``terms.storages``: the parts that are read, in one dtype.

    Of a low rank they are ``(rows, r)`` and ``(r, columns)``, of a vector ``(length,)``, of a constant ``()``.
    """
    places = places_of(terms)
    spread = itemgetter(*(places.index(p) if p in places else len(places) for p in range(len(STORAGES))))
    changes = [
        _in_turn(part, None if storage.dtype == dtype else methodcaller("to", dtype))
        for part, storage in zip(_each(_parts, terms), terms.storages)
    ]
    if not any(changes):
        return lambda storages: spread((*storages, None))
    return lambda storages: spread((*[f(s) if f else s for f, s in zip(changes, storages)], None))


def writer(terms: Terms, dtype: torch.dtype | None) -> Callable[[Sequence[Tensor | None]], list[Tensor | None]]:
    """A function of the gradients of the parts: those of the storages, in their shapes and dtypes, zero where nothing
    is read. The gradient of a constant is the sum of one value per row.

    Args:
        dtype: of the gradients of the parts; None if they have several.
    """
    places = places_of(terms)
    changes = [
        _in_turn(whole, None if storage.dtype == dtype else methodcaller("to", storage.dtype))
        for whole, storage in zip(_each(_wholes, terms), terms.storages)
    ]
    if not any(changes):
        return lambda grads: [grads[place] for place in places]

    def write(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        found = [grads[place] for place in places]
        return [grad if grad is None or change is None else change(grad) for grad, change in zip(found, changes)]

    return write


def _each(changes: Callable[[Term], list[Change | None]], terms: Terms) -> list[Change | None]:
    return [change for _, term in terms.active for change in changes(term)]


def _in_turn(first: Change | None, second: Change | None) -> Change | None:
    if first is None or second is None:
        return first or second
    return lambda tensor: second(first(tensor))


def _parts(term: Term) -> list[Change | None]:
    """For each storage of a term, what takes the part that is read; None: all of it is."""
    if isinstance(term, LowRank):
        rank = term.read_rank
        if rank == term.down.shape[1] == term.up.shape[0]:
            return [None, None]
        return [itemgetter((slice(None), slice(rank))), itemgetter(slice(rank))]
    if isinstance(term, Vector):
        return [None if term.value.dim() == 1 else methodcaller("select", 1, 0)]
    return [itemgetter((0,) * term.value.dim())]


def _wholes(term: Term) -> list[Change | None]:
    """For each storage of a term, what gives the gradient of the part that is read the shape of the storage."""
    if isinstance(term, LowRank):
        missing = term.up.shape[0] - term.read_rank
        return [_padded(0, missing), _padded(0, 0, 0, missing)] if missing else [None, None]
    if isinstance(term, Vector):
        if term.value.dim() == 1:
            return [None]
        return [_in_turn(methodcaller("unsqueeze", 1), _padded(0, term.value.shape[1] - 1))]
    shape = term.value.shape
    padding = [edge for size in reversed(shape) for edge in (0, size - 1)]
    return [_in_turn(torch.sum, _in_turn(methodcaller("reshape", (1,) * len(shape)), _padded(*padding)))]


def _padded(*amounts: int) -> Change | None:
    return partial(F.pad, pad=amounts) if any(amounts) else None
