"""The host's time of a layer call, over that of PEFT's LoRA layer: a layer so small that arithmetic takes none.

    python -m bench.host_overhead --out bench/results/host-overhead

On a GPU it is what decides with few tokens: the host has to launch everything. All run in turn in one process on one
thread; figures are medians of interleaved rounds, ratios those of one round. Time is that of the process, so that
others on the machine count for little. A training call is forward, backward and the gradients set to None.

Ours takes the torch route, and the Triton route with kernels that do nothing (``bench/stubbed.py``), each in four ways:
with a fixed path (all low rank: ten tensors), with 64 random paths in turn that the layer has been called with, with
paths that are new to it, and with another number of tokens at every call. Where paths change, the time to set them is
included. What a new path costs beyond one seen before is the planning of a call.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import glora
from glora import GLoRALayer, PathConfig, SearchSpace
from glora.files import write_text_atomically
from glora.paths import sampler_for, set_layer_paths
from glora_kernels import available_backends, use_backend

from .entrants import Field, make_field
from .entrants.names import FROZEN, GLORA, HIRA, LORA, OURS, all_low_rank, lora
from .environment import environment
from .settings import CLOCKS, SEED, Settings
from .stubbed import fault, stubbed
from .timing import WHOLE, Times, Watch, interleave, ratio
from .workloads import LayerWorkload

TOKENS, WIDTH, RANK = 8, 32, 8
CALLS = 64  # per timing, so that reading the clock hardly counts; and how many paths are seen again
LAYERS = 48  # of the model in which paths are set, as many as a ViT-B has
SPACE = SearchSpace(ranks=(8, 4))
NEW = SearchSpace(ranks=tuple(range(1, RANK + 1)))  # 10,890 paths: more than any cache of ours holds
TRAINING, INFERENCE, PATHS = "training", "without grad", "paths"
TRITON, TORCH = "Triton route", "torch route"
FIXED, SEEN, UNSEEN, COUNTS = "fixed path", "paths seen before", "new paths", "other numbers of tokens"
B_ALONE, EXTENSION = f"{TORCH}, B low rank", "C++ extension"
SET_SEEN, SET_NEW, DRAW = "setting a path seen before", "setting a new path", "drawing a path"
PLANNING = "planning a call never seen before"
PEERS = (FROZEN, LORA, GLORA, HIRA)
CLOCK_NAMES = {"wall": "the wall clock", "cpu": "the process"}
JSON, TABLE = "overhead.json", "table.md"
Around = Callable[[], AbstractContextManager]
Step = Callable[[], object]


class Target(NamedTuple):
    """The largest figure of this name under a quantity of a section."""

    section: str
    quantity: str
    name: str
    at_most: float


MICROSECONDS, OVER_LORA, CALLED = "microseconds", "over_lora", "calls"
QUANTITIES = {MICROSECONDS: "µs", OVER_LORA: "over PEFT LoRA", CALLED: "calls of functions"}
TARGETS = (
    Target(TRAINING, OVER_LORA, f"{TRITON}, {FIXED}", 0.75),
    Target(TRAINING, OVER_LORA, f"{TRITON}, {SEEN}", 0.85),
    Target(TRAINING, OVER_LORA, f"{TRITON}, {COUNTS}", 1.0),
    Target(TRAINING, CALLED, f"{TRITON}, {FIXED}", 250),
    Target(INFERENCE, OVER_LORA, f"{TRITON}, {FIXED}", 1.0),
    Target(TRAINING, OVER_LORA, B_ALONE, 0.75),
    Target(TRAINING, OVER_LORA, f"{TORCH}, {FIXED}", 1.5),
    Target(PATHS, MICROSECONDS, SET_SEEN, 6),
    Target(PATHS, MICROSECONDS, SET_NEW, 60),
    Target(PATHS, MICROSECONDS, DRAW, 1.5),
    Target(PATHS, MICROSECONDS, f"{PLANNING}, {TRITON}", 1500),
)


@dataclass(frozen=True)
class Entry:
    """One way to call a layer that is timed.

    Attributes:
        layer: what is called.
        inputs: x and dy of the next call, without end.
        before: what is done before each call, and timed.
        around: the block in which calls are made; entering it is not timed.
    """

    layer: nn.Module
    inputs: Iterator[tuple[Tensor, Tensor]]
    before: Callable[[], object] | None = None
    around: Around = nullcontext

    def step(self, training: bool) -> Callable[[], None]:
        """One call, in training with its backward pass."""
        layer, before, inputs, parameters = self.layer, self.before, self.inputs, tuple(self.layer.parameters())

        def step() -> None:
            if before is not None:
                before()
            x, dy = next(inputs)
            y = layer(x)
            if training:
                y.backward(dy)
                x.grad = None
                for parameter in parameters:
                    parameter.grad = None

        return step


def inputs_of(*tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x and dy with each of these numbers of tokens in turn."""
    return cycle([(torch.randn(count, WIDTH, requires_grad=True), torch.randn(count, WIDTH)) for count in tokens])


