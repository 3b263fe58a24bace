"""Running schedules: a schedule is bound to kernels and a device once, and run often.

A :class:`Pass` is a schedule whose slots have numbers and whose kernels are known. A :class:`SizedPass` has the numbers
of one number of tokens filled in too, so that a call only puts its tensors into the places of pointers.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache, lru_cache
from hashlib import blake2b
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ..planning import settings
from ..planning.steps import Allocate, Amount, Copy, Launch, Schedule, Size, cdiv
from . import launch as launching
from .kernels import KERNELS
from .launch import ALIGNMENT, STREAM, BoundLaunch, SizedLaunch, launch

ALLOCATE, COPY, PRODUCT, LAUNCH = range(4)
Slots = list[Any]  # of tensors, None where there is none
_tables: dict[tuple[bytes, torch.device], Tensor] = {}


class View(NamedTuple):
    """A gradient as a view of the buffer of all gradients; cast to ``dtype`` if that is not None."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    at: int
    dtype: torch.dtype | None


class Operation(NamedTuple):
    """One step of a sized pass.

    Attributes:
        kind: ALLOCATE, COPY, PRODUCT or LAUNCH.
        slot: the slot that is filled; 0 for a launch.
        what: the function of a product, the shape of an allocation, or the launch.
        rest: takes what a product reads out of the slots; or the dtype of an allocation (None: that of the first slot).
    """

    kind: int
    slot: int
    what: Any
    rest: Any


class SizedPass:
    """A pass for one number of tokens."""

    __slots__ = ("blank", "forced", "gradients", "grads", "operations", "pointers", "results", "tokens")

    def __init__(self, found: Pass, tokens: int):
        self.tokens, self.forced = tokens, settings.forced
        self.results, self.gradients, self.grads = found.results, found.gradients, found.grads
        self.pointers, self.blank = found.pointers, found.blank
        blocks = cdiv(tokens, found.token_block) if found.token_block else 0
        self.operations = [_sized(operation, tokens, blocks) for operation in found.operations]

    def results_in(self, slots: Slots) -> list[Any]:
        """What the pass returns; None for what there is not."""
        return [None if number is None else slots[number] for number in self.results]

    def gradients_in(self, slots: Slots) -> list[Tensor | None]:
        """One gradient per storage: views of one buffer, contiguous, so that autograd need not copy them."""
        if self.grads is None:
            return [None] * len(self.gradients)
        buffer, found = slots[self.grads], []  # type: ignore[var-annotated]
        for view in self.gradients:
            if view is None:
                found.append(None)
                continue
            shape, strides, at, dtype = view
            grad = buffer.as_strided(shape, strides, at)
            found.append(grad if dtype is None else grad.to(dtype))
        return found

    def run(self, slots: Slots) -> None:
        """Fill the slots behind those of the operands; kernels read and write where the slots are."""
        like = slots[0]
        device = like.device.index
        direct = launching.direct
        if direct:
            if device != torch.cuda.current_device():
                with torch.cuda.device(device):
                    return self.run(slots)
            stream = triton.runtime.driver.active.get_current_stream(device)
            bits = 0
            for place in self.pointers:
                bits |= slots[place].data_ptr()
            direct = not bits % ALIGNMENT  # where a tensor is not aligned, the launch has another build
        for kind, slot, what, rest in self.operations:
            if kind == LAUNCH:
                if not direct:
                    kernel, grid, tile, named = what.as_named(slots)
                    launch(kernel, grid, tile, **named)
                    continue
                arguments = what.arguments.copy()
                for place, number in what.pointers:
                    arguments[place] = slots[number]
                arguments[STREAM] = stream
                try:
                    start = what.start or what.compile(arguments, device)
                    start(*arguments)
                except (AttributeError, TypeError) as error:  # raised before anything is launched
                    what.run_publicly(slots, error)
                    direct = False
            elif kind == ALLOCATE:
                slots[slot] = like.new_empty(what, dtype=rest)
            elif kind == PRODUCT:
                slots[slot] = what(*rest(slots))
            else:
                slots[slot] = slots[slot].resolve_neg().contiguous()


def _sized(operation: Operation, tokens: int, blocks: int) -> tuple[int, int, Any, Any]:
    kind, slot, what, rest = operation
    if kind == LAUNCH:
        return kind, slot, SizedLaunch(what, tokens, blocks), rest
    if kind == ALLOCATE and any(isinstance(size, Amount) for size in what):
        return kind, slot, tuple([_number(size, tokens, blocks) for size in what]), rest
    return operation


