"""What a schedule is made of: steps over named slots, as plain data.

A slot is a tensor of the call. The caller fills the slots of the operands; steps fill the others. Most of a schedule
does not depend on the number of tokens. What does is an :class:`Amount`, or counts in blocks of tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Union

import torch

from .settings import Tile


class Amount(NamedTuple):
    """An integer that depends on the number of tokens: ``fixed + per_block * blocks + per_token * tokens``.

    A block of tokens is what one program of the token pass owns.
    """

    fixed: int = 0
    per_block: int = 0
    per_token: int = 0

    def of(self, tokens: int, blocks: int) -> int:
        return self.fixed + self.per_block * blocks + self.per_token * tokens

    @property
    def settled(self) -> Amount | int:
        """The number itself where it is the same for all numbers of tokens."""
        return self if self.per_block or self.per_token else self.fixed


TOKENS, BLOCKS, NOTHING = Amount(per_token=1), Amount(per_block=1), Amount()
Size = Union[int, Amount]


class Allocate(NamedTuple):
    """Fill ``slot`` with unwritten memory."""

    slot: str
    shape: tuple[Size, ...]
    dtype: torch.dtype


class Copy(NamedTuple):
    """Replace ``slot`` by a contiguous copy without a pending negation."""

    slot: str


class Launch(NamedTuple):
    """Run a kernel.

    Attributes:
        kernel: its name, such as ``"token_pass"``.
        tile: its block sizes, warps and stages.
        programs: how many programs run, for each block of ``token_block`` tokens if that is not 0.
        arguments: by the names of the kernel's parameters, in their order. A name that ends with ``_ptr`` has a slot or
            None. Types are torch's.
    """

    kernel: str
    tile: Tile
    programs: int
    token_block: int
    arguments: dict[str, Any]


class Product(NamedTuple):
    """A dense product of the vendor's library, into ``slot``.

    Attributes:
        form: ``"linear"``: ``left right^T + bias``; ``"plain"``: ``left right``; ``"weight gradient"``:
            ``left^T right``, in fp32 for fp16, since sums in fp16 could overflow.
        shape: rows, columns and depth.
    """

    slot: str
    form: str
    left: str
    right: str
    bias: str | None
    shape: tuple[Size, Size, Size]


Step = Union[Allocate, Copy, Launch, Product]


class Gradient(NamedTuple):
    """Where the gradient of a storage lies in the slot ``grads``; it is cast to ``dtype`` if the buffer has another."""

    at: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Schedule(NamedTuple):
    """One pass of a call.

    Attributes:
        operands: the slots that the caller fills, in order.
        steps: what is done, in order.
        dtypes: the type of each slot that a kernel reads or writes.
        results: the slots that are returned; None for what there is not.
        gradients: one per storage of the problem, None where none is wanted.
        token_block: tokens per block, for :class:`Amount`.
        route: the route of a backward pass.
    """

    operands: tuple[str, ...]
    steps: tuple[Step, ...]
    dtypes: dict[str, torch.dtype]
    results: tuple[str | None, ...]
    gradients: tuple[Gradient | None, ...] = ()
    token_block: int = 0
    route: str | None = None

    @property
    def made(self) -> tuple[str, ...]:
        """The slots that steps fill."""
        return tuple(step.slot for step in self.steps if isinstance(step, (Allocate, Product)))


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)
