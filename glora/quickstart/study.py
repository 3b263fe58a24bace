"""The demonstration as a whole: pre-train once, run every method on every draw, sum up."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

import torch
from torch import nn

from ..evaluation import evaluate
from ..files import make_folder, write_atomically
from ..progress import progress_bar
from ..training.loop import train
from ..training.recipe import Recipe
from .digits import DIGITS
from .domain import Domain
from .domains import domain_of, named_tasks
from .methods import METHODS, SEARCHED, Conditions, chosen, compared_with, run_methods, units_of_work

_TICK = 20
STUDY_FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class StudySettings:
    """What to run. None and an empty tuple stand for what the domain of the tasks has by default.

    Args:
        tasks: target tasks of one domain (:func:`glora.quickstart.domains.named_tasks`); its name is its first task.
        shots: samples per class to train on, one run for each entry.
        seeds: few-shot draws (and fresh heads, supernets, searches) for each task and entry.
        seed: the first of the seeds; pre-training uses it too.
        steps, pretraining_steps: optimiser steps of every method, and of pre-training.
        workers: processes, one thread each; None for one per core.
        rows: the methods of the table, out of ``METHODS``; ``"all"`` for every one. GLoRA's are always in it.

    Raises:
        ValueError: no or unknown tasks, tasks of several domains, an unknown method, or a number below 1.
    """

    tasks: tuple[str, ...] = ("inverted",)
    shots: tuple[int, ...] = ()
    seeds: int | None = None
    seed: int = 0
    steps: int | None = None
    pretraining_steps: int | None = None
    workers: int | None = None
    rows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", named_tasks(self.tasks))
        domain = self.domain
        if domain.source is None and self.pretraining_steps is not None:
            raise ValueError(
                f"pretraining_steps: expected none, the backbone of {domain.name} comes pre-trained; "
                f"got {self.pretraining_steps}"
            )
        self._default("shots", (domain.shots,))
        self._default("seeds", domain.seeds)
        self._default("steps", domain.steps)
        self._default("pretraining_steps", domain.pretraining_steps)
        self._default("rows", domain.rows)
        if len(set(self.shots)) != len(self.shots):
            raise ValueError(f"shots: expected distinct numbers, got {list(self.shots)}")
        rows = tuple(METHODS) if self.rows == ("all",) else self.rows
        if not set(rows) <= set(METHODS):
            raise ValueError(f"rows: expected 'all' or names out of {list(METHODS)}, got {list(self.rows)}")
        object.__setattr__(self, "rows", tuple(chosen(rows)))
        for name in ("seeds", "steps", "pretraining_steps", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    @property
    def domain(self) -> Domain:
        return domain_of(self.tasks)

    def _default(self, name: str, value: object) -> None:
        if getattr(self, name) in (None, ()):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class _Job:
    task: str
    shots: int
    seed: int
    steps: int


def run_study(settings: StudySettings, folder: str | os.PathLike, progress: bool = True) -> dict[str, Any]:
    """Run the demonstration and return its figures as plain data for JSON.

    Args:
        folder: where the pre-trained backbone is kept; an interrupted pre-training continues.
        progress: show progress bars.
    """
    domain = settings.domain
    for task in settings.tasks:  # bad arguments fail here, before any work
        for shots in settings.shots:
            domain.draw(task, shots, settings.seed)
    started = time.perf_counter()
    file = backbone_file(folder, settings)
    make_folder("folder", file.parent)
    with _threads(1):
        backbone, pretraining = pretrain(settings, file, progress)
    seeds = range(settings.seed, settings.seed + (settings.seeds or domain.seeds))
    steps = settings.steps or domain.steps
    jobs = [_Job(task, shots, seed, steps) for task in settings.tasks for shots in settings.shots for seed in seeds]
    runs = _run_jobs(jobs, settings.rows, backbone, settings.workers or os.cpu_count() or 1, progress)
    return {
        "format": STUDY_FORMAT,
        "settings": asdict(settings),
        "pretraining": pretraining,
        "runs": [{**asdict(job), "rows": runs[job]} for job in jobs],
        "summary": [_summarise(task, shots, jobs, runs) for task in settings.tasks for shots in settings.shots],
        "seconds": time.perf_counter() - started,
    }


def backbone_file(folder: str | os.PathLike, settings: StudySettings) -> Path:
    """Where the backbone is kept that is pre-trained here."""
    own = "" if settings.domain is DIGITS else f"{settings.domain.name}-"
    return Path(folder) / f"backbone-{own}seed{settings.seed}.pt"


def save_study(study: dict[str, Any], folder: str | os.PathLike) -> Path:
    """Write ``quickstart.json`` into ``folder``, atomically."""
    file = Path(folder) / "quickstart.json"
    content = json.dumps(study, indent=1).encode()
    write_atomically(file, lambda stream: stream.write(content))
    return file


def load_study(file: str | os.PathLike) -> dict[str, Any]:
    """Read what :func:`save_study` wrote. Raises ValueError for any other file."""
    try:
        study = json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(
            f"{file}: expected the JSON of a quickstart, it is damaged or something else ({error})"
        ) from None
    expected = {"format", "settings", "pretraining", "runs", "summary", "seconds"}
    if not isinstance(study, dict) or set(study) != expected or study["format"] != STUDY_FORMAT:
        raise ValueError(f"{file}: expected the JSON of a quickstart (format {STUDY_FORMAT}), got something else")
    return study


def pretrain(settings: StudySettings, file: Path, progress: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone, from ``file`` if it is trained already, and its figures for the report."""
    domain = settings.domain
    torch.manual_seed(settings.seed)
    model = domain.make_backbone()
    figures: dict[str, Any] = {"seconds": 0.0, "accuracy": None}
    if domain.source is not None:
        source = domain.source()
        steps = settings.pretraining_steps or domain.pretraining_steps
        assert steps is not None
        recipe = Recipe(steps, batch_size=64, lr=2e-3, weight_decay=0.05, seed=settings.seed)
        summary = train(model, source.train, recipe, checkpoint=file, progress=progress)
        figures = {"seconds": summary.seconds, "accuracy": evaluate(model, source.unseen).accuracy}
    parameters = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    return model, {**figures, "parameters": parameters}


