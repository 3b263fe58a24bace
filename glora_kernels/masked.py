"""Kinds and ranks as data on the device: masks say what is read of every storage, no branch of the host does.

Every path is put into terms of one fixed form, which the ordinary operations then compute. A vector is
``down[:, 0] 1^T`` and a constant ``down[0, 0] 1 1^T``, so that for the hadamard product

    A = a_down a_up,  B = b_down b_up,  c = c_down c_up,  d and e as vectors

hold every path, with zeros where a factor is not read. For the matmul product a vector or constant is a diagonal s:
``W0 A = W0 diag(s) + (W0 a_down) a_up``, of which the second term is of the form of B and joins it.

What is not read is replaced (``where``, ``masked_fill``), never multiplied by zero: NaN in it reaches neither the
output nor a gradient, and its own gradient is exactly zero. Only plain operations, no synchronisation, no shape that
depends on values: a CUDA graph or a compiled graph of it serves every path.

Cost in dense products of 2 M N K operations: 3 for the hadamard product, since the graph of a low-rank A has to be
there for every path, or 2 where :func:`row_scaled_terms` will do; 2 for the matmul product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .autocast import cast_operands, without_autocast
from .checks import check_tensor
from .configuration import CODES, PLACES, STORAGES
from .terms import PRODUCTS, SLOTS, LowRank, Terms, Vector, compute_dtype


class _Part(NamedTuple):
    """What is read of the storages of one slot.

    Attributes:
        low_rank, constant: whether the slot is of this kind, ``()``.
        unread: which columns are not read, ``(R,)``.
    """

    low_rank: Tensor
    constant: Tensor
    unread: Tensor


def masked_terms(
    weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor], config: Tensor, product: str = "hadamard"
) -> Terms:
    """The terms that ``config`` selects, in one form for all kinds and ranks.

    :func:`glora_kernels.glora_linear` and its siblings compute with them what they do with the ordinary terms, and
    gradients reach the storages: zero where they are not read. For the matmul product the term B holds that of A, too.

    Args:
        weight, bias: frozen ``W0``, ``(N, K)``, and ``b0``, ``(N,)`` or None, as the operation gets them.
        storages: Ad, Au, Bd, Bu, Cd, Cu, D, E, in the shapes of the product; all of them.
        config: ``(5, 2)``, what :func:`glora_kernels.encode` makes, on the device of ``weight``. It is not read on the
            host and so not checked: a rank above that of a storage reads all of it.
        product: ``"hadamard"`` or ``"matmul"``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    _check(weight, storages, config, product)
    _, weight, bias = cast_operands(weight, weight, bias)
    with without_autocast(weight.device.type):
        parts, wide = _parts(config, storages), _widened(weight, storages)
        a_down, a_up = _factors("A", parts, wide)
        b = _factors("B", parts, wide)
        c, d, e = _bias_terms(bias, parts, wide)
        if product == "hadamard":
            return Terms(LowRank(a_down, a_up), LowRank(*b), c, d, e)
        low_rank = parts["A"].low_rank
        projected = _Project.apply(weight, a_down.masked_fill(~low_rank, 0))
        both = LowRank(torch.cat([projected, b[0]], 1), torch.cat([a_up, b[1]]))
        return Terms(Vector(a_down[:, 0].masked_fill(low_rank, 0)), both, c, d, e, "matmul")


def row_scaled_terms(weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor], config: Tensor) -> Terms:
    """As :func:`masked_terms` for the hadamard product, where A is known to be no low rank: it is a vector then.

    A low-rank A would be read as a vector.
    """
    _check(weight, storages, config, "hadamard")
    _, weight, bias = cast_operands(weight, weight, bias)
    with without_autocast(weight.device.type):
        parts, wide = _parts(config, storages), _widened(weight, storages)
        rows = _left(wide[PLACES["A"][0]][:, :1], parts["A"])[:, 0]
        return Terms(Vector(rows), LowRank(*_factors("B", parts, wide)), *_bias_terms(bias, parts, wide))


def storages_read(config: Tensor) -> Tensor:
    """Which of the eight storages each path reads: ``(..., 5, 2) -> (..., 8)``, of booleans, on the device."""
    kinds = config[..., 0]
    read, low_rank = kinds > 0, kinds == CODES["lora"]
    flags = [read[..., slot] if place == 0 else low_rank[..., slot] for slot, place in _SLOT_AND_PLACE]
    return torch.stack(flags, -1)


