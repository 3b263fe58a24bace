"""Kinds and ranks as data on the device: masks, not branches on the host, say what is read of every storage.

Every path is put into terms of one fixed form, which the ordinary operations then compute. A vector is
``down[:, 0] 1^T`` and a constant ``down[0, 0] 1 1^T``, so that for the hadamard product

    A = a_down a_up,  B = b_down b_up,  c = c_down c_up,  d and e as vectors

hold every path, with zeros where a factor is not read. For the matmul product a vector or constant is a diagonal s:
``W0 A = W0 diag(s) + (W0 a_down) a_up``, whose second term has the form of B and is added to B.

What is not read is replaced (``where``, ``masked_fill``), never multiplied by zero: NaN in it reaches neither the
output nor a gradient, and its own gradient is exactly zero. Only plain operations, no synchronisation, no shape that
depends on values: a CUDA graph or a compiled graph of it serves every path.

Cost in dense products of 2 M N K operations: 3 for the hadamard product, since the graph of a low-rank A has to be
there for every path, or 2 where :func:`row_scaled_terms` will do; 2 for the matmul product. The selection itself is
fourteen small operations forward and twenty-five backward, which a compiler fuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_tensor
from ..path_encoding import CODES, PLACES, STORAGES
from ..precision import cast_operands, without_autocast
from ..terms import PRODUCTS, SLOTS, LowRank, Terms, Vector, compute_dtype


class Masks(NamedTuple):
    """What is read of the storages of one slot: booleans over the columns of its left storage, ``(R,)`` each.

    Attributes:
        unread: the column is not read at its own place, as a low rank or a vector.
        unspread: the column does not hold the one element of a constant, which is read for every row.
        unranked: neither the column nor its row of the right storage is read as a low rank.
        unscaled: the column is not read as a vector.
        first: it is the first column. The right factor of a vector or constant has ones there.
    """

    unread: Tensor
    unspread: Tensor
    unranked: Tensor
    unscaled: Tensor
    first: Tensor


def path_masks(config: Tensor, rank: int) -> Tensor:
    """Kinds and ranks as masks: ``(..., 5, 2) -> (..., 5, 5, R)`` of booleans, slots by the fields of :class:`Masks`.

    Args:
        config: what :func:`glora_kernels.encode` makes, one or a stack of them, on any device.
        rank: R, the largest rank of any storage that the masks will be used for.

    Raises:
        ValueError: another shape, or a rank below 1.
    """
    if config.dim() < 2 or tuple(config.shape[-2:]) != (len(SLOTS), 2):
        raise ValueError(f"config: expected shape (..., {len(SLOTS)}, 2), got {tuple(config.shape)}")
    if rank < 1:
        raise ValueError(f"rank: expected an integer from 1, got {rank}")
    kinds, ranks = config[..., :1], config[..., 1:]
    columns = torch.arange(rank, device=config.device)
    ranked = (kinds == CODES["lora"]) & (columns < ranks)
    scaled = (kinds == CODES["vector"]) & (columns == 0)
    spread = (kinds == CODES["constant"]) & (columns == 0)
    first = (columns == 0).expand_as(ranked)
    return torch.stack([~(ranked | scaled), ~spread, ~ranked, ~scaled, first], -2)


def storages_read(masks: Tensor) -> Tensor:
    """Which of the eight storages each path reads: ``(..., 5, 5, R) -> (..., 8)`` of booleans, on the device."""
    unread, unspread, unranked, *_ = masks[..., 0].unbind(-1)
    read = ~(unread & unspread)
    slots = [(SLOTS.index(slot), place) for slot in SLOTS for place in range(len(PLACES[slot]))]
    return torch.stack([(~unranked if place else read)[..., slot] for slot, place in slots], -1)


def masked_terms(
    weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor], masks: Tensor, product: str = "hadamard"
) -> Terms:
    """The terms that ``masks`` select, in one form for all kinds and ranks.

    :func:`glora_kernels.glora_linear` and its siblings compute with them what they compute with the ordinary terms.
    First derivatives reach the storages, zero where these are not read. For the matmul product B also holds A's.

    Args:
        weight, bias: frozen ``W0``, ``(N, K)``, and ``b0``, ``(N,)`` or None, as the operation gets them.
        storages: Ad, Au, Bd, Bu, Cd, Cu, D, E, in the shapes of the product; all of them.
        masks: ``(5, 5, R)``, what :func:`path_masks` makes, on the device of ``weight``. It is not read on the host
            and so not checked: a rank above that of a storage reads all of it.
        product: ``"hadamard"`` or ``"matmul"``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    _check(weight, storages, masks, product)
    _, weight, bias = cast_operands(weight, weight, bias)
    with without_autocast(weight.device.type):
        slots, wide = _by_slot(masks), _widened(weight, storages)
        b, (c, d, e) = _factors("B", slots, wide), _bias_terms(bias, slots, wide)
        if product == "hadamard":
            return Terms(LowRank(*_factors("A", slots, wide)), LowRank(*b), c, d, e)
        down, up = (wide[place] for place in PLACES["A"])
        ranked = slots["A"].unranked[: down.shape[1]]
        projected = _Project.apply(weight, down.masked_fill(ranked, 0))
        both = LowRank(torch.cat([projected, b[0]], 1), torch.cat([_right(up, slots["A"]), b[1]]))
        return Terms(_scale(down, slots["A"]), both, c, d, e, product)


