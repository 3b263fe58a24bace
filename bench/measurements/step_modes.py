"""The training step of ``model.py`` in the ways that people run it on a GPU, all in one run.

Eager, under ``torch.compile``, and from CUDA graphs: ours by :class:`glora.GraphedStep`, the peers' whole step as one
graph. In every mode ours sets new random paths within the step, so that this is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import glora
from glora import SearchSpace
from glora.graphs.capture import Captured, graphs_for
from glora.graphs.selective_update import state_tensors
from glora.graphs.step_body import unchanged
from glora.paths import Paths

from .. import counting
from ..entrants import names as who
from ..section import RELATIVE, Comparison, Section, against
from ..settings import COMPILED, EAGER, GRAPHS, SEED, Settings
from ..shapes import Model
from ..timing import interleave, plain
from ..workloads import cross_entropy
from .compiled import compiled_call
from .model import WARMUP, make_checked

Step = Callable[[Paths], Tensor]  # takes a step, ours on these paths, and returns the loss
UPDATE_TOLERANCE = 0.5  # of what an update adds: one left out is off by 1, one rounded to a half type by tenths


class Trained(NamedTuple):
    """A model with its optimiser (None for the frozen one) and a batch; ``ours``: whether it has paths."""

    model: nn.Module
    optimizer: Optimizer | None
    batch: tuple[Tensor, Tensor]
    ours: bool

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def step(self, forward: Callable[[Tensor], Tensor], drop: bool, images: Tensor, labels: Tensor) -> Tensor:
        """The whole step on the paths that are set; ``drop``: the gradients of what they do not read."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(forward(images), labels)
        loss.backward()
        if drop:
            glora.drop_unread_gradients(self.model)
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()


def eager(trained: Trained, backend: str) -> Step:
    return partial(_on_paths, trained, trained.model, False)


def compiled(trained: Trained, backend: str) -> Step:
    """Forward and backward of the model compiled, the rest eager."""
    return partial(_on_paths, trained, partial(compiled_call(backend), trained.model), trained.ours)


def _on_paths(trained: Trained, forward: Callable[[Tensor], Tensor], drop: bool, paths: Paths) -> Tensor:
    if trained.ours:
        glora.set_paths(trained.model, paths)
    return trained.step(forward, drop, *trained.batch)


def one_graph(trained: Trained, backend: str) -> Step:
    """The whole step captured. Each call copies the batch in, as a GraphedStep does."""
    graphs = graphs_for(trained.batch[0].device)
    assert graphs is not None
    captured = Captured(lambda *batch: (trained.step(trained.model, False, *batch),), trained.batch, graphs)
    return lambda _: captured(*trained.batch)[0]


def graphed(mode: str, trained: Trained, backend: str) -> Step:
    """Captured by the first call."""
    assert trained.optimizer is not None
    space = SearchSpace(tuple({layer.rank for layer in glora.glora_layers(trained.model).values()}))
    step = glora.GraphedStep(trained.model, trained.optimizer, cross_entropy, space, mode=mode)
    return partial(step, *trained.batch)


class Way(NamedTuple):
    """One way to take a step.

    Attributes:
        mode: one of ``--modes``.
        entrant: whose step.
        make: makes it, with the backend of ``torch.compile``.
        capturable: whether the optimiser's step is captured with it.
    """

    mode: str
    entrant: str
    make: Callable[[Trained, str], Step]
    capturable: bool = False


WITH_COMPILE, ONE_GRAPH, PIECES = ", compiled", ", one graph", ", graphs in pieces"
WAYS = {
    who.FROZEN: Way(EAGER, who.FROZEN, eager),
    who.LORA: Way(EAGER, who.LORA, eager),
    who.OURS: Way(EAGER, who.OURS, eager),
    who.GLORA: Way(EAGER, who.GLORA, eager),
    who.LORA + WITH_COMPILE: Way(COMPILED, who.LORA, compiled),
    who.OURS + WITH_COMPILE: Way(COMPILED, who.OURS, compiled),
    who.GLORA + WITH_COMPILE: Way(COMPILED, who.GLORA, compiled),
    who.FROZEN + ONE_GRAPH: Way(GRAPHS, who.FROZEN, one_graph, capturable=True),
    who.OURS + PIECES: Way(GRAPHS, who.OURS, partial(graphed, "piecewise")),
    who.LORA + ONE_GRAPH: Way(GRAPHS, who.LORA, one_graph, capturable=True),
    who.OURS + ONE_GRAPH: Way(GRAPHS, who.OURS, partial(graphed, "whole"), capturable=True),
    who.GLORA + ONE_GRAPH: Way(GRAPHS, who.GLORA, one_graph, capturable=True),
}
ENTRIES = tuple(WAYS)
BEST = {"": "", WITH_COMPILE: WITH_COMPILE, PIECES: ONE_GRAPH, ONE_GRAPH: ONE_GRAPH}  # a peer's, beside each of ours
COMPARISONS = (
    *(Comparison(who.OURS + ours, peer + its) for peer in (who.LORA, who.GLORA) for ours, its in BEST.items()),
    *against((who.FROZEN,), [who.OURS + ours for ours in BEST]),
)


