"""The stages of a run: train, search, refit, merge. Each reads files of those before; after a cut, call it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import differences
from ..config import LayerShape
from ..evolution.loop import SearchSettings, check_search, search
from ..files import make_folder, write_atomically
from ..formats.adapter_file import load_adapter, save_adapter
from ..merging import merge
from ..models.modules import glora_layers, module_types
from ..parameters import count_parameters
from ..paths import get_paths, set_paths
from ..processes import from_first, is_first
from ..progress import say
from ..refitting import refit
from ..sampling import PathSampler
from ..training.graphing import require_graphs
from ..training.loop import TrainSummary, train
from ..training.recipe import Recipe
from .fingerprint import fingerprint, list_checksum, require_unchanged
from .folder import (
    ADAPTER,
    CHECKPOINT,
    DESCRIPTION,
    JOURNAL,
    LOG,
    MERGED,
    PRETRAINED,
    REFIT,
    REFITTED,
    SEARCHED,
    SUPERNET,
    TRAINED,
    WEIGHTS,
    RunFolder,
    create_run,
    read_json,
    write_json,
)
from .models import largest_paths, make_backbone, make_model
from .recipes import MEAN, RefitSettings, change_recipe
from .samples import first_inputs, in_memory, loading_processes, open_splits, ready
from .spec import RunSpec
from .text_models import load_tokenizer, save_text_classifier

_SAMPLE = 8
_PACKAGES = {"images": ("glora", "torch", "timm"), "texts": ("glora", "torch", "transformers")}


@dataclass(frozen=True)
class SearchPlan:
    """How a run is searched: by default the recipe's settings and metric, and the limit of its size."""

    settings: SearchSettings
    metric: str
    limit: int | None


def train_run(
    study: Path, spec: RunSpec, device: torch.device, progress: bool = True, graphs: str = "auto"
) -> dict[str, Any]:
    """Train one run into its folder within ``study``; return the content of ``train.json``.

    A folder with the beginning of this run is continued; a finished one is left as it is.

    Args:
        graphs: whether steps run in CUDA graphs, as for :func:`glora.train`.

    Raises:
        ValueError: the folder is another run's, or was made with other weights or lists of images; see
            :func:`glora.train` for the rest.
    """
    require_graphs(graphs, device)
    splits = open_splits(spec)
    model = make_model(spec)
    layers = glora_layers(model)
    facts = {
        "layers": [[name, *layer.shape] for name, layer in layers.items()],
        "samples": {"train": len(splits.train), "validation": len(splits.validation)},
        "fingerprint": fingerprint(spec, splits),
        "versions": {package: version(package) for package in _PACKAGES[spec.recipe.samples]},
        "date": now(),
    }
    from_first(lambda: create_run(study, spec, facts).path)
    folder = RunFolder(study / spec.name)
    require_unchanged(folder, splits)
    if folder.has(TRAINED):
        return read_json(folder / TRAINED)
    if spec.space is not None and spec.recipe.training.validate:
        set_paths(model, largest_paths(model, spec.space))  # what the supernet is validated under
    if progress and spec.recipe.texts:
        load_tokenizer(spec.recipe.model.name, say)
    recipe = spec.recipe.training.recipe(spec.dataset, len(splits.train), spec.seed)
    if spec.preset:
        recipe = replace(recipe, balance=None)  # a preset has the scales of its method
    summary = train(
        model.to(device),
        in_memory(splits.train, spec, progress),
        recipe,
        space=spec.space,
        validation=in_memory(splits.validation, spec, progress) if spec.recipe.training.validate else None,
        checkpoint=folder / CHECKPOINT,
        log=folder / LOG,
        workers=loading_processes(spec),
        progress=progress,
        graphs=graphs,
    )
    trained = {"run": spec.name, **_told(summary, recipe, spec)}
    if is_first():
        save_adapter(model, folder / (ADAPTER if spec.preset else SUPERNET))
        write_json(folder / TRAINED, trained)
    return trained


def _told(summary: TrainSummary, recipe: Recipe, spec: RunSpec) -> dict[str, Any]:
    """What a run's folder says of a training."""
    seconds = summary.total_seconds
    return {
        "steps": summary.steps,
        "seconds": seconds,
        f"{spec.recipe.samples}_per_second": summary.steps * recipe.batch_size / seconds if seconds else 0.0,
        "loss": summary.losses[-1],
        **({"validation": summary.validations[summary.steps]._asdict()} if summary.validations else {}),
        "graphs": summary.graphs,
        "recipe": asdict(recipe),
    }


