"""The paths of a model's layers as one tensor on their device, and the layers' computation from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels import encode, masked_terms, path_masks, row_scaled_linear, row_scaled_terms, storages_read

from ..config import PathConfig
from ..layers.base import GLoRALayer
from ..layers.conv2d import GLoRAConv2d
from ..paths import Paths, paths_of
from ..transfers import upload


class PathRow(NamedTuple):
    """The path of one layer as data on its device.

    Attributes:
        masks: ``(5, 5, R)``, see :func:`glora_kernels.path_masks`.
        factors: the scales of its kinds, ``(5,)``; None if all are 1.
    """

    masks: Tensor
    factors: Tensor | None


class PathData:
    """Kinds and ranks of every layer as masks in one small tensor, ``(layers, 5, 5, R)``, on the device of the layers.

    Attributes:
        masks: see :func:`glora_kernels.path_masks`; it stays the same tensor, so that a CUDA graph can read it.
        factors: of each layer the scales of the kinds of its path, ``(layers, 5)``, likewise; None if all scales are 1.

    Raises:
        ValueError: layers on several devices.
    """

    def __init__(self, layers: Mapping[str, GLoRALayer]):
        devices = {layer.weight.device for layer in layers.values()}
        if len(devices) != 1:
            raise ValueError(f"model: expected all adapted layers on one device, got {sorted(map(str, devices))}")
        self.layers = dict(layers)
        self._rank = max(layer.rank for layer in layers.values())
        nothing = dict.fromkeys(layers, PathConfig())
        self.masks = self._masks(nothing).to(device := devices.pop())
        self.factors = self._factors(nothing).to(device) if self._scaled else None

    @property
    def device(self) -> torch.device:
        return self.masks.device

    def checked(self, paths: Mapping[str, PathConfig] | PathConfig) -> Paths:
        """The paths by name. Raises ValueError or TypeError for another model's paths, or a rank above a storage's."""
        paths = paths_of(self.layers, paths)
        for name, layer in self.layers.items():
            if paths[name].rank > layer.rank:
                raise ValueError(
                    f"paths: expected ranks up to {layer.rank} (storage of layer {name!r}), got {paths[name]}"
                )
        return paths

    def set(self, paths: Mapping[str, PathConfig]) -> None:
        """Write checked paths into :attr:`masks`, without waiting for the device."""
        self.masks.copy_(upload(self._masks(paths), self.device))
        if self.factors is None and self._scaled:
            raise RuntimeError("model: expected scales of 1, as when this step was made, got others; make a new step")
        if self.factors is not None:
            self.factors.copy_(upload(self._factors(paths), self.device))

    @property
    def _scaled(self) -> bool:
        return any(layer.scales.factors for layer in self.layers.values())

    def _masks(self, paths: Mapping[str, PathConfig]) -> Tensor:
        return torch.stack([_masks_of(paths[name], self._rank) for name in self.layers])

    def _factors(self, paths: Mapping[str, PathConfig]) -> Tensor:
        return torch.stack([layer.scales.of_path(paths[name]) for name, layer in self.layers.items()])

    def rows(self) -> dict[str, PathRow]:
        """The part of :attr:`masks` and :attr:`factors` that belongs to each layer: views."""
        factors = [None] * len(self.layers) if self.factors is None else self.factors
        return {name: PathRow(*row) for name, row in zip(self.layers, zip(self.masks, factors))}

    def read(self) -> Tensor:
        """Which support tensors the paths read, ``(layers, 8)`` in the order of ``SUPPORT_NAMES``, on the device."""
        return storages_read(self.masks)


@cache
def _masks_of(path: PathConfig, rank: int) -> Tensor:
    return path_masks(encode({slot: (choice.kind, choice.rank) for slot, choice in path.choices.items()}), rank)


class PathAsData(nn.Module):
    """What ``layer`` computes under the path in ``row``, on its device, whatever that path is."""

    def __init__(self, layer: GLoRALayer, row: PathRow):
        super().__init__()
        self.layer, self.row = layer, row

    @property
    def storages(self) -> list[Tensor]:
        return self.layer.storages_times(self.row.factors)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return layer.compute(x, masked_terms(layer.matrix, layer.bias, self.storages, self.row.masks, layer.product))


class RowScaledPathAsData(PathAsData):
    """As :class:`PathAsData` for linear layers of the hadamard product, and paths where A is no low rank.

    It takes 2 dense products per step in place of 3.
    """

    def forward(self, x: Tensor) -> Tensor:
        matrix, bias = self.layer.matrix, self.layer.bias
        return row_scaled_linear(x, matrix, bias, row_scaled_terms(matrix, bias, self.storages, self.row.masks))


def cheapest(layer: GLoRALayer, row: PathRow, kinds: Collection[str]) -> PathAsData:
    """What computes ``layer`` with the fewest dense products under every path whose A is of one of ``kinds``."""
    row_scaled = layer.product == "hadamard" and not isinstance(layer, GLoRAConv2d) and "lora" not in kinds
    return (RowScaledPathAsData if row_scaled else PathAsData)(layer, row)


@contextmanager
def computed_by(computations: Mapping[GLoRALayer, nn.Module]) -> Iterator[None]:
    """Let other modules compute for layers in a ``with`` block; the hooks of the layers run as usual."""
    for layer, computation in computations.items():
        layer.forward = computation.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in computations:
            del layer.forward