def _number(size: Size, tokens: int, blocks: int) -> int:
    return size.of(tokens, blocks) if isinstance(size, Amount) else size


class Pass:
    """A schedule on a device.

    Attributes:
        operations: its steps, with the numbers of slots.
        results: the numbers of the slots that are returned; None for what there is not.
        gradients: one view per storage, None where none is wanted; ``grads`` is the slot that they are views of.
        pointers: the slots of operands that kernels read or write.
        blank: as many None as there are slots behind those of the operands.
        token_block: tokens per block.
    """

    __slots__ = ("blank", "gradients", "grads", "operations", "pointers", "results", "token_block")

    def __init__(self, schedule: Schedule, device: torch.device):
        numbers = {name: number for number, name in enumerate((*schedule.operands, *schedule.made))}
        first = schedule.dtypes[schedule.operands[0]]
        self.token_block = schedule.token_block
        self.results = tuple([None if name is None else numbers[name] for name in schedule.results])
        operands = len(schedule.operands)
        self.blank = (None,) * len(schedule.made)
        self.operations = [_bound(step, numbers, first, device) for step in schedule.steps]
        read = {number for step in self.operations if step.kind == LAUNCH for _, number in step.what.pointers}
        self.pointers = tuple(sorted(number for number in read if number < operands))
        self.grads = numbers.get("grads")
        buffer = schedule.dtypes.get("grads")
        self.gradients = tuple(
            [
                None if g is None else _view(g.shape, g.at, None if g.dtype == buffer else g.dtype)
                for g in schedule.gradients
            ]
        )

    def sized(self, tokens: int) -> SizedPass:
        return SizedPass(self, tokens)


@lru_cache(maxsize=1 << 12)
def _view(shape: tuple[int, ...], at: int, dtype: torch.dtype | None) -> View:
    return View(shape, torch.empty(shape, device="meta").stride(), at, dtype)


def _bound(step: Any, numbers: dict[str, int], first: torch.dtype, device: torch.device) -> Operation:
    if isinstance(step, Launch):
        if "table_ptr" in step.arguments:
            rows = array("q", chain.from_iterable(step.arguments["table_ptr"])).tobytes()
            step = step._replace(arguments={**step.arguments, "table_ptr": table(rows, device)})
        return Operation(LAUNCH, 0, BoundLaunch(KERNELS[step.kernel], step, numbers), None)
    slot = numbers[step.slot]
    if isinstance(step, Allocate):
        return Operation(ALLOCATE, slot, step.shape, None if step.dtype == first else step.dtype)
    if isinstance(step, Copy):
        return Operation(COPY, slot, None, None)
    read = [numbers[step.left], numbers[step.right]]
    if step.form == "linear":
        read.append(numbers[step.bias or "bias"])  # that slot is empty where there is no bias
    return Operation(PRODUCT, slot, _PRODUCTS[step.form], itemgetter(*read))


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """``dW = dy^T x``, (N, K), in the type of dy; for fp16 in fp32, since sums in fp16 could overflow."""
    if dy.dtype != torch.float16:
        return torch.mm(dy.t(), x)
    if dy.is_cuda and not torch.version.hip:  # ROCm's library has no product of another output type
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return torch.mm(dy.t().float(), x.float())


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "plain": torch.mm,
    "weight gradient": _weight_gradient,
}


def table(rows: bytes, device: torch.device) -> Tensor:
    """The table of ``finish``, rows of int64, on the device: written when this returns, for launches on any stream.

    Tables are kept for good, since captured graphs and other streams read them; each takes less than a kilobyte.

    Raises:
        RuntimeError: the table is not there yet, and a CUDA graph is being captured.
    """
    key = blake2b(rows, digest_size=16).digest(), device
    found = _tables.get(key)
    return _tables.setdefault(key, _on_device(rows, device)) if found is None else found


def _on_device(rows: bytes, device: torch.device) -> Tensor:
    """A new table. The host waits for the copy alone, which has a stream of its own."""
    numbers = memoryview(rows).cast("q").tolist()
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "glora_kernels: expected that a layer call has run before a CUDA graph captures it, got a new one, "
                "whose table is not on the device; run the same step once before the capture, forward and backward, "
                "as torch.cuda.graph asks for"
            )
    with torch.cuda.stream(_copying(device)):
        return torch.tensor(numbers, dtype=torch.int64, device=device)


@cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
