"""``python -m tests.round_trips [CASES]``: random models through every way to save and load, and the verdicts.

See tests/silence.py for the verdicts, tests/toy_models.py for the models.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import pickle
import random
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import glora
from tests.glora.toys import generator
from tests.helpers import TEST_SEED
from tests.silence import FAILURES, Looking, Verdict, Way, difference, judge, refusal
from tests.sweep import WHOLE, from_pretrained, quiet, randomize, read_state, train_step, write_state
from tests.toy_models import CLASSES, SAMPLES, Tiny, Toy, draw, draw_tiny

# Tolerance for merged models and PEFT's, relative to the largest output: the size of rounding in the model's type.
ROUNDING = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 5e-2}


class Route(NamedTuple):
    """A way to save and load one model, and which models are drawn for it.

    ``restrict``: the allowed paths of most models (see :class:`tests.toy_models.Toy`); ``linear``: whether most models
    fit a format for linear layers; ``tiny``: the share of Transformers models; ``rounds``: whether outputs may differ
    by rounding.
    """

    way: Callable[[Any, nn.Module], Way]
    restrict: str = "any"
    linear: bool = False
    tiny: float = 0.0
    rounds: bool = False


def _adapter(toy: Toy, model: nn.Module, *, into: Callable = lambda toy, base: base, out_of: Callable = lambda m: m):
    return Way(
        lambda model, folder: glora.save_adapter(out_of(model), folder / "a.safetensors"),
        lambda fresh, folder: glora.load_adapter(into(toy, fresh()), folder / "a.safetensors"),
    )


def _compiled(model: nn.Module) -> nn.Module:
    """A compiled wrapper, which prefixes names; it is never run, so that nothing is compiled."""
    return torch.compile(model, backend="eager")


def _unwrapped(way: Way) -> Way:
    return Way(way.write, lambda fresh, folder: getattr(again := way.read(fresh, folder), "_orig_mod", again))


def _official(toy: Toy, model: nn.Module, *, with_paths: bool) -> Way:
    paths = [path.to_dict() for path in glora.get_paths(model).values()] if with_paths else None
    return Way(
        lambda model, folder: glora.save_official(model, folder / "official.pt"),
        lambda fresh, folder: glora.load_official(fresh(), folder / "official.pt", paths),
    )


def _lycoris(toy: Toy, model: nn.Module, *, layout: str) -> Way:
    return Way(
        lambda model, folder: glora.save_lycoris(model, folder / "l.safetensors", layout=layout),
        lambda fresh, folder: glora.load_lycoris(fresh(), folder / "l.safetensors", layout=layout),
    )


def _peft_folder(toy: Toy, model: nn.Module) -> Way:
    return Way(
        lambda model, folder: glora.peft.export_peft(model, folder / "peft"),
        lambda fresh, folder: glora.peft.import_peft(fresh(), folder / "peft"),
    )


def _peft(toy: Toy, model: nn.Module) -> Way:
    def read(fresh: Callable[[], nn.Module], folder: Path) -> nn.Module:
        import peft

        return peft.PeftModel.from_pretrained(fresh(), folder / "peft")

    return Way(lambda model, folder: glora.peft.export_peft(model, folder / "peft"), read)


def _state_dict(toy: Toy, model: nn.Module) -> Way:
    return Way(write_state, lambda fresh, folder: read_state(toy.adapt(fresh()), folder))


def _state_dict_copied(toy: Toy, model: nn.Module) -> Way:
    """A state dict as many copy it: only the tensors, in a new dict."""
    return Way(
        lambda model, folder: torch.save({**model.state_dict()}, folder / "state.pt"),
        lambda fresh, folder: read_state(toy.adapt(fresh()), folder),
    )


def _safetensors(toy: Toy, model: nn.Module) -> Way:
    from safetensors.torch import load_model, save_model

    def read(fresh: Callable[[], nn.Module], folder: Path) -> nn.Module:
        load_model(adapted := toy.adapt(fresh()), folder / "model.safetensors")
        return adapted

    return Way(lambda model, folder: save_model(model, str(folder / "model.safetensors")), read)


def _checkpoint(toy: Toy, model: nn.Module, *, space: bool) -> Way:
    """Train to the end, then run the same lines again: the model must be the same as at the end."""
    data = TensorDataset(toy.inputs()["input"], torch.arange(SAMPLES) % CLASSES)
    paths = glora.get_paths(model)
    ranks = (min(layer.rank for layer in glora.glora_layers(model).values()),)
    run = partial(
        glora.train,
        dataset=data,
        recipe=glora.Recipe(steps=2, batch_size=SAMPLES),
        space=glora.SearchSpace(ranks) if space else None,
        progress=False,
    )

    def write(model: nn.Module, folder: Path) -> nn.Module:
        run(trained := copy.deepcopy(model), checkpoint=folder / "run.pt")
        return trained

    def read(fresh: Callable[[], nn.Module], folder: Path) -> nn.Module:
        glora.set_paths(resumed := toy.adapt(fresh()), paths)
        run(resumed, checkpoint=folder / "run.pt")
        return resumed

    return Way(write, read)


def _pickle(toy: Toy, model: nn.Module) -> Way:
    return Way(
        lambda model, folder: (folder / "model.pickle").write_bytes(pickle.dumps(model)),
        lambda fresh, folder: pickle.loads((folder / "model.pickle").read_bytes()),
    )


def _deepcopy(toy: Toy, model: nn.Module) -> Way:
    kept: list[nn.Module] = []
    return Way(lambda model, folder: kept.append(copy.deepcopy(model)), lambda fresh, folder: kept.pop())


def _whole(toy: Toy, model: nn.Module) -> Way:
    return WHOLE


def _pretrained(toy: Tiny, model: nn.Module) -> Way:
    return Way(
        lambda model, folder: model.save_pretrained(folder / "model"),  # type: ignore[operator]
        lambda fresh, folder: from_pretrained(fresh(), folder / "model"),
    )


PRETRAINED = _pretrained(None, None)  # type: ignore[arg-type]


def _merged(toy: Toy, model: nn.Module, *, way: Way) -> Way:
    """A merged copy, by a way for plain models."""

    def write(model: nn.Module, folder: Path) -> None:
        merged = copy.deepcopy(model)
        glora.merge(merged)
        way.write(merged, folder)

    return Way(write, way.read)


PLAIN_STATE = Way(write_state, lambda fresh, folder: read_state(fresh(), folder))
injected = lambda toy, base: toy.adapt(base)  # noqa: E731
ROUTES: Mapping[str, Route] = {
    "adapter": Route(_adapter, tiny=0.1),
    "adapter, into GLoRA": Route(partial(_adapter, into=injected), tiny=0.1),
    "adapter of a compiled model": Route(partial(_adapter, out_of=_compiled)),
    "adapter into a compiled model": Route(
        lambda toy, model: _unwrapped(_adapter(toy, model, into=lambda toy, base: _compiled(base)))
    ),
    "official": Route(partial(_official, with_paths=True), linear=True),
    "official, paths forgotten": Route(partial(_official, with_paths=False), linear=True),
    # a loaded storage has only the file's rank: another memory layout, and so another order of sums
    "lycoris new": Route(partial(_lycoris, layout="new"), "lycoris", linear=True, rounds=True),
    "lycoris old": Route(partial(_lycoris, layout="old"), "lycoris", linear=True, rounds=True),
    "peft folder": Route(_peft_folder, "peft", linear=True),
    "peft": Route(_peft, "peft", linear=True, rounds=True),
    "state_dict": Route(_state_dict, tiny=0.1),
    "state_dict, copied": Route(_state_dict_copied, tiny=0.1),
    "safetensors": Route(_safetensors, tiny=0.1),
    "checkpoint": Route(partial(_checkpoint, space=False)),
    "checkpoint of a supernet": Route(partial(_checkpoint, space=True)),
    "pickle": Route(_pickle, tiny=0.1),
    "torch.save": Route(_whole, tiny=0.1),
    "deepcopy": Route(_deepcopy, tiny=0.1),
    "merged, torch.save": Route(partial(_merged, way=WHOLE), rounds=True),
    "merged, state_dict": Route(partial(_merged, way=PLAIN_STATE), "no bias", tiny=0.1, rounds=True),
    "save_pretrained": Route(_pretrained, tiny=1),
    "merged, save_pretrained": Route(partial(_merged, way=PRETRAINED), tiny=1, rounds=True),
    "merged without new biases, save_pretrained": Route(
        partial(_merged, way=PRETRAINED), "no bias", tiny=1, rounds=True
    ),
}


class Case(NamedTuple):
    """One round trip and its result; ``seen`` is how much the adapter changes the outputs."""

    route: str
    index: int
    model: Toy | Tiny
    verdict: Verdict
    seen: float


def run(name: str, index: int) -> Case:
    """Run the round trip with this number: the same in every run."""
    route, rng = ROUTES[name], random.Random(f"{TEST_SEED} {name} {index}")
    restrict = route.restrict if rng.random() < 0.8 else "any"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if rng.random() < route.tiny and importlib.util.find_spec("transformers"):
            toy: Toy | Tiny = draw_tiny(rng, restrict)
        else:
            toy = draw(rng, restrict, linear=route.linear and rng.random() < 0.8)
        base = toy.build()
        try:
            model = toy.adapt(toy.build())
        except (TypeError, ValueError) as error:
            return Case(name, index, toy, refusal(error), 0.0)
        gen = generator(toy.seed)
        randomize(model, gen)
        glora.set_paths(model, toy.paths(model))
        train_step(model, toy.inputs())
        look = Looking(toy.inputs())
        seen = difference(look(base), look(model))
    way = route.way(toy, model)
    if route.rounds:
        way = way._replace(tolerance=ROUNDING[toy.coarsest])
    with tempfile.TemporaryDirectory(prefix="glora-round-trip-") as folder:
        return Case(name, index, toy, judge(way, model, toy.build, Path(folder) / "files", look), seen)


def table(cases: Iterable[Case]) -> str:
    """The number of each verdict, by route."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        counts[case.route][case.verdict.kind] += 1
    return "\n".join(
        f"{route:45}" + ", ".join(f"{n} {kind}" for kind, n in c.most_common()) for route, c in counts.items()
    )


def report(cases: Iterable[Case]) -> str:
    """The failures, with the data to build each again."""
    failing = [case for case in cases if case.verdict.kind in FAILURES]
    return "\n".join(f"{case.route}, {case.index}: {case.verdict}\n    {case.model}" for case in failing)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.round_trips", description="Random models, every way.")
    parser.add_argument("cases", nargs="?", type=int, default=2000, help="how many round trips (default: 2000)")
    parser.add_argument("--only", default="", metavar="TEXT", help="routes whose name has this in it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    quiet()
    routes = [name for name in ROUTES if options.only in name]
    todo = [(routes[i % len(routes)], i // len(routes)) for i in range(options.cases)]
    cases = [run(*each) for each in tqdm(todo, unit="trip")]
    print(report(cases), table(cases), f"{len(cases)} round trips, GLORA_TEST_SEED={TEST_SEED}", sep="\n\n")
    return int(any(case.verdict.kind in FAILURES for case in cases))


if __name__ == "__main__":
    sys.exit(main())