def row_scaled_terms(weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor], masks: Tensor) -> Terms:
    """As :func:`masked_terms` for the hadamard product, if A is known to be no low rank: it is a vector then.

    A low-rank A would be read as none.
    """
    _check(weight, storages, masks, "hadamard")
    _, weight, bias = cast_operands(weight, weight, bias)
    with without_autocast(weight.device.type):
        slots, wide = _by_slot(masks), _widened(weight, storages)
        scale = _scale(wide[PLACES["A"][0]], slots["A"])
        return Terms(scale, LowRank(*_factors("B", slots, wide)), *_bias_terms(bias, slots, wide))


def _by_slot(masks: Tensor) -> dict[str, Masks]:
    return {slot: Masks(*part.unbind()) for slot, part in zip(SLOTS, masks)}


def _widened(weight: Tensor, storages: Sequence[Tensor]) -> list[Tensor]:
    return [storage.to(compute_dtype(weight.dtype)) for storage in storages]


def _factors(slot: str, slots: dict[str, Masks], storages: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The slot as ``left @ right``, at the full rank of its storages."""
    down, up = (storages[place] for place in PLACES[slot])
    rank, masks = down.shape[1], slots[slot]
    return _Left.apply(down, masks.unread[:rank], masks.unspread[:rank]), _right(up, masks)


def _bias_terms(
    bias: Tensor | None, slots: dict[str, Masks], storages: Sequence[Tensor]
) -> tuple[Vector, Vector | None, Vector]:
    """C, D and E as vectors; D has nothing to scale without a bias."""
    down, up = _factors("C", slots, storages)
    d, e = (storages[PLACES[slot][0]][:, None] for slot in "DE")
    scaled = None if bias is None else _scale(d, slots["D"])
    return Vector((down @ up).squeeze(1)), scaled, _scale(e, slots["E"])


def _scale(down: Tensor, masks: Masks) -> Vector:
    """A vector or constant as one value per row; zero for other kinds."""
    return Vector(_Left.apply(down[:, :1], masks.unscaled[:1], masks.unspread[:1]).squeeze(1))


def _right(up: Tensor, masks: Masks) -> Tensor:
    """The rows that are read, or else ones in the first row; zero elsewhere. A left factor of zero makes it none."""
    rank = up.shape[0]
    return _Right.apply(up, masks.unranked[:rank, None], masks.first[:rank, None])


class _Left(torch.autograd.Function):
    """Columns that are read at their places, the one element that is spread over a column, and zero elsewhere."""

    @staticmethod
    def forward(ctx, down: Tensor, unread: Tensor, unspread: Tensor) -> Tensor:
        ctx.save_for_backward(unread, unspread)
        return torch.where(unread, down[:1].masked_fill(unspread, 0), down)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        unread, unspread = ctx.saved_tensors
        result = grad.masked_fill(unread, 0)
        result[:1].add_(grad.sum(0, keepdim=True).masked_fill(unspread, 0))
        return result, None, None


class _Right(torch.autograd.Function):
    """Rows that are read, the row of ones where the first is not, and zero elsewhere."""

    @staticmethod
    def forward(ctx, up: Tensor, unranked: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(unranked)
        return torch.where(unranked, first, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (unranked,) = ctx.saved_tensors
        return grad.masked_fill(unranked, 0), None, None


class _Project(torch.autograd.Function):
    """``W0 down``, in the dtype of ``down``; W0 itself is kept for backward, not its cast."""

    @staticmethod
    def forward(ctx, weight: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.to(down.dtype) @ down

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        return None, weight.t().to(grad.dtype) @ grad


def _check(weight: Tensor, storages: Sequence[Tensor], masks: Tensor, product: str) -> None:
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
    rank = max(storages[PLACES[slot][0]].shape[1] for slot in "ABC")
    expected = (len(SLOTS), len(Masks._fields), max(rank, masks.shape[-1] if masks.dim() else 0))
    if tuple(masks.shape) != expected or masks.dtype != torch.bool:
        raise ValueError(
            f"masks: expected torch.bool of shape {expected[:2]} and a rank from {rank}, got {masks.dtype} "
            f"{tuple(masks.shape)}"
        )
    if masks.device != weight.device:
        raise ValueError(f"masks: expected device {weight.device} (that of weight), got {masks.device}")


def _shapes(weight: Tensor, storages: Sequence[Tensor], product: str) -> list[tuple[str, tuple[int, ...]]]:
    rows, columns = weight.shape
    a, b, c = (storages[PLACES[slot][0]].shape[-1] if storages[PLACES[slot][0]].dim() else 0 for slot in "ABC")
    left = rows if product == "hadamard" else columns
    shapes = [(left, a), (a, columns), (rows, b), (b, columns), (columns, c), (c, 1), (rows,), (rows,)]
    return list(zip(STORAGES, shapes))