def setting(layer: GLoRALayer, paths: list[PathConfig]) -> Callable[[], None]:
    """A function that sets the next of ``paths``, as the training loop does."""
    layers, coming = {"": layer}, cycle([{"": path} for path in paths])
    return lambda: set_layer_paths(layers, next(coming))


def shuffled(space: SearchSpace, generator: torch.Generator) -> list[tuple[str, ...]]:
    """Every path of ``space`` once, as the texts of its five tensors, in random order."""
    found = []
    for place in torch.randperm(space.count(), generator=generator).tolist():
        texts = []
        for options in space.options.values():
            place, index = divmod(place, len(options))
            texts.append(options[index])
        found.append(tuple(texts))
    return found


def in_extension() -> Around | str:
    """A block in which calls go to the C++ extension; or the reason why it cannot be used here."""
    return available_backends()["cuda"] or partial(use_backend, "cuda")


def make_peers(settings: Settings) -> Field:
    """Ours and the peers. Raises ValueError if ours or LoRA, to which all are compared, computes something else."""
    made = make_field(nn.Sequential(nn.Linear(WIDTH, WIDTH)), ["0"], RANK, PEERS)
    workload, extension = LayerWorkload(*next(inputs_of(TOKENS))), in_extension()
    for around in (nullcontext,) if isinstance(extension, str) else (nullcontext, extension):
        with around():
            made.check(workload, [{"0": path} for path in (all_low_rank(RANK), lora(RANK))], settings.layer_tolerance)
    for name in (OURS, LORA):
        if name not in made.models:
            raise ValueError(f"{name}: not timed: {({**made.missing, **made.refused})[name]}")
    return made


def entries(made: Field) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries that are timed, by name; and those that are not, with the reason."""
    generator = torch.Generator().manual_seed(SEED)
    paths = {
        SEEN: SPACE.sample_many(CALLS, generator),
        UNSEEN: [PathConfig(*texts) for texts in shuffled(NEW, generator)],
    }

    def ours(path: PathConfig) -> Any:
        layer = copy.deepcopy(made.models[OURS][0])  # one for each way of calling it, which leaves something behind
        layer.path = path
        return layer

    fixed = all_low_rank(RANK)
    found = {name: Entry(made.models[name][0], inputs_of(TOKENS)) for name in PEERS if name in made.models}
    missing = dict(made.missing)
    for route, reason, around in ((TRITON, fault(), stubbed), (TORCH, None, nullcontext)):
        if reason is not None:
            missing[route] = reason
            continue
        found[f"{route}, {FIXED}"] = Entry(ours(fixed), inputs_of(TOKENS), None, around)
        for name, coming in paths.items():
            layer = ours(fixed)
            found[f"{route}, {name}"] = Entry(layer, inputs_of(TOKENS), setting(layer, coming), around)
        found[f"{route}, {COUNTS}"] = Entry(ours(fixed), inputs_of(*range(1, 2 * TOKENS)), None, around)
    found[B_ALONE] = Entry(ours(lora(RANK)), inputs_of(TOKENS))
    extension = in_extension()
    if isinstance(extension, str):
        missing[EXTENSION] = extension
    else:
        found[EXTENSION] = Entry(ours(fixed), inputs_of(TOKENS), None, extension)
    return found, missing


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Calls in training, calls without grad, and what is done to paths, one section each."""
    torch.manual_seed(SEED)
    made = make_peers(settings)
    sections, planning = [], {}
    for mode in (TRAINING, INFERENCE):
        training = mode == TRAINING
        timed, missing = entries(made)
        steps = {name: (entry.step(training), entry.around) for name, entry in timed.items()}
        times = microseconds(steps, settings, training)
        over = {name: ratio(times, name, LORA) for name in times}
        sections.append(
            {
                "section": mode,
                MICROSECONDS: {name: statistics.median(values) for name, values in times.items()},
                OVER_LORA: {name: found.median for name, found in over.items()},
                "interval": {name: [found.lower, found.upper] for name, found in over.items()},
                CALLED: {name: calls_of(*step, training) for name, step in steps.items()},
                "missing": {**missing, **made.refused},
            }
        )
        if training:
            planning = {f"{PLANNING}, {route}": cost for route, cost in planning_of(times).items()}
    per_layer = {name: statistics.median(values) / LAYERS for name, values in of_paths(settings).items()}
    return [*sections, {"section": PATHS, MICROSECONDS: {**per_layer, **planning}, "missing": {}}]


def of_paths(settings: Settings) -> Times:
    """Microseconds of what is done to the paths of a model of :data:`LAYERS` layers, by name and round."""
    model = glora.inject(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]), RANK, exclude=())
    generator, sampler = torch.Generator().manual_seed(SEED), sampler_for(model, SPACE)
    seen, unseen = cycle([sampler.sample(generator) for _ in range(CALLS)]), cycle(shuffled(NEW, generator))

    def set_new() -> None:
        glora.set_paths(model, {name: PathConfig(*next(unseen)) for name in sampler.layers})

    steps = {
        SET_SEEN: lambda: glora.set_paths(model, next(seen)),
        SET_NEW: set_new,
        DRAW: lambda: sampler.sample(generator),
    }
    return microseconds({name: (step, nullcontext) for name, step in steps.items()}, settings, training=True)