_SLOT_AND_PLACE = [(SLOTS.index(slot), place) for slot in SLOTS for place in range(len(PLACES[slot]))]


def _parts(config: Tensor, storages: Sequence[Tensor]) -> dict[str, _Part]:
    kinds, ranks = config[:, 0], config[:, 1]
    low_rank, constant = kinds == CODES["lora"], kinds == CODES["constant"]
    widths = torch.where(low_rank, ranks, kinds.clamp(max=1))
    largest = max(storages[PLACES[slot][0]].shape[-1] for slot in "ABC")
    unread = torch.arange(largest, device=config.device) >= widths[:, None]
    return {slot: _Part(low_rank[i], constant[i], unread[i]) for i, slot in enumerate(SLOTS)}


def _widened(weight: Tensor, storages: Sequence[Tensor]) -> list[Tensor]:
    return [storage.to(compute_dtype(weight.dtype)) for storage in storages]


def _factors(slot: str, parts: dict[str, _Part], storages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The slot as ``left @ right``, at the full rank of its storages."""
    down, up = (storages[place] for place in PLACES[slot])
    return _left(down, parts[slot]), _right(up, parts[slot])


def _bias_terms(
    bias: Tensor | None, parts: dict[str, _Part], storages: Sequence[Tensor]
) -> tuple[Vector, Vector | None, Vector]:
    """C, D and E as vectors; D has nothing to scale without a bias."""
    down, up = _factors("C", parts, storages)
    d, e = (Vector(_left(storages[PLACES[slot][0]][:, None], parts[slot])[:, 0]) for slot in "DE")
    return Vector(torch.mv(down, up[:, 0])), None if bias is None else d, e


def _left(down: Tensor, part: _Part) -> Tensor:
    """The columns that are read, or the first element in all of the first column; zero elsewhere."""
    value = torch.where(part.constant, down[:1, :1], down)
    return value.masked_fill(part.unread[: down.shape[1]], 0)


def _right(up: Tensor, part: _Part) -> Tensor:
    """The rows that are read, or ones in the first row; zero elsewhere."""
    rank = up.shape[0]
    ones = (torch.arange(rank, device=up.device) == 0)[:, None].to(up.dtype)
    return torch.where(part.low_rank, up.masked_fill(part.unread[:rank, None], 0), ones)


class _Project(torch.autograd.Function):
    """``W0 down``, in the dtype of ``down``; kept for backward is W0 as it is, not as it is cast."""

    @staticmethod
    def forward(ctx, weight: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.to(down.dtype) @ down

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        return None, weight.t().to(grad.dtype) @ grad


def _check(weight: Tensor, storages: Sequence[Tensor], config: Tensor, product: str) -> None:
    if product not in PRODUCTS:
        raise ValueError(f"product: expected one of {PRODUCTS}, got {product!r}")
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (N, K), got {tuple(weight.shape)}")
    if len(storages) != len(STORAGES):
        raise ValueError(f"storages: expected the {len(STORAGES)} tensors {STORAGES}, got {len(storages)}")
    for (name, expected), storage in zip(_shapes(weight, storages, product), storages):
        check_tensor(name, storage)
        if tuple(storage.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(storage.shape)}")
        if storage.device != weight.device:
            raise ValueError(f"{name}: expected device {weight.device} (that of weight), got {storage.device}")
    if tuple(config.shape) != (len(SLOTS), 2) or config.dtype != torch.int64:
        raise ValueError(f"config: expected int64 of shape ({len(SLOTS)}, 2), got {config.dtype} {tuple(config.shape)}")
    if config.device != weight.device:
        raise ValueError(f"config: expected device {weight.device} (that of weight), got {config.device}")


def _shapes(weight: Tensor, storages: Sequence[Tensor], product: str) -> list[tuple[str, tuple[int, ...]]]:
    rows, columns = weight.shape
    a, b, c = (storages[PLACES[slot][0]].shape[-1] if storages[PLACES[slot][0]].dim() else 0 for slot in "ABC")
    left = rows if product == "hadamard" else columns
    shapes = [(left, a), (a, columns), (rows, b), (b, columns), (columns, c), (c, 1), (rows,), (rows,)]
    return list(zip(STORAGES, shapes))
