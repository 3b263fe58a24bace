"""Microseconds of host time that a layer call takes apart from its arithmetic: checks, dispatch, autograd, modules.

    python -m bench.host_overhead --out bench/results/host-overhead

Shapes are tiny, so that arithmetic takes no time; one thread; the path of ten tensors (all low rank, with a bias). All
run in turn in one process. An overhead is the difference to the *plain function* of the same round. The plain function
is the torch backend called directly with its operands: no module, no checks, no dispatch, no Terms to make. For
training, an ``autograd.Function`` saves the operands and calls the backend's two passes.

On a CPU no Triton kernel runs. Of that route everything before its launches is timed: launches are recorded and not
run (``glora_kernels._triton.launch.recorded``), so that the launcher's own time is not included.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glora import GLoRALayer
from glora.config import make_path
from glora.files import write_atomically
from glora_kernels import Terms, _torch, available_backends, glora_linear, use_backend
from glora_kernels.backend import BackwardCall

from .entrants import Field, make_field
from .entrants.names import FROZEN, GLORA, LORA, OFFICIAL, OURS, all_low_rank
from .environment import environment
from .settings import CLOCKS, SEED, Settings
from .timing import WHOLE, Watch, interleave, median_interval
from .workloads import LayerWorkload

TOKENS, WIDTH, RANK = 4, 16, 4
CALLS = 25  # per timing, so that reading the clock hardly counts
TRAINING, INFERENCE = "training", "without grad"
AT_MOST = {TRAINING: 12.0, INFERENCE: 6.0}  # microseconds of a layer over the plain function
PLAIN, BARE = "plain function", "plain function in an nn.Module"
FUNCTION, LAYER, CHANGING = "glora_linear", "GLoRALinear", "GLoRALinear, a new path each call"
REFERENCE, TRITON, EXTENSION = "reference backend", "Triton route up to its launches", "C++ extension"
PEERS = {LORA: LORA, GLORA: GLORA, OFFICIAL: OFFICIAL, FROZEN: "nn.Linear, frozen"}
CLOCK_NAMES = {"wall": "the wall clock", "cpu": "the process"}
JSON, TABLE = "overhead.json", "table.md"
Around = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Entry:
    """One way to call a layer that is timed.

    Attributes:
        call: one call.
        leaves: the tensors on which backward leaves gradients.
        around: the block in which calls are made; entering it is not timed.
    """

    call: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    around: Around = nullcontext


class Bare(nn.Module):
    """A module around a function: shows the time of ``nn.Module`` itself."""

    def __init__(self, function: Callable[[], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, _x: Tensor) -> Tensor:
        return self.function()


def plain_function(x: Tensor, weight: Tensor, bias: Tensor, terms: Terms, training: bool) -> Callable[[], Tensor]:
    """The torch backend with none of our code around it; every slot of ``terms`` and x want a gradient."""
    storages, slots = terms.flatten()[0], [slot for slot, _ in terms.active]
    wanted = frozenset(slots)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, *storages):
            y, projected, _ = _torch.forward(x, weight, bias, terms)
            ctx.save_for_backward(x, weight, bias, projected, *storages)
            return y

        @staticmethod
        def backward(ctx, dy):
            x, weight, bias, projected, *_ = ctx.saved_tensors
            dx, grads = _torch.backward(BackwardCall(dy, x, weight, bias, terms, None, None, projected, wanted, True))
            return dx, None, None, *(grad for slot in slots for grad in grads[slot])

    if training:
        return lambda: Plain.apply(x, weight, bias, *storages)
    return lambda: _torch.forward(x, weight, bias, terms).y


def entries(made: Field, x: Tensor, training: bool) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries that are timed, by name; and those that are not, with the reason."""
    layer = made.models[OURS][0]
    assert isinstance(layer, GLoRALayer)
    weight, bias, terms, leaves = layer.weight, layer.bias, layer.terms(), (x, *layer.support_parameters())
    changing = copy.deepcopy(layer)
    assert bias is not None
    plain = plain_function(x, weight, bias, terms, training)
    found = {
        PLAIN: Entry(plain, leaves),
        BARE: Entry(partial(Bare(plain), x), leaves),
        LAYER: Entry(lambda: layer(x), leaves),
        FUNCTION: Entry(lambda: glora_linear(x, weight, bias, terms), leaves),
        CHANGING: Entry(_changing(changing, x), (x, *changing.support_parameters())),
        REFERENCE: Entry(lambda: layer(x), leaves, partial(use_backend, "reference")),
    }
    missing = dict(made.missing)
    for name, block in ((TRITON, triton_up_to_launches()), (EXTENSION, in_extension())):
        if isinstance(block, str):
            missing[name] = block
        else:
            found[name] = Entry(lambda: layer(x), leaves, block)
    for name, title in PEERS.items():
        if name in made.models:
            model = made.models[name][0]
            found[title] = Entry(partial(model, x), (x, *model.parameters()))
    return found, missing


def _changing(layer: GLoRALayer, x: Tensor) -> Callable[[], Tensor]:
    """Calls as in supernet training; setting the path is timed too. The paths differ in a rank, not in the code run."""
    path, ranks = layer.path, cycle(range(1, RANK + 1))

    def call() -> Tensor:
        layer.path = make_path(path.A, path.B, f"lora_{next(ranks)}", path.D, path.E)
        return layer(x)

    return call


def triton_up_to_launches() -> Around | str:
    """A block in which calls take the Triton route and launches are recorded; or the reason why there is none."""
    reason = available_backends()["triton"]
    if reason is not None:
        return reason
    from glora_kernels._triton.launch import recorded

    @contextmanager
    def around() -> Iterator[None]:
        with use_backend("triton"), recorded():
            yield

    return around


