"""How much of ``glora.train`` is spent outside of the model and its optimiser.

    python -m bench.loop_share --out FOLDER

A ViT learns from images in memory, and from JPEG files with random augmentation, read by this process or by others. A
share is wall time outside of forward, loss, backward and the optimiser's step: waiting for batches, drawing and setting
paths, reading losses, the progress bar, a checkpoint and a log at the end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import glora
from glora.protocols import ImageSettings
from glora.protocols.images import ImageList, transform_for

from .environment import environment
from .figures import write_figures
from .settings import SEED

MEMORY, FILES = "tensors in memory", "JPEG files, augmented"
CLASSES, PIXELS = 100, 320  # of the pictures on disk
T = TypeVar("T")


class Stopwatch:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timing(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """``function``, whose time is added up under ``name``."""

        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> T:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Time forward of ``model``, backward and every optimiser's step in a ``with`` block."""
        places: list[tuple[Any, str, str]] = [
            (model, "forward", "forward"),
            (Tensor, "backward", "backward"),
            (torch.optim.AdamW, "step", "optimiser"),
        ]
        before = [getattr(owner, attribute) for owner, attribute, _ in places]
        for (owner, attribute, name), function in zip(places, before):
            setattr(owner, attribute, self.timing(name, function))
        try:
            yield
        finally:
            for (owner, attribute, _), function in zip(places, before):
                setattr(owner, attribute, function)


class Case(NamedTuple):
    """A run of ``glora.train``.

    Attributes:
        model, options: of timm.
        source: where the images come from.
        workers: processes that read them.
    """

    title: str
    model: str
    options: dict[str, Any]
    source: str
    workers: int = 0


MINIATURE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
TINY = "vit_tiny_patch16_224"
CASES = (
    Case("ViT-Ti", TINY, {}, MEMORY),
    Case("ViT-Ti", TINY, {}, FILES),
    Case("ViT-Ti", TINY, {}, FILES, workers=1),
    Case("ViT-Ti", TINY, {}, FILES, workers=2),
    Case("the miniature of `make miniature`", TINY, MINIATURE, MEMORY),
)


def measure(case: Case, batch_size: int, steps: int) -> dict[str, Any]:
    """Train with random paths, and say where the time went."""
    import timm

    torch.manual_seed(SEED)
    model = glora.inject(timm.create_model(case.model, num_classes=CLASSES, **case.options), rank=8)
    size: int = model.patch_embed.img_size[0]  # type: ignore[union-attr,index,assignment]
    recipe = glora.Recipe(steps=steps, batch_size=batch_size, lr=1e-3, checkpoint_every=steps, seed=SEED)
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = images(size, 4 * batch_size, folder) if case.source == FILES else tensors(size, 4 * batch_size)
        with watch.watching(model):
            summary = glora.train(
                model,
                dataset,
                recipe,
                space=glora.SearchSpace((8, 4)),
                loss_fn=watch.timing("loss", F.cross_entropy),
                checkpoint=folder / "checkpoint.pt",
                log=folder / "log.csv",
                workers=case.workers,
            )
    outside = summary.seconds - sum(watch.seconds.values())
    return {
        **case._asdict(),
        "batch_size": batch_size,
        "steps": steps,
        "seconds": summary.seconds,
        "inside": dict(watch.seconds),
        "share_outside": outside / summary.seconds,
        "outside_ms_per_step": 1e3 * outside / steps,
    }


def tensors(size: int, count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, 3, size, size), torch.arange(count) % CLASSES)


def images(size: int, count: int, folder: Path) -> ImageList:
    """Pictures on disk, smooth as photographs are, that are read with timm's training augmentation."""
    from torchvision.transforms.functional import to_pil_image

    entries = []
    for index in range(count):
        coarse = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(index))
        picture = F.interpolate(coarse, (PIXELS, PIXELS), mode="bicubic").clamp(0, 1)[0]
        to_pil_image(picture).save(folder / f"{index}.jpg")
        entries.append((f"{index}.jpg", index % CLASSES))
    transform = transform_for(ImageSettings(size, augment=True), train=True)
    return ImageList(folder, entries, transform, random=True)


def row(run: dict[str, Any]) -> str:
    """A line of the table."""
    seconds = run["seconds"] / run["steps"]
    return (
        f"| {run['title']} | {run['source']} | {run['workers']} | {seconds:.3f} | {run['outside_ms_per_step']:.1f} | "
        f"{run['share_outside']:.1%} |"
    )


def table(runs: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        "| model | images | loading processes | seconds a step | outside of the model, ms a step | share |",
        "|---|---|---|---|---|---|",
        *map(row, runs),
        "",
        f"`glora.train` with random paths, batch {runs[0]['batch_size']}, {runs[0]['steps']} steps and a checkpoint; "
        f"{where['device']}, {torch.get_num_threads()} threads, wall time, torch {where['versions']['torch']}, timm "
        f"{where['versions']['timm']}; {where['date'][:10]}, commit {where['commit']}; the load was "
        f"{where['load_average'][0]:.1f} on {where['cores']} cores.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.loop_share", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--steps", type=int, default=10, help="of each run (default: 10)")
    parser.add_argument("--out", type=Path, help="folder for figures.json and table.md")
    options = parser.parse_args(arguments)
    where, runs = environment("cpu"), []
    for case in CASES:
        runs.append(measure(case, options.batch_size, options.steps))
        print(row(runs[-1]), flush=True)
    write_figures(options.out, {"environment": where, "runs": runs}, table(runs, where))


if __name__ == "__main__":
    main()
