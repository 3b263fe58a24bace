"""Every check of the public functions, done once, before any work: expected and got, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from .terms import LowRank, Term, Terms, Vector

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> None:
    """Raise ValueError or TypeError if ``glora_linear(x, weight, bias, terms)`` is not a valid call."""
    check_layer(weight, bias, terms)
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least 1 dimension (..., K), got a 0-dimensional tensor")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected the last dimension to be K = {weight.shape[1]} (weight is "
            f"{tuple(weight.shape)}), got shape {tuple(x.shape)}"
        )
    check_operands(x, weight, bias)


def check_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError or TypeError if x is not of the weight's dtype and device, or the base is not frozen."""
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x: expected the dtype of weight, {weight.dtype}, got {x.dtype}; "
            "cast one of them or run under torch.autocast"
        )
    if x.device != weight.device:
        raise ValueError(f"x: expected device {weight.device} (that of weight), got {x.device}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: expected a frozen tensor, got one that requires grad; GLoRA has no "
                f"gradient for it (call {name}.requires_grad_(False))"
            )


def check_layer(weight: Tensor, bias: Tensor | None, terms: Terms) -> None:
    """Raise ValueError or TypeError if weight, bias and terms do not belong together."""
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (N, K), got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias: expected the dtype of weight, {weight.dtype}, got {bias.dtype}")
        if bias.device != weight.device:
            raise ValueError(f"bias: expected device {weight.device}, got {bias.device}")
    if not isinstance(terms, Terms):
        raise TypeError(f"terms: expected glora_kernels.Terms, got {type(terms).__name__}")
    for slot, term in terms.active:
        check_term(slot, term, weight, terms.product)


def _sides(slot: str, rows: int, columns: int, product: str) -> tuple[int, int]:
    """The shape (rows, columns) of the matrix a term stands for; a vector has one value per row."""
    if slot == "A":
        return (rows if product == "hadamard" else columns), columns
    return {"B": (rows, columns), "C": (columns, 1), "D": (rows, 1), "E": (rows, 1)}[slot]


def check_term(slot: str, term: Term, weight: Tensor, product: str) -> None:
    """Raise ValueError or TypeError if ``term`` cannot stand in ``slot`` of a layer of this ``weight``, (N, K)."""
    rows, columns = _sides(slot, weight.shape[0], weight.shape[1], product)
    for storage in term.storages:
        check_tensor(slot, storage)
    if isinstance(term, LowRank):
        _check_low_rank(slot, term, rows, columns)
    elif isinstance(term, Vector):
        shape = tuple(term.value.shape)
        if not 1 <= len(shape) <= 2 or shape[0] != rows or (len(shape) == 2 and not shape[1]):
            raise ValueError(f"{slot}: expected a vector of shape ({rows},) or a storage ({rows}, R), got {shape}")
    elif term.value.numel() == 0:
        raise ValueError(f"{slot}: expected a constant of at least one element, got {tuple(term.value.shape)}")
    for storage in term.storages:
        if storage.device != weight.device:
            raise ValueError(f"{slot}: expected device {weight.device}, got {storage.device}")


def _check_low_rank(slot: str, term: LowRank, rows: int, columns: int) -> None:
    down, up = tuple(term.down.shape), tuple(term.up.shape)
    if len(down) != 2 or down[0] != rows:
        raise ValueError(f"{slot}.down: expected shape ({rows}, R), got {down}")
    if up != (down[1], columns):
        raise ValueError(f"{slot}.up: expected shape ({down[1]}, {columns}), got {up}")
    rank = down[1] if term.rank is None else term.rank
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{slot}.rank: expected an int or None, got {type(rank).__name__}")
    if not 1 <= rank <= down[1]:
        raise ValueError(f"{slot}.rank: expected 1 to {down[1]} (the rank of its storage), got {rank}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating dtype (fp16, bf16, fp32, fp64), got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