def in_extension() -> Around | str:
    """A block in which calls go to the C++ extension; or the reason why it cannot be used here."""
    return available_backends()["cuda"] or partial(use_backend, "cuda")


def measure(settings: Settings) -> list[dict[str, Any]]:
    """Time calls in training and calls without grad of all entries; the results of all are checked first."""
    torch.manual_seed(SEED)
    x, dy = settings.randn(TOKENS, WIDTH).requires_grad_(), settings.randn(TOKENS, WIDTH)
    made = make_field(nn.Sequential(nn.Linear(WIDTH, WIDTH)), ["0"], RANK, PEERS)
    made.check(LayerWorkload(x, dy), [{"0": all_low_rank(RANK)}], settings.layer_tolerance)
    made.set_path(all_low_rank(RANK))
    found = []
    for mode in AT_MOST:
        timed, missing = entries(made, x, mode == TRAINING)
        require_same_bits(timed, dy, mode == TRAINING)
        runs = {name: _run(entry, dy, mode == TRAINING) for name, entry in timed.items()}
        times = interleave(runs, settings.rounds, warmup=3, watch=settings.watch())[WHOLE]
        microseconds = {name: [1e6 * seconds / CALLS for seconds in values] for name, values in times.items()}
        figures = {name: _figures(values, microseconds[PLAIN]) for name, values in microseconds.items()}
        found.append({"mode": mode, "figures": figures, "missing": missing, "refused": made.refused})
    return found


def require_same_bits(timed: dict[str, Entry], dy: Tensor, training: bool) -> None:
    """Raise ValueError if a layer does not compute the bits of the plain function."""
    want = _results(timed[PLAIN], dy, training)
    for name in (FUNCTION, LAYER):
        if not all(map(torch.equal, _results(timed[name], dy, training), want)):
            raise ValueError(f"{name}: not timed, it differs from the plain function")


def _results(entry: Entry, dy: Tensor, training: bool) -> list[Tensor]:
    with torch.set_grad_enabled(training):
        y = entry.call()
        return [y, *torch.autograd.grad(y, entry.leaves, dy)] if training else [y]


def _run(entry: Entry, dy: Tensor, training: bool) -> Callable[[Watch], None]:
    """:data:`CALLS` calls, in training with their backward passes."""

    def step() -> None:
        torch.autograd.backward(entry.call(), dy)
        for leaf in entry.leaves:
            leaf.grad = None

    once = step if training else entry.call

    def run(watch: Watch) -> None:
        with entry.around(), torch.set_grad_enabled(training), watch(WHOLE):
            for _ in range(CALLS):
                once()

    return run


def _figures(microseconds: list[float], plain: list[float]) -> dict[str, float]:
    """Figures of a call, and over the plain function of the same round; ``least_over`` is the difference of minima."""
    over = [own - other for own, other in zip(microseconds, plain, strict=True)]
    low, high, _ = median_interval(over)
    return {
        "median": statistics.median(microseconds),
        "least": min(microseconds),
        "median_over": statistics.median(over),
        "low_over": low,
        "high_over": high,
        "least_over": min(microseconds) - min(plain),
    }


def table(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    about = content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version is not None)
    lines = [
        f"# Host time of a layer call\n\n{about['device']}, one thread, Python {about['python']}, {versions}; "
        f"{about['date'][:10]}, commit {about['commit']}; load average {about['load_average'][0]:.1f} of "
        f"{about['cores']} cores. {content['rounds']} interleaved rounds of {content['calls']} calls; {TOKENS} tokens, "
        f"{WIDTH} -> {WIDTH}, rank {RANK}, ten tensors. Microseconds of {CLOCK_NAMES[content['clock']]}; "
        "in brackets the interval that holds the median with 95%."
    ]
    for section in content["sections"]:
        lines += [
            f"\n## {section['mode'].capitalize()}\n\n| | median | least | over the plain function | least over least |",
            "|---|--:|--:|--:|--:|",
        ]
        for name, f in section["figures"].items():
            over = f"{f['median_over']:.1f} [{f['low_over']:.1f}, {f['high_over']:.1f}]"
            lines.append(f"| {name} | {f['median']:.1f} | {f['least']:.1f} | {over} | {f['least_over']:.1f} |")
        lines += [f"\n{_verdict(section)}"]
        lines += [f"\nNot timed: {name}: {why}" for name, why in {**section["missing"], **section["refused"]}.items()]
    return "\n".join(lines) + "\n"


def _verdict(section: dict[str, Any]) -> str:
    found, most = section["figures"][LAYER]["median_over"], AT_MOST[section["mode"]]
    return f"{LAYER}: {found:.1f} over the plain function, at most {most:.0f}: {'met' if found <= most else 'MISSED'}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host_overhead", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=200, help="interleaved rounds (default: 200)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that others use (wall)")
    parser.add_argument("--out", type=Path, help=f"folder to write {JSON} and {TABLE} to")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the Triton route can be taken; nothing is interpreted
    torch.set_num_threads(1)
    settings = Settings(rounds=options.rounds, clock=options.clock)
    about = environment("cpu")
    how = {"rounds": settings.rounds, "calls": CALLS, "clock": settings.clock}
    content = {"environment": about, **how, "sections": measure(settings)}
    print(table(content))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, text in ((JSON, json.dumps(content, indent=1) + "\n"), (TABLE, table(content))):
            write_atomically(options.out / name, lambda stream, text=text: stream.write(text.encode()))


if __name__ == "__main__":
    main()