def microseconds(steps: Mapping[str, tuple[Step, Around]], settings: Settings, training: bool) -> Times:
    """Of one step, by name and round; the steps are interleaved."""

    def timed(step: Step, around: Around, watch: Watch) -> None:
        with around(), torch.set_grad_enabled(training), watch(WHOLE):
            for _ in range(CALLS):
                step()

    runs = {name: partial(timed, step, around) for name, (step, around) in steps.items()}
    times = interleave(runs, settings.rounds, warmup=3, watch=settings.watch())[WHOLE]
    return {name: [1e6 * seconds / CALLS for seconds in values] for name, values in times.items()}


def calls_of(step: Step, around: Around, training: bool) -> float:
    """Calls of Python and C functions in one step, the mean of :data:`CALLS`; that of the step itself is one."""
    count = 0

    def follow(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    with around(), torch.set_grad_enabled(training):
        sys.setprofile(follow)
        try:
            for _ in range(CALLS):
                step()
        finally:
            sys.setprofile(None)
    return (count - 1) / CALLS  # the last is setprofile


def planning_of(times: Times) -> dict[str, float]:
    """By route, what a call with a new path takes beyond one with a path seen before."""
    pairs = {route: (f"{route}, {UNSEEN}", f"{route}, {SEEN}") for route in (TRITON, TORCH)}
    return {
        route: statistics.median(new - seen for new, seen in zip(times[unseen], times[known], strict=True))
        for route, (unseen, known) in pairs.items()
        if unseen in times
    }


def judged(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target with what was found, None where it was not measured, and the verdict."""
    by_name = {section["section"]: section for section in sections}
    found = [by_name[target.section][target.quantity].get(target.name) for target in TARGETS]
    return [
        {**target._asdict(), "found": value, "verdict": verdict(value, target.at_most)}
        for target, value in zip(TARGETS, found)
    ]


def verdict(found: float | None, at_most: float) -> str:
    if found is None:
        return "not measured"
    return "met" if found <= at_most else "MISSED"


def table(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    about = content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version is not None)
    lines = [
        f"# Host time of a layer call\n\n{about['device']}, one thread, Python {about['python']}, {versions}; "
        f"{about['date'][:10]}, commit {about['commit']}; load average {about['load_average'][0]:.1f} of "
        f"{about['cores']} cores. {content['rounds']} interleaved rounds of {CALLS} calls; {TOKENS} tokens, "
        f"{WIDTH} -> {WIDTH}, rank {RANK}. Medians in microseconds of {CLOCK_NAMES[content['clock']]}; in brackets the "
        "interval that holds the median ratio with 95%."
    ]
    *of_calls, of_paths = content["sections"]
    for section in of_calls:
        lines.append(f"\n## {section['section'].capitalize()}\n")
        lines += ["| | µs | over PEFT LoRA | calls of functions |", "|---|--:|--:|--:|"]
        for name, time in section[MICROSECONDS].items():
            low, high = section["interval"][name]
            over = f"{section[OVER_LORA][name]:.2f} [{low:.2f}, {high:.2f}]"
            lines.append(f"| {name} | {time:.1f} | {over} | {section[CALLED][name]:.0f} |")
        lines += [f"\nNot timed: {name}: {why}" for name, why in section["missing"].items()]
    lines.append("\n## Paths\n\n| of one layer | µs |\n|---|--:|")
    lines += [f"| {name} | {time:.2f} |" for name, time in of_paths[MICROSECONDS].items()]
    lines.append("\n## Targets\n\n| | | at most | found | |\n|---|---|--:|--:|---|")
    for target in content["targets"]:
        found = "" if target["found"] is None else f"{target['found']:.2f}"
        what = f"{target['section']}: {target['name']} | {QUANTITIES[target['quantity']]}"
        lines.append(f"| {what} | {target['at_most']:g} | {found} | {target['verdict']} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_overhead", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=100, help="interleaved rounds (default: 100)")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="cpu (default) or wall, for an idle machine")
    parser.add_argument("--out", type=Path, help=f"folder to write {JSON} and {TABLE} to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what kernels that do nothing leave in memory must not slow a product down
    settings = Settings(rounds=options.rounds, clock=options.clock)
    about, sections = environment("cpu"), measure(settings)
    how = {"rounds": settings.rounds, "calls": CALLS, "clock": settings.clock}
    content = {"environment": about, **how, "sections": sections, "targets": judged(sections)}
    print(table(content))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, text in ((JSON, json.dumps(content, indent=1) + "\n"), (TABLE, table(content))):
            write_text_atomically(options.out / name, text)


if __name__ == "__main__":
    main()
