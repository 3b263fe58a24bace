"""Running again only what differs from the run before: outputs of the first children of a Sequential, kept.

Where the paths of two candidates agree in the first children of an ``nn.Sequential`` (a ViT's ``blocks``, a Swin's
``layers`` and the ``blocks`` of each, a ConvNeXt's ``stages``), and its input has the very same bits, the output of
the last of these children is known. Nothing is assumed of the model around it:

- A Sequential is served where its own forward is called; children that are called one by one run as ever.
- Children are passed over only if nothing but their input and their paths can matter: all their modules in eval mode,
  which is taken to be a pure function, and without hooks or a forward of their own.
- A tensor that was written to since it was kept is not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..config import PathConfig
from ..layers.plain import is_bare
from ..models.modules import evaluating, glora_layers

Paths = Mapping[str, PathConfig]


class _Kept(NamedTuple):
    """A tensor, no copy; its version tells whether it was written to since. ``runs``: of how many children it came."""

    tensor: Tensor
    version: int
    runs: int

    @property
    def intact(self) -> bool:
        return self.tensor._version == self.version


@dataclass
class _Trail:
    """What is kept of one call of one Sequential: its input and the outputs of its first children, in order."""

    paths: Paths = field(default_factory=dict)
    kept: list[_Kept] = field(default_factory=list)


@dataclass
class _Sequence:
    """A Sequential, the adapted layers of each child, how many first children are pure, its calls in this batch."""

    module: nn.Sequential
    names: list[list[str]]
    pure: int = 0
    calls: int = 0


class PrefixReuse:
    """Keeps outputs of children from one run of a model over a data set to the next; the bits are those without it.

    Args:
        model: with its adapted layers. Its weights may not change between runs.
        capacity: bytes that may be kept. Each batch has an equal share, filled from the first child on.

    Attributes:
        saved, ran: children that were passed over, and that were run. One that holds children of another such
            Sequential counts as those.
    """

    def __init__(self, model: nn.Module, capacity: int):
        self.capacity, self.saved, self.ran = capacity, 0, 0
        self._model, self._sequences = model, _find_sequences(model)
        self._trails: dict[tuple[int, int, int], _Trail] = {}  # of a Sequential, a batch, a call in it
        self._used: Counter[int] = Counter()  # bytes of a batch
        self._batch, self._share = 0, 0
        self._paths: Paths = {}

    @property
    def counts(self) -> tuple[int, int]:
        return self.saved, self.ran

    @property
    def kept_bytes(self) -> int:
        return sum(self._used.values())

    def forget(self) -> None:
        """Free what is kept, which is of no use for other data."""
        self._trails.clear()
        self._used.clear()

    @contextmanager
    def running(self, paths: Paths, batches: int) -> Iterator[Callable[[nn.Module, int, Any], Any]]:
        """Yields ``call(model, batch number, x)``, to take the place of ``model(x)`` in a run under ``paths``."""
        self._paths, self._share = paths, self.capacity // batches
        own = [(i, sequence) for i, sequence in enumerate(self._sequences) if "forward" not in vars(sequence.module)]
        with evaluating(self._model):
            for _, sequence in own:
                sequence.pure = _count_pure(sequence.module)
            with _forwards({sequence.module: partial(self._run, i) for i, sequence in own}):
                yield self._call

    def _call(self, model: nn.Module, batch: int, x: Any) -> Any:
        self._batch = batch
        for sequence in self._sequences:
            sequence.calls = 0
        return model(x)

    def _run(self, index: int, x: Any) -> Any:
        """The forward of a Sequential."""
        sequence = self._sequences[index]
        trail = self._trails.setdefault((index, self._batch, sequence.calls), _Trail())
        sequence.calls += 1
        start = self._start(sequence, trail, x)
        self._drop(trail, start + 1)
        trail.paths = self._paths
        self.saved += sum(entry.runs for entry in trail.kept[1:])
        growing = bool(trail.kept) or self._keep(trail, x, 0)
        if start:
            x = trail.kept[start].tensor
        for child in list(sequence.module)[start:]:
            x, runs = self._run_child(child, x)
            growing = growing and self._keep(trail, x, runs)
        return x

    def _start(self, sequence: _Sequence, trail: _Trail, x: Any) -> int:
        """How many children need not run for this input; of another one nothing is kept any longer."""
        kept = trail.kept
        if not kept or not kept[0].intact or not _same_bits(kept[0].tensor, x):
            self._drop(trail, 0)
            return 0
        agreeing = 0
        for names in sequence.names[: sequence.pure]:
            if any(trail.paths[name] != self._paths[name] for name in names):
                break
            agreeing += 1
        return max(i for i, entry in enumerate(kept[: agreeing + 1]) if entry.intact)

    def _run_child(self, child: nn.Module, x: Any) -> tuple[Any, int]:
        """Its output, and as how many children it counts."""
        before = self.saved + self.ran
        x = child(x)
        within = self.saved + self.ran - before
        self.ran += not within
        return x, within or 1

    def _drop(self, trail: _Trail, start: int) -> None:
        self._used[self._batch] -= sum(_bytes(entry.tensor) for entry in trail.kept[start:])
        del trail.kept[start:]

    def _keep(self, trail: _Trail, x: Any, runs: int) -> bool:
        """Whether ``x`` is kept: a plain tensor for which the batch has room."""
        if type(x) is not Tensor or x.is_inference() or self._used[self._batch] + _bytes(x) > self._share:
            return False
        trail.kept.append(_Kept(x, x._version, runs))
        self._used[self._batch] += _bytes(x)
        return True


def _find_sequences(model: nn.Module) -> list[_Sequence]:
    """Every exact ``nn.Sequential`` with an adapted layer somewhere in it."""
    named = {layer: name for name, layer in glora_layers(model).items()}
    exact = [module for module in model.modules() if type(module) is nn.Sequential]
    found = [
        _Sequence(module, [[named[m] for m in child.modules() if m in named] for child in module]) for module in exact
    ]
    return [sequence for sequence in found if any(sequence.names)]


def _count_pure(sequence: nn.Sequential) -> int:
    """How many first children depend on their input alone."""
    if _has_any_global_hook():
        return 0
    for count, child in enumerate(sequence):
        if any(module.training or not is_bare(module) for module in child.modules()):
            return count
    return len(sequence)


@contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[[Any], Any]]) -> Iterator[None]:
    """Other forwards of modules, for a ``with`` block."""
    try:
        for module, forward in replacements.items():
            module.forward = forward
        yield
    finally:
        for module in replacements:
            vars(module).pop("forward", None)


def _bytes(tensor: Tensor) -> int:
    """What keeping ``tensor`` keeps: all of its storage."""
    return tensor.untyped_storage().nbytes()


def _same_bits(one: Tensor, other: Any) -> bool:
    """Whether no operation can tell them apart: equal in layout and bytes; 0.0 is not -0.0, a NaN equals itself."""
    if type(other) is not Tensor or one.layout != torch.strided or other.layout != torch.strided:
        return False
    form = (one.dtype, one.device, one.shape, one.stride())
    if form != (other.dtype, other.device, other.shape, other.stride()):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
