"""How a run was made; runs made differently get different settings, so that no mean is taken over both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .runs import Run, Setting

Conditions = Mapping[str, str]
# No result depends on these.
_WITHOUT_EFFECT = ("workers", "checkpoint_epochs", "validate")


def tell_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs. If runs of one setting differ in their conditions, their methods say in which.

    >>> [run.setting.method for run in tell_apart(runs)]
    ['GLoRA 0.86M, epochs 6', 'GLoRA 0.86M, epochs 500']
    """
    found: dict[Setting, list[Conditions]] = defaultdict(list)
    for run in runs:
        found[run.setting].append(conditions(run))
    differing = {setting: _differing(each) for setting, each in found.items()}
    return [_with_conditions(run, differing[run.setting]) for run in runs]


def conditions(run: Run) -> Conditions:
    """What two runs must share for a mean over their seeds and data sets, as text.

    That is the weights, and the recipe without the entries that choose runs (seeds, shots, other sizes). A search
    adds its own settings, limit and metric, which may differ from the recipe's, and so does a refit; a run without has
    none. Names are those of ``--set``; entries of training and search come without the name of their table.
    """
    spec, search = run.spec, run.search
    recipe = asdict(spec.recipe)
    found: dict[str, Any] = {"weights": weights(run)}
    tables = ("model", spec.recipe.samples)
    found |= {f"{table}.{name}": value for table in tables for name, value in recipe[table].items()}
    found |= {name: value for name, value in recipe["training"].items() if name not in _WITHOUT_EFFECT}
    if spec.preset is not None:  # which have neither
        found = {name: value for name, value in found.items() if name not in ("balance", "shares")}
    else:
        found["ranks"] = spec.recipe.sizes[spec.size].ranks
    if search is not None:
        found |= {"limit": search.limit, "metric": search.metric}
        found |= {name: value for name, value in search.settings.items() if name != "seed"}
    if run.refit is not None:
        found |= {f"refit.{name}": value for name, value in run.refit.settings.items()}
    return {name: _text(value) for name, value in found.items()}


def weights(run: Run) -> str:
    """Where the backbone's weights are from: the hub, a file by its name and checksum, or nowhere."""
    source = run.spec.weights
    if source is None:
        return "none"
    checksum = run.folder.fingerprint.get("weights")
    return Path(source).name if checksum is None else f"{Path(source).name} (CRC-32 {checksum:08x})"


def _text(value: Any) -> str:
    if value is None or value in ([], (), {}):
        return "none"
    if isinstance(value, Mapping):
        return "/".join(f"{name} {_text(each)}" for name, each in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return "/".join(map(_text, value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if type(value) is int else str(value)


def _differing(found: Sequence[Conditions]) -> list[str]:
    """The names whose values, if there are any, are not all equal."""
    names = dict.fromkeys(name for each in found for name in each)
    return [name for name in names if len({each[name] for each in found if name in each}) > 1]


def _with_conditions(run: Run, names: Sequence[str]) -> Run:
    values = conditions(run)
    method = ", ".join([run.setting.method, *(f"{name} {values[name]}" for name in names if name in values)])
    return replace(run, setting=run.setting._replace(method=method))
