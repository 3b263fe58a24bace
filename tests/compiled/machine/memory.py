"""Global memory: the tensors of a launch, each far from the others.

A kernel is given an address of its own for each tensor, with the tensor's alignment. Between two tensors nothing is
mapped. So an access is in bounds only if the element belongs to a tensor: not to a gap between rows of a view either.

What one program of a launch writes, no other program may write, and nobody may read in that launch: programs run in
any order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .faults import Fault, Hazards
from .numbers import UNSIGNED, Array

_APART = 40  # two to the power of this lies between tensors
_MIDDLE = 1 << _APART - 1  # so that what lies in front of a tensor is told from what lies behind another
_KEPT = 256  # alignment is kept up to here
_WIDEST = 8  # bytes of the widest element


class Region:
    """Memory that tensors share, in units of the smallest of their elements."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], number: int):
        self.names = "/".join(tensors)
        self.real = min(tensor.data_ptr() for tensor in tensors.values())
        self.size = max(tensor.data_ptr() + _span(tensor) for tensor in tensors.values()) - self.real
        self.address = ((number + 1) << _APART) + _MIDDLE + self.real % _KEPT
        self.unit = min(tensor.element_size() for tensor in tensors.values())
        units = self.size // self.unit
        self.writer = np.zeros(units, np.int32)  # the program, counted from 1
        self.read = np.zeros(units, np.bool_)
        self.legal = _legal(tensors.values(), self.real, self.unit, units)
        self.before = self.real % _WIDEST  # bytes that views have in front, so that they begin at a multiple
        self._bytes = (ctypes.c_uint8 * (self.before + self.size)).from_address(self.real - self.before)
        self._views: dict[int, Array] = {}

    def view(self, width: int) -> Array:
        if width not in self._views:
            self._views[width] = np.frombuffer(self._bytes, UNSIGNED[8 * width], (self.before + self.size) // width)
        return self._views[width]


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first element to behind the last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _legal(tensors: Sequence[torch.Tensor], real: int, unit: int, units: int) -> Array | None:
    """Which units belong to a tensor; None for all."""
    if any(
        _span(tensor) == units * unit and tensor.numel() * tensor.element_size() == _span(tensor) for tensor in tensors
    ):
        return None
    legal = np.zeros(units, np.bool_)
    for tensor in tensors:
        parts = tensor.element_size() // unit
        view = torch.from_numpy(legal).as_strided(
            (*tensor.shape, parts), (*(parts * s for s in tensor.stride()), 1), (tensor.data_ptr() - real) // unit
        )
        view.fill_(True)
    return legal


class Memory:
    """The tensors of a launch, by the names of the arguments."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], hazards: Hazards):
        self.hazards = hazards
        self.regions = [Region(group, number) for number, group in enumerate(_overlapping(tensors))]

    def address(self, pointer: int) -> int:
        """The address that a kernel is given for a tensor's."""
        for region in self.regions:
            if region.real <= pointer < region.real + region.size:
                return region.address + pointer - region.real
        return 0  # of nothing

    def load(self, addresses: Array, width: int, count: int, what: str) -> list[Array]:
        """``count`` values of ``width`` bytes that lie one behind the other, for each address."""
        found = [np.empty(addresses.size, UNSIGNED[8 * width]) for _ in range(count)]
        for region, lanes, offsets in self._where(addresses, width * count, what):
            values, places = region.view(width), (offsets + region.before) // width
            for number, part in enumerate(found):
                part[lanes] = values[places + number]
            units = _units(offsets, width * count, region.unit)
            if (region.writer[units] != 0).any():
                self.hazards.note(f"a read of what the same launch writes ({region.names})", what)
            region.read[units] = True
        return found

    def store(self, addresses: Array, values: Sequence[Array], width: int, programs: Array, what: str) -> None:
        """One array of values for each of the elements that lie one behind the other."""
        for region, lanes, offsets in self._where(addresses, width * len(values), what):
            target, places = region.view(width), (offsets + region.before) // width
            for number, part in enumerate(values):
                target[places + number] = part[lanes]
            units, writers = _units(offsets, width * len(values), region.unit), programs[lanes]
            before = region.writer[units]
            if region.read[units].any():
                self.hazards.note(f"a write to what the same launch reads ({region.names})", what)
            region.writer[units] = writers if units.ndim == 1 else writers[:, None]
            now = region.writer[units]
            if ((before != 0) & (before != now)).any() or (writers != now.T).any():
                self.hazards.note(f"two programs write one address ({region.names})", what)

    def _where(self, addresses: Array, width: int, what: str):
        """The regions that are accessed, each with the lanes (a slice or bools) and the offsets in it."""
        if (addresses & np.uint64(width - 1)).any():
            raise Fault(f"misaligned access of {width} bytes to global memory: {what}")
        numbers = addresses >> np.uint64(_APART)
        first = numbers[0]
        if (numbers == first).all():
            yield self._in(int(first), slice(None), addresses, width, what)
        else:
            for number in np.unique(numbers):
                lanes = numbers == number
                yield self._in(int(number), lanes, addresses[lanes], width, what)

    def _in(self, number: int, lanes, addresses: Array, width: int, what: str):
        if not 0 < number <= len(self.regions):
            raise Fault(f"access out of bounds, to address {int(addresses[0]):#x} of no tensor: {what}")
        region = self.regions[number - 1]
        offsets = addresses.astype(np.int64) - region.address
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + width > region.size:
            shown = low if low < 0 else high
            raise Fault(f"access out of bounds, to byte {shown} of {region.size} of {region.names}: {what}")
        if region.legal is not None and not region.legal[_units(offsets, width, region.unit)].all():
            raise Fault(f"access to memory between the elements of {region.names}: {what}")
        return region, lanes, offsets


def _units(offsets: Array, width: int, unit: int) -> Array:
    first = offsets // unit
    return first if width <= unit else first[:, None] + np.arange(width // unit)


def _overlapping(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The tensors in groups that share memory."""
    groups: list[dict[str, torch.Tensor]] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if not tensor.numel():
            continue
        if tensor.data_ptr() < end:
            groups[-1][name] = tensor
        else:
            groups.append({name: tensor})
        end = max(end, tensor.data_ptr() + _span(tensor))
    return groups