def measure(shape_set: str, model: Model, settings: Settings, backend: str = "inductor") -> Section:
    """Check and time every way that ``settings`` ask for; in a round, ours takes the same new paths in all modes."""
    began = time.monotonic()
    entrants = dict.fromkeys(way.entrant for way in WAYS.values())
    field, workload, sampler, paths = make_checked(model, settings, entrants, count=2)
    torch.compiler.reset()
    missing = dict(field.missing)
    truths: dict[str, list[Reference]] = {}
    steps: dict[str, Step] = {}
    facts: dict[str, dict[str, float]] = {}
    for name, way in WAYS.items():
        reason = field.missing.get(way.entrant) or _left_out(way.mode, settings, began)
        if reason is not None:
            missing[name] = reason
        elif way.entrant in field.models:
            one, batch = field.models[way.entrant], (workload.images, workload.labels)
            try:
                if way.entrant not in truths:
                    truths[way.entrant] = [_reference(one, batch, way.entrant, each) for each in paths]
                optimizer = _adamw(glora.trainable_parameters(one), way.capturable)
                trained = Trained(one, optimizer, batch, way.entrant == who.OURS)
                steps[name], facts[name] = _checked(way, trained, truths[way.entrant], settings, backend)
            except Exception as error:  # it does not compile, cannot be captured, or is wrong
                field.refused[name] = f"{type(error).__name__}: {error}"

    drawn, generator = dict(paths[0]), torch.Generator().manual_seed(SEED)
    phases = interleave(
        {name: plain(partial(step, drawn)) for name, step in steps.items()},
        settings.rounds,
        warmup=1 if settings.device == "cpu" else WARMUP,
        prepare=lambda: drawn.update(sampler.sample(generator)),
        watch=settings.watch(),
    )
    count = model.batch_on(settings.device)
    return Section(
        "step modes",
        f"{shape_set} step modes",
        f"modes of a training step of {model.name}, batch {count}, rank {model.rank}, random paths",
        settings.step_tolerance,
        field.errors,
        field.refused,
        missing,
        phases,
        COMPARISONS,
        facts,
        {"images": count},
        unit=RELATIVE,
    )


def _left_out(mode: str, settings: Settings, began: float) -> str | None:
    if settings.preparing is not None and time.monotonic() - began > settings.preparing:
        return f"not prepared within --preparing {settings.preparing:g}"
    if mode not in settings.modes:
        return f"left out by --modes {','.join(settings.modes)}"
    if mode == GRAPHS and graphs_for(torch.device(settings.device)) is None:
        return "CUDA graphs need a GPU"
    return None


def _adamw(parameters: list[nn.Parameter], capturable: bool) -> Optimizer | None:
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, capturable=capturable) if parameters else None


class Reference(NamedTuple):
    """The loss and the gradients of the eager step on some paths; without those of parameters that are not read."""

    paths: Paths
    loss: Tensor
    gradients: dict[str, Tensor]


def _reference(model: nn.Module, batch: tuple[Tensor, Tensor], entrant: str, paths: Paths) -> Reference:
    trained = Trained(model, None, batch, entrant == who.OURS)
    model.zero_grad(set_to_none=True)
    loss = eager(trained, "")(paths)
    return Reference(
        paths, loss, {name: p.grad.clone() for name, p in trained.parameters().items() if p.grad is not None}
    )


def _checked(
    way: Way, trained: Trained, references: list[Reference], settings: Settings, backend: str
) -> tuple[Step, dict[str, float]]:
    """The step, once it is shown to be right on all paths, and how far memory rises in it.

    Graphs are captured on the first paths. What they hold is allocated then, and not in a replay. On a CPU there are
    none to be counted.

    Raises:
        ValueError: another loss or gradient than the eager step's, or parameters that AdamW does not make of them.
    """
    parameters, captures = list(trained.parameters().values()), way.mode == GRAPHS
    made: list[Step] = []
    facts: dict[str, float] = {}

    def begin() -> None:
        made.append(way.make(trained, backend))
        made[0](references[0].paths)

    def repeat() -> None:
        for _ in range(2):
            made[0](references[0].paths)

    trained.model.zero_grad(set_to_none=True)
    with unchanged(parameters):
        if captures and settings.device != "cpu":
            facts["peak_bytes"] = counting.peak_bytes(begin, settings.device)
        else:
            begin()
    for reference in references:
        with unchanged(parameters):
            _require_same(trained, made[0], reference, settings.step_tolerance)
    if not captures:
        if trained.optimizer is not None:
            trained.optimizer.state.clear()
        trained.model.zero_grad(set_to_none=True)
        with unchanged(parameters):
            facts["peak_bytes"] = counting.peak_bytes(repeat, settings.device)
    return made[0], facts


def _require_same(trained: Trained, step: Step, reference: Reference, tolerance: float) -> None:
    """Take a first step and compare. Gradients are NaN before, to find what a replay does not write."""
    parameters = trained.parameters()
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad.fill_(torch.nan)
        for state in state_tensors(trained.optimizer, parameter) if trained.optimizer is not None else ():
            state.zero_()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    loss = step(reference.paths)
    errors = {"loss": _error(loss, reference.loss)}
    updated = {name: nn.Parameter(value.clone()) for name, value in before.items()}
    for name, parameter in parameters.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name in reference.gradients:
            updated[name].grad = gradient.clone()
        errors[f"gradient of {name}"] = _error(gradient, reference.gradients.get(name, torch.zeros_like(gradient)))
    optimizer = _adamw(list(updated.values()), capturable=False)
    if optimizer is not None:
        optimizer.step()
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    for name, parameter in parameters.items():
        change, wanted = parameter.detach() - before[name], updated[name].detach() - before[name]
        if not (error := _error(change, wanted)) <= UPDATE_TOLERANCE:
            wrong[f"update of {name}"] = error
    if wrong:
        raise ValueError(f"not timed, expected the eager step to {tolerance:g}, relative in the 2-norm, got {wrong}")


def _error(found: Tensor, want: Tensor) -> float:
    """In the 2-norm, over that of ``want``; 0 where nothing differs."""
    difference, size = (found - want).float().norm(), want.float().norm()
    return float(difference / size) if difference else 0.0
