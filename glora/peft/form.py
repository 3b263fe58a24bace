"""The one form that PEFT's GLoRA has for a whole adapter, and what it keeps of a layer.

It has a kind for A and B, one for C, one for D and E, and one rank. A folder holds ``adapter_config.json`` and
``adapter_model.safetensors``, whose tensors hold only what is read, named
``base_model.model.<layer>.glora_<slot>.<name>``:

========  ==========================  ==========================  ============
kind      A and B                     C                           D and E
========  ==========================  ==========================  ============
lora      ``Xd (N, r)  Xu (r, K)``    ``Xd (K, r)  Xu (r, 1)``    -
vector    ``X (N, 1)``                ``X (K, 1)``                ``X (N,)``
constant  ``X (1,)``                  -                           ``X (1,)``
none      ``zeros (N, K)``            ``zeros (K, 1)``            ``zeros (N,)``
========  ==========================  ==========================  ============

Layers without bias have none of C, D and E, whatever the form says.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..config import PathConfig
from ..layers.base import GLoRALayer

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FIELDS = {"config_A_B": "A", "config_C": "C", "config_D_E": "D"}  # with the slot that each speaks for


class Form(NamedTuple):
    """What PEFT says of a whole adapter: fields of its GloraConfig."""

    kinds: dict[str, str]
    rank: int

    def path(self, bias: bool) -> PathConfig:
        """Our path that does the same."""
        a, c, d = (f"lora_{self.rank}" if kind == "lora" else kind for kind in self.kinds.values())
        return PathConfig(a, a, c, d, d) if bias else PathConfig(a, a)

    def shapes(self, linear: nn.Linear | GLoRALayer) -> dict[str, tuple[int, ...]]:
        """The shapes of everything that PEFT keeps for a layer, by ``glora_<slot>.<name>``."""
        sizes = linear.out_features, linear.in_features
        return {
            f"glora_{slot}.{name}": shape
            for slot, choice in self.path(linear.bias is not None).choices.items()
            for name, shape in _stored(slot, choice.kind, self.rank, *sizes).items()
        }


def _stored(slot: str, kind: str, rank: int, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """A row of the table at the top of this file, for one slot."""
    first, *others = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1)}.get(slot, (rows,))
    if kind == "lora":
        return {"Xd": (first, rank), "Xu": (rank, *others)}
    if kind == "vector":
        return {"X": (first, 1) if others else (first,)}
    return {"X": (1,)} if kind == "constant" else {"zeros": (first, *others)}


def read_parts(layer: GLoRALayer, path: PathConfig) -> dict[str, Tensor]:
    """What ``path`` reads of the layer's storages, by PEFT's names: views where the scale is 1."""
    parts: dict[str, Tensor] = {}
    for name, part in layer.parts_read(path).items():
        slot, factor = name[:1], name[1:]  # of "Ad": what a vector or a constant reads of it is PEFT's X alone
        parts[f"glora_{slot}.X{factor if path.choices[slot].kind == 'lora' else ''}"] = part
    return parts
