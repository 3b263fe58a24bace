"""Run folders as the stages leave them, with real searches of real shapes and invented accuracies."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import glora
from glora import LayerShape, PathConfig, SearchSettings, SearchSpace
from glora.runs import RunSpec, load_recipe
from glora.runs.recipes import Size

SMALL = SearchSettings(population=6, top=2, crossover=3, mutation=3, generations=3)
VIT_B = "vit_base_patch16_224.augreg_in21k"
SWIN_B = "swin_base_patch4_window7_224"


def vit_layers(depth: int, width: int) -> dict[str, LayerShape]:
    """The linear layers of a ViT, as timm names them."""
    shapes = {
        "attn.qkv": LayerShape(3 * width, width),
        "attn.proj": LayerShape(width, width),
        "mlp.fc1": LayerShape(4 * width, width),
        "mlp.fc2": LayerShape(width, 4 * width),
    }
    return {f"blocks.{block}.{name}": shape for block in range(depth) for name, shape in shapes.items()}


def write_run(
    folder: Path,
    dataset: str = "cifar",
    seed: int = 0,
    *,
    accuracy: float | None = 0.75,
    protocol: str = "vtab1k",
    backbone: str = VIT_B,
    layers: dict[str, LayerShape] | None = None,
    size: str = "0.86M",
    shots: int | None = None,
    preset: str | None = None,
    limit: int | None = None,
    weights: str | None = "hub",
    changes: Sequence[str] = (),
    settings: SearchSettings = SMALL,
    targets: dict[str, float] | None = None,
    features: int = 30,
    dimensions: int = 8,
    classes: int = 3,
    steps: int = 20,
    date: str = "2025-03-01T10:00:00+00:00",
) -> Path:
    """A finished run of the protocol's recipe with ``changes``; with ``accuracy`` None, one that was not tested."""
    layers = layers or vit_layers(2, 16)
    folder.mkdir(parents=True)
    recipe = load_recipe(protocol, [f"model.name={backbone}", *changes])
    recipe = replace(recipe, sizes={size: Size((4, 2), limit)})
    spec = RunSpec(recipe, dataset, shots, seed, size, preset, "/data", weights)
    result, chosen = search(layers, SearchSpace((4, 2)), limit, settings, seed)
    facts = {
        "layers": [[name, *shape] for name, shape in layers.items()],
        "samples": {"train": 800, "validation": 200},
        "fingerprint": {"weights": None, "training images": 1, "validation images": 2},
        "versions": {"glora": glora.__version__},
        "date": "2025-02-01T10:00:00+00:00",
    }
    write(folder / "run.json", {**spec.to_dict(), **facts})
    write(folder / "train.json", {"steps": steps, "seconds": 7200.0, "images_per_second": 100.0, "loss": 0.5})
    write_log(folder / "log.csv", steps)
    if preset is None:
        write(folder / "search.json", {"settings": chosen.to_dict(), "metric": "accuracy", **result.to_dict()})
    paths = {name: path.to_dict() for name, path in result.best.paths.items()}
    errors = {"largest_error": 1e-6, "largest_difference": 2e-6, "model_difference": 3e-6}
    write(folder / "merge.json", {"parameters": result.best.parameters, "paths": paths, **errors})
    if accuracy is not None:
        found = {name: {"accuracy": value, "loss": 1.0, "samples": 10} for name, value in (targets or {}).items()}
        test = {"split": "test", "samples": 1000, "accuracy": accuracy, "loss": 0.9, "targets": found, "date": date}
        write(folder / "test.json", test)
        write_features(folder / "features.npz", features, dimensions, classes)
    return folder


def write_refit(run: Path, accuracy: float | None = 0.8, **settings) -> Path:
    """The refit of a run: of its winner, with settings of its own; with ``accuracy`` None, one that was cut."""
    folder = run / "refit"
    folder.mkdir()
    if not (run / "adapter.safetensors").exists():
        (run / "adapter.safetensors").write_bytes(b"the winner")
    winner = hashlib.sha256((run / "adapter.safetensors").read_bytes()).hexdigest()
    told = {"winner": winner, "settings": {"steps": 200, "lr": 1e-4, "warmup": 0.1, **settings}}
    write_log(folder / "log.csv", 10)
    if accuracy is not None:
        told["seconds"] = 1800.0
        for name in ("merge.json", "features.npz", "test.json"):
            shutil.copy(run / name, folder)
        change(folder / "test.json", accuracy=accuracy)
    write(folder / "refit.json", told)
    return folder


def search(layers, space, limit, settings, seed):
    """A real search whose score grows with the parameters spent, up to a point; and its settings."""
    total = sum(4 * (shape.out_features + shape.in_features) for shape in layers.values())

    def score(paths: dict[str, PathConfig]) -> float:
        spent = sum(path.count(layers[name]) for name, path in paths.items()) / total
        wobble = sum(path.A == "vector" for path in paths.values()) / len(paths)
        return min(0.95, 0.5 + 0.3 * spent / (1 + spent) + 0.1 * wobble)

    settings = SearchSettings(**{**vars(settings), "seed": seed})
    return glora.evolve(layers, space, score, limit=limit, settings=settings, progress=False), settings


def write_log(file: Path, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(steps, generator=generator).tolist()
    with open(file, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("step", "epoch", "lr", "loss"))
        for step in range(1, steps + 1):
            done = step / steps
            writer.writerow((step, step // 12, 1e-3 * (1 - done), 4.5 * (1 - done) ** 2 + 0.3 * noise[step - 1]))


def write_features(file: Path, count: int, dimensions: int, classes: int) -> None:
    """Classes further apart in the adapted features."""
    random = np.random.default_rng(0)
    labels = random.integers(classes, size=count)
    centres = random.normal(size=(classes, dimensions)).astype(np.float32)
    noise = random.normal(size=(2, count, dimensions)).astype(np.float32)
    np.savez(file, frozen=0.5 * centres[labels] + noise[0], adapted=3 * centres[labels] + noise[1], labels=labels)


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))


def change(file: Path, **entries) -> None:
    """Replace entries of a JSON file; those that are ... are taken out."""
    content = {**json.loads(file.read_text()), **entries}
    write(file, {name: value for name, value in content.items() if value is not ...})
