"""How a run was made, and settings of their own for runs that were made differently: no mean is taken over both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .runs import Run, Setting

Conditions = Mapping[str, str]
# No result depends on them.
_WITHOUT_EFFECT = ("workers", "checkpoint_epochs")


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs; where those of one setting differ in their conditions, their methods say in what.

    >>> [run.setting.method for run in tell_apart(runs)]
    ['GLoRA 0.86M, epochs 6', 'GLoRA 0.86M, epochs 500']
    """
    found: dict[Setting, list[Conditions]] = defaultdict(list)
    for run in runs:
        found[run.setting].append(conditions(run))
    differing = {setting: _differing(each) for setting, each in found.items()}
    return [_with_conditions(run, differing[run.setting]) for run in runs]


def conditions(run: Run) -> Conditions:
    """Every value, as text, that runs of one setting must share to be averaged over their seeds and data sets.

    The recipe without what chooses the runs (seeds, shots, other sizes); of a searched run the search's own settings,
    limit and metric, in which it may differ from the recipe; the weights. Names are those of ``glora train --set``,
    those of training and search without their table's.
    """
    spec = run.spec
    recipe = spec.recipe.to_dict()
    training = {name: value for name, value in recipe["training"].items() if name not in _WITHOUT_EFFECT}
    found = {"weights": weights(run), "model": recipe["model"], "images": recipe["images"], **training}
    if spec.preset is None:
        search = run.search.settings if run.search else spec.recipe.search.to_dict()
        found |= {"ranks": spec.recipe.sizes[spec.size].ranks, "limit": run.limit}
        found |= {"metric": (run.search.metric if run.search else None) or spec.recipe.metric}
        found |= {name: value for name, value in search.items() if name != "seed"}
    return {name: _text(value) for name, value in _flat(found)}


def weights(run: Run) -> str:
    """Where the backbone's are from: the hub, a file by its name and checksum, or nowhere."""
    source = run.spec.weights
    if source is None:
        return "none"
    checksum = run.folder.fingerprint.get("weights")
    return Path(source).name if checksum is None else f"{Path(source).name} (CRC-32 {checksum:08x})"


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    if value is None or value in ([], ()):
        return "none"
    if isinstance(value, (list, tuple)):
        return "/".join(map(_text, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if type(value) is int else str(value)


def _differing(found: Sequence[Conditions]) -> list[str]:
    """The names whose values are not all the same."""
    names = dict.fromkeys(name for each in found for name in each)
    return [name for name in names if len({each.get(name, "none") for each in found}) > 1]


def _with_conditions(run: Run, names: Sequence[str]) -> Run:
    values = conditions(run)
    method = ", ".join([run.setting.method, *(f"{name} {values.get(name, 'none')}" for name in names)])
    return replace(run, setting=run.setting._replace(method=method))