def _run_jobs(
    jobs: Sequence[_Job], methods: Sequence[str], backbone: nn.Module, workers: int, progress: bool
) -> dict[_Job, list[dict]]:
    """The rows of every job; one process per worker, so that each has its own core."""
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    context = get_context("spawn")
    runs: dict[_Job, list[dict]] = {}
    total = len(jobs) * units_of_work(domain_of([jobs[0].task]), jobs[0].steps, methods)
    with (
        _deaf_to_interrupts(context.Manager) as manager,
        _stopped_at_once(ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context)) as pool,
        progress_bar(total=total, desc="adapt", unit="step", shown=progress) as bar,
    ):
        ticks = manager.Queue()
        futures = _deaf_to_interrupts(lambda: {pool.submit(_run_job, job, methods, state, ticks): job for job in jobs})
        pending = set(futures)
        while pending:
            done = {future for future in pending if future.done()}
            for future in as_completed(done):
                runs[futures[future]] = future.result()
            pending -= done
            _drain(ticks, bar)
        bar.update(bar.total - bar.n)
    return runs


@contextmanager
def _stopped_at_once(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """The pool for a ``with`` block; if the block raises, its workers stop at once."""
    others = active_children()
    with pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()).difference(others):
                process.terminate()
            raise


def _deaf_to_interrupts(start: Callable[[], T]) -> T:
    """The result of ``start``. Processes that it starts ignore SIGINT, which a terminal sends to all of them: this
    process gets it afterwards and stops them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _drain(ticks: Any, bar: Any) -> None:
    from queue import Empty

    try:
        bar.update(ticks.get(timeout=0.2))
        while True:
            bar.update(ticks.get_nowait())
    except Empty:
        return


def _run_job(job: _Job, methods: Sequence[str], state: dict[str, torch.Tensor], ticks: Any) -> list[dict]:
    torch.set_num_threads(1)
    domain = domain_of([job.task])
    backbone = domain.make_backbone()
    backbone.load_state_dict(state)
    waiting = 0

    def tick(units: int) -> None:
        nonlocal waiting
        waiting += units
        if waiting >= _TICK:
            ticks.put(waiting)
            waiting = 0

    data = domain.few_shot(job.task, job.shots, job.seed)
    rows = run_methods(Conditions(backbone, data, job.seed, job.steps, tick, domain), methods)
    return [asdict(row) for row in rows]


def _summarise(task: str, shots: int, jobs: Sequence[_Job], runs: dict[_Job, list[dict]]) -> dict[str, Any]:
    """Means and sample standard deviations over the seeds, and differences to GLoRA for each seed, on equal data."""
    per_seed = [runs[job] for job in jobs if (job.task, job.shots) == (task, shots)]
    by_method = {rows[0]["method"]: rows for rows in zip(*per_seed)}
    return {
        "task": task,
        "shots": shots,
        "rows": [_summarise_method(rows, by_method[compared_with(name)]) for name, rows in by_method.items()],
        "merge": _summarise_merge([row["details"]["merge"] for row in by_method[SEARCHED]]),
    }


def _summarise_method(rows: Sequence[dict], glora: Sequence[dict]) -> dict[str, Any]:
    accuracies = [row["test"] for row in rows]
    differences = [row["test"] - other for row, other in zip(glora, accuracies)]
    return {
        "method": rows[0]["method"],
        "parameters": fmean(row["parameters"] for row in rows),
        "test": fmean(accuracies),
        "test_std": stdev(accuracies) if len(accuracies) > 1 else None,
        "generalisation": _mean([row["generalisation"] for row in rows]),
        "seconds": fmean(row["seconds"] for row in rows),
        "glora_minus": fmean(differences),
        "glora_wins": sum(difference > 0 for difference in differences),
        "seeds": len(rows),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """None where the domain has no such figure."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _summarise_merge(proofs: Sequence[dict]) -> dict[str, Any]:
    return {
        "same_parameters": all(proof["same_parameters"] for proof in proofs),
        "same_modules": all(proof["same_modules"] for proof in proofs),
        "parameter_count": proofs[0]["parameter_count"],
        "largest_layer_error": max(proof["largest_layer_error"] for proof in proofs),
        "largest_output_difference": max(proof["largest_output_difference"] for proof in proofs),
        "agreement": min(proof["agreement"] for proof in proofs),
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
