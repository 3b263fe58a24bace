"""An optimiser step on the device that leaves alone what the paths do not read.

In an ordinary loop the gradient of a support tensor that is not read is None, and the optimiser skips it: value,
moments, step count and weight decay. A graph cannot skip. So an ordinary step is taken with zeros as those gradients.
Then flags on the device select the old or the new value of each tensor and of all its state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from glora_kernels.torch_private import copy_each

from .step_body import unchanged

# Optimisers whose state is zero before a parameter's first step; only the others themselves know how they start.
_START_AT_ZERO = tuple(
    getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "Adamax", "Adadelta", "RMSprop", "RAdam")
)


class SelectiveUpdate:
    """``optimizer.step()`` that touches a parameter only where its flag is set.

    It takes three times the memory of the selected parameters with their state.

    Args:
        optimizer: with the state of every selected parameter in place (:func:`create_state`).
        places: the index of each selected parameter's flag. Other parameters are always updated.

    Raises:
        ValueError: state that is no tensor, or on another device than its parameter: no graph would change it.
    """

    def __init__(self, optimizer: Optimizer, places: Mapping[nn.Parameter, int]):
        self.optimizer = optimizer
        self._groups: dict[torch.dtype, list[Tensor]] = {}
        flags: dict[torch.dtype, list[int]] = {}
        for parameter, place in places.items():
            _check_state(optimizer, parameter)
            for tensor in (parameter.detach(), *state_tensors(optimizer, parameter)):
                self._groups.setdefault(tensor.dtype, []).append(tensor)
                flags.setdefault(tensor.dtype, []).append(place)
        self._owners = {dtype: _owners(flags[dtype], tensors) for dtype, tensors in self._groups.items()}

    @torch.no_grad()
    def step(self, flags: Tensor) -> None:
        """Take a step; ``flags`` are booleans on the device of the parameters."""
        before = {dtype: _flat(tensors) for dtype, tensors in self._groups.items()}
        self.optimizer.step()
        for dtype, tensors in self._groups.items():
            updated = flags.index_select(0, self._owners[dtype])
            kept = torch.where(updated, _flat(tensors), before[dtype])
            parts = kept.split([tensor.numel() for tensor in tensors])
            copy_each(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def _owners(places: list[int], tensors: Sequence[Tensor]) -> Tensor:
    """The index of the flag of every element."""
    counts = torch.tensor([tensor.numel() for tensor in tensors])
    owners = torch.repeat_interleave(torch.tensor(places, dtype=torch.int32), counts)
    return owners.to(tensors[0].device)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _check_state(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    for key, value in optimizer.state.get(parameter, {}).items():
        device = value.device if isinstance(value, Tensor) else None
        if value is not None and device != parameter.device:
            got = type(value).__name__ if device is None else f"a tensor on {device}"
            raise ValueError(
                f"optimizer: expected state in tensors on {parameter.device}, got {got} as {key!r} of "
                f"{type(optimizer).__name__}; if it has the option capturable=True, use that"
            )


def state_tensors(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What the optimiser keeps of a parameter, in a fixed order."""
    state = optimizer.state.get(parameter, {})
    return [value for _, value in sorted(state.items()) if isinstance(value, Tensor)]


def create_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Give every parameter the state that it would have before its first step; nothing else changes.

    Optimisers make state at a parameter's first step, which a graph cannot tell from others.

    Raises:
        ValueError: an optimiser whose state does not start at zero, for parameters that have none yet.
    """
    missing = [parameter for parameter in parameters if not state_tensors(optimizer, parameter)]
    if not missing:
        return
    with _gradients_of(optimizer, missing), unchanged([p.detach() for p in missing]):
        optimizer.step()
    created = [tensor for parameter in missing for tensor in state_tensors(optimizer, parameter)]
    if created and not starts_at_zero(optimizer):
        for parameter in missing:
            del optimizer.state[parameter]
        raise ValueError(
            f"optimizer: expected one whose state starts at zero ({', '.join(kind.__name__ for kind in _START_AT_ZERO)}"
            f"; SGD without dampening), or with the state of every parameter; got {type(optimizer).__name__} without"
        )
    for tensor in created:
        tensor.zero_()


def starts_at_zero(optimizer: Optimizer) -> bool:
    """Whether a first step from a state of zeros equals one from no state."""
    return type(optimizer) in _START_AT_ZERO and not any(group.get("dampening") for group in optimizer.param_groups)


@contextmanager
def _gradients_of(optimizer: Optimizer, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """For a ``with`` block, make the gradients of the ``chosen`` parameters zero and all others None."""
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.grad for parameter in every]
    optimizer.zero_grad(set_to_none=True)
    for parameter in chosen:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter, gradient in zip(every, before):
            parameter.grad = gradient