def search_settings(run: RunFolder, changes: Sequence[str] = (), limit: int | None = None) -> SearchPlan:
    """The plan of a search: the run's recipe with ``changes`` (``"search.generations=5"``), and another ``limit``.

    The seed of the search is the recipe's plus the run's, so runs of different seeds are also searched differently.

    Raises:
        ValueError: a run of a preset, which has nothing to search, or one that is not trained yet; a change outside of
            the search's settings.
    """
    if run.spec.space is None:
        raise ValueError(f"{run.path}: expected a supernet, got the preset {run.spec.preset!r}: nothing to search")
    run.require(SUPERNET, "train")
    recipe = change_recipe(run.spec.recipe, changes, only=("search", "metric"))
    settings = replace(recipe.search, seed=recipe.search.seed + run.spec.seed)
    return SearchPlan(settings, recipe.metric, _limit(run) if limit is None else limit)


def _limit(run: RunFolder) -> int | None:
    """The limit of the run's size, in parameters."""
    limit, space = run.spec.limit, run.spec.space
    if limit != MEAN or space is None:
        return limit  # type: ignore[return-value]
    layers = read_json(run / DESCRIPTION)["layers"]
    return int(PathSampler({name: LayerShape(*shape) for name, *shape in layers}, space).mean)


def search_run(
    run: RunFolder, plan: SearchPlan, device: torch.device, *, again: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Search the best path of a trained run on its validation split; return the content of ``search.json``.

    Args:
        again: first move an earlier search, and all files made from it, into a folder of their own.

    Raises:
        ValueError: not trained yet; other weights or lists of images than it was trained with; a limit that no path
            meets; the journal is another search's.
    """
    spec, space = run.spec, run.spec.space
    assert space is not None  # search_settings refuses presets
    supernet = run.require(SUPERNET, "train")
    splits = open_splits(spec)
    require_unchanged(run, splits)
    model = load_adapter(make_model(spec), supernet).to(device)
    validation = in_memory(splits.validation, spec, progress)
    sought: dict[str, Any] = {"limit": plan.limit, "settings": plan.settings, "metric": plan.metric}
    if again:
        check_search(model, space, validation, **sought)
        from_first(run.put_aside)
    workers = loading_processes(spec) if validation is splits.validation else 0
    result = search(model, space, validation, **sought, journal=run / JOURNAL, workers=workers, progress=progress)
    if not result.evaluated and run.has(ADAPTER) and run.has(SEARCHED):
        return read_json(run / SEARCHED)
    set_paths(model, result.best.paths)
    found = {"run": spec.name, "settings": plan.settings.to_dict(), "metric": plan.metric, **result.to_dict()}
    if is_first():
        save_adapter(model, run / ADAPTER)
        write_json(run / SEARCHED, found)
    return found


def refit_settings(run: RunFolder, changes: Sequence[str] = ()) -> RefitSettings:
    """The settings of a refit: those of the run's recipe with ``changes`` (``"refit.steps=300"``).

    Raises:
        ValueError: a run of a preset, whose path was trained itself, or one that is not searched yet; a change outside
            of the refit's settings.
    """
    if run.spec.preset is not None:
        raise ValueError(
            f"{run.path}: expected a searched run, got the preset {run.spec.preset!r}, whose path was trained itself: "
            "nothing to refit"
        )
    require_winner(run)
    return change_recipe(run.spec.recipe, changes, only=("refit",)).refit


def refit_run(
    run: RunFolder,
    settings: RefitSettings,
    device: torch.device,
    *,
    again: bool = False,
    progress: bool = True,
    graphs: str = "auto",
) -> dict[str, Any]:
    """Train the searched path of a run some steps more, before the test; return the content of ``refit.json``.

    It begins with the winner's weights, on the protocol's data for a last training, in which those of validation are
    (:class:`glora.protocols.Splits`). Its files are in a folder of their own (:attr:`RunFolder.refit`); those of the
    winner stay as they are. A refit that was cut is continued, a finished one is left as it is.

    Args:
        again: first move an earlier refit into a folder of its own.
        graphs: as for :func:`train_run`.

    Raises:
        ValueError: not searched yet; other weights or lists of images than the run was trained with; a refit of
            another winner or with other settings is there; see :func:`glora.train` for the rest.
    """
    require_graphs(graphs, device)
    spec, folder = run.spec, run.refit
    adapter = require_winner(run)
    splits = open_splits(spec)
    require_unchanged(run, splits)
    data, recipe = splits.train_and_validation, settings.recipe(spec.recipe.training, spec.dataset, spec.seed)
    described = {
        **folder.marks,
        "winner": run.winner,
        "settings": asdict(settings),
        "samples": len(data),
        "fingerprint": list_checksum(data),
    }
    if again:
        from_first(lambda: run.put_aside((REFIT,)))
    from_first(lambda: _begin_refit(folder, described))
    if folder.has(ADAPTER):
        return read_json(folder / REFITTED)
    model = load_adapter(make_model(spec), adapter).to(device)
    summary = refit(
        model,
        get_paths(model),
        in_memory(data, spec, progress),
        recipe,
        checkpoint=folder / CHECKPOINT,
        log=folder / LOG,
        workers=loading_processes(spec),
        progress=progress,
        graphs=graphs,
    )
    told = {**described, **_told(summary, recipe, spec)}
    if is_first():
        write_json(folder / REFITTED, told)
        save_adapter(model, folder / ADAPTER)  # last: with it the refit is complete
    return told


def _begin_refit(folder: RunFolder, described: Mapping[str, Any]) -> None:
    """Write the description of a refit; raise ValueError if the folder holds another one."""
    if folder.has(CHECKPOINT) or folder.has(ADAPTER):  # without, nothing is lost
        found = read_json(folder / REFITTED) if folder.has(REFITTED) else {}
        differing = differences({name: found.get(name) for name in described}, described)
        if differing:
            raise ValueError(f"{folder.path}: holds another refit: {differing}; `glora refit --again` puts it aside")
    else:
        make_folder("refit", folder.path)
        write_json(folder / REFITTED, described)


def winners(run: RunFolder) -> list[RunFolder]:
    """The folders of a run that hold a winner to be merged and tested: its own, and that of its refit if there is one.

    Raises:
        ValueError: no preset and not searched yet; a refit of another winner than the run's.
    """
    require_winner(run)
    if not run.refit.has(ADAPTER):
        return [run]
    if read_json(run.refit / REFITTED).get("winner") != run.winner:
        raise ValueError(
            f"{run.refit.path}: expected a refit of {run / ADAPTER}, got one of another winner; `glora refit --again` "
            "puts it aside"
        )
    return [run, run.refit]


def merge_run(run: RunFolder, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """Merge the winner of a run or of its refit into a plain model on disk; one of texts as ``save_pretrained`` does.

    Files of the same winner are left as they are: another machine may round the last bits differently.

    Returns:
        The model, in eval mode, and the content of ``merge.json``.

    Raises:
        ValueError: no preset and not searched yet; other weights or lists of images than it was trained with;
            a merged weight that is not finite.
    """
    from safetensors.torch import save

    spec = run.spec
    adapter = require_winner(run)
    splits = open_splits(spec)
    require_unchanged(run, splits)
    model = load_adapter(make_model(spec), adapter).to(device).eval()
    paths, parameters = get_paths(model), count_parameters(model)
    report = merge(model, first_inputs(ready(splits.validation, spec), _SAMPLE, device))
    written = run / (PRETRAINED if spec.recipe.texts else WEIGHTS)
    if written.exists() and run.has(MERGED) and read_json(run / MERGED).get("winner") == run.winner:
        return model, read_json(run / MERGED)
    plain = make_backbone(spec)
    summary = {
        **run.marks,
        "winner": run.winner,
        "parameters": parameters,
        "head_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "paths": {name: path.to_dict() for name, path in paths.items()},
        "largest_error": report.largest_error,
        "largest_difference": report.largest_difference,
        "model_difference": report.model_difference,
        "created_biases": list(report.created_biases),
        "same_modules": module_types(model) == module_types(plain),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "backbone_parameters": sum(p.numel() for p in plain.parameters()),
    }
    if spec.recipe.texts:
        save_text_classifier(model, spec.recipe.model.name, written)
    else:
        content = save({name: t.contiguous() for name, t in model.state_dict().items()})
        write_atomically(written, lambda stream: stream.write(content))
    write_json(run / MERGED, summary)
    return model, summary


def require_winner(run: RunFolder) -> Path:
    """The adapter to merge. If it is missing, raises ValueError with the command that makes it."""
    return run.require(ADAPTER, run.maker)


def now() -> str:
    """The date and time, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
