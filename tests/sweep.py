"""``python -m tests.sweep [--only PATTERN]``: every family of timm and Transformers through every way to save and load.

For each family of tests/families.py, one tiny model is adapted, trained for a step, saved, loaded, merged and loaded
again. Each time it must come back with the same outputs, or be refused, or a warning must name what is lost. A
difference without a word (``SILENT``) or an unexpected error makes the exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import glora
from glora.layers.base import SUPPORT_NAMES
from tests.families import FAMILIES, Family, MissingError
from tests.glora.toys import generator
from tests.silence import (
    ERROR,
    FAILURES,
    LATE,
    Looking,
    Verdict,
    Way,
    compare,
    difference,
    first_line,
    judge,
    names_of,
    refusal,
    said,
    tensors_in,
)

RANK = 2
# For merged models: W_eff times x, while the unmerged layer may add its terms in another order.
ROUNDING = 1e-5
# For timm's reparameterize_model, which folds norms into weights.
FOLDING = 1e-4
SEEN = 1e-3  # an adapter must change outputs by this, or its loss could not be seen
STEPS = ("adapter", "state_dict", "pickle", "native", "merge", "file", "whole", "again", "fused")
FREE = ("merge", "file", "again", "fused")  # once more with paths that make no bias, where the first made some
COLUMNS = (*STEPS, *(f"free {step}" for step in FREE))


@dataclass
class Record:
    """The results of one family.

    Attributes:
        layers, head: how many layers are adapted; whether the classifier is trained, adapted, frozen or absent.
        verdicts: by step; steps that do not apply are left out.
        note: why it was not built, or which arguments it took to adapt it.
    """

    family: str
    layers: int = 0
    head: str = ""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    note: str = ""
    seconds: float = 0.0

    @property
    def failures(self) -> dict[str, Verdict]:
        return {step: verdict for step, verdict in self.verdicts.items() if verdict.kind in FAILURES}


def examine(family: Family) -> Record:
    """Run all steps of one family; errors of any kind go into the record."""
    started = time.perf_counter()
    record = Record(family.title)
    torch.set_num_threads(1)
    try:
        _examine(family, record)
    except MissingError as error:
        record.note = f"not built: {error}"
    except Exception as error:
        record.verdicts["inject"] = Verdict(ERROR, f"{type(error).__name__}: {first_line(error)}")
    record.seconds = round(time.perf_counter() - started, 2)
    return record


def _examine(family: Family, record: Record) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = family.build()
        inputs = family.inputs(base)
        condition(base, inputs)
    gen = generator(zlib.crc32(family.title.encode()))
    try:
        model, options = adapt(base)
    except (TypeError, ValueError) as error:
        record.verdicts["inject"] = refusal(error)
        return
    record.note = ", ".join(f"{name}={value!r}"[:60] for name, value in options.items())
    record.layers, record.head = len(glora.glora_layers(model)), head_of(base, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        randomize(model, gen)
        glora.set_paths(model, glora.sample_paths(model, glora.SearchSpace((RANK, 1)), gen))
        called = train_step(model, inputs)
    if missed := [name for name in glora.glora_layers(model) if name not in called]:
        record.note += f" never called: {', '.join(missed)}"[:80]
    look = Looking(inputs)
    if not SEEN <= (seen := difference(look(base), look(model))) < float("inf"):
        record.verdicts["inject"] = Verdict(ERROR, f"the adapter changes outputs by {seen:.1e}: nothing can be seen")
        return
    fresh = lambda: copy.deepcopy(base)  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="glora-sweep-") as folder:
        for step, way in unmerged_ways(family, options).items():
            record.verdicts[step] = _sent(way, model, fresh, Path(folder) / step, look)
        record.verdicts |= _merged(family, model, fresh, Path(folder) / "merged", look)
        made = glora.get_paths(model)
        free = bias_free(model)
        if free != made:
            glora.set_paths(model, free)
            again = _merged(family, model, fresh, Path(folder) / "free", look)
            record.verdicts |= {f"free {step}": verdict for step, verdict in again.items() if step in FREE}


# -- a model as after training ---------------------------------------------------------------------


@torch.no_grad()
def condition(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Make every part of a base matter: no weight is zero, and norms have the statistics of their inputs."""
    gen = generator(1)
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        if flat.is_floating_point() and flat.numel() and bool((flat == flat[0]).all()) and abs(float(flat[0])) < 0.5:
            parameter.copy_(0.3 + 0.1 * torch.randn(parameter.shape, generator=gen))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    torch.manual_seed(0)
    model.train()(**inputs)
    model.eval()
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def adapt(base: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A copy with GLoRA by default, or with the arguments that a refusal names; and the arguments that it took."""
    model, options = copy.deepcopy(base), {}
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # frozen modules are no difference
                return glora.inject(model, RANK, **options), options
        except (TypeError, ValueError) as error:
            text = str(error)
            if "convolutions" not in options and ("found none" in text or "convolutions=True" in text):
                options["convolutions"] = True
            else:
                raise


@torch.no_grad()
def randomize(model: nn.Module, gen: torch.Generator) -> None:
    """Set random support tensors, so large that all of them show in the outputs of a deep model."""
    for layer in glora.glora_layers(model).values():
        width = layer.in_features**-0.5
        for name in SUPPORT_NAMES:
            parameter = getattr(layer, name)
            scale = 0.3 * width if name == "Bd" else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=gen) * scale)


def train_step(model: nn.Module, inputs: Mapping[str, Any]) -> set[str]:
    """Take a step in training mode, which also moves the statistics of norms.

    Returns the adapted layers that were called. Of the others a module reads the weight, or a router sent them nothing.
    """
    called: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, layer in glora.glora_layers(model).items()
    ]
    optimizer = torch.optim.SGD(glora.trainable_parameters(model), lr=1e-2)
    torch.manual_seed(0)
    # other inputs than those that set the norms, so that statistics move
    moved = {name: value * 2 + 0.5 if value.is_floating_point() else value for name, value in inputs.items()}
    losses = [t.float().square().mean() for t in tensors_in(model.train()(**moved)) if t.requires_grad]
    if losses:  # a path that reads nothing trains nothing
        torch.stack(losses).sum().backward()
    nn.utils.clip_grad_norm_(glora.trainable_parameters(model), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    for hook in hooks:
        hook.remove()
    return called


def bias_free(model: nn.Module) -> dict[str, glora.PathConfig]:
    """The paths without C and E in layers without bias."""
    return {
        name: replace(layer.path, C="none", E="none") if layer.bias is None else layer.path
        for name, layer in glora.glora_layers(model).items()
    }


def head_of(base: nn.Module, model: nn.Module) -> str:
    """Whether the classifiers of ``base`` are trained, adapted or frozen in ``model``; empty if it has none."""
    found = [name for name, module in base.named_modules() if module in _heads(base)]
    states = set()
    for name in found:
        module = model.get_submodule(name)
        if isinstance(module, glora.GLoRALayer):
            states.add("adapted")
        else:
            states.add("trained" if any(p.requires_grad for p in module.parameters()) else "frozen")
    return "+".join(sorted(states))


_HEADS = ("classifier", "score", "cls_classifier", "distillation_classifier", "logits_proj", "qa_outputs")


def _heads(base: nn.Module) -> list[nn.Module]:
    if hasattr(base, "get_classifier"):
        made = base.get_classifier()
        return [m for m in (made if isinstance(made, tuple) else (made,)) if any(True for _ in m.parameters())]
    named = [child for name, child in base.named_children() if name in _HEADS]
    embeddings = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    return named + ([] if embeddings is None else [embeddings])


# -- the ways --------------------------------------------------------------------------------------


def unmerged_ways(family: Family, options: Mapping[str, Any]) -> dict[str, Way]:
    """Ways for an adapted model: adapter file, state dict, pickle, and the package's own saving and loading."""
    return {
        "adapter": Way(
            lambda model, folder: glora.save_adapter(model, folder / "a.safetensors"),
            lambda fresh, folder: glora.load_adapter(fresh(), folder / "a.safetensors"),
        ),
        "state_dict": Way(
            write_state, lambda fresh, folder: read_state(glora.inject(fresh(), RANK, **options), folder)
        ),
        "pickle": WHOLE,
        "native": native(family),
    }


def merged_ways(family: Family) -> dict[str, Way]:
    """Ways for a plain model: state dict into the base, pickle, and the package's own saving and loading."""
    ways = {"file": Way(write_state, lambda fresh, folder: read_state(fresh(), folder)), "whole": WHOLE}
    return {**ways, "again": native(family)}


def native(family: Family) -> Way:
    """``save_pretrained`` and ``from_pretrained`` of Transformers; a checkpoint for ``create_model`` of timm."""
    if family.package == "timm":
        return Way(write_state, lambda fresh, folder: family.reload(folder / "state.pt"))
    return Way(
        lambda model, folder: model.save_pretrained(folder),  # type: ignore[operator]
        lambda fresh, folder: from_pretrained(fresh(), folder),
    )


def from_pretrained(base: nn.Module, folder: Path) -> nn.Module:
    """A copy, since tensors mapped from a file lie at odd addresses, where the CPU sums in another order."""
    return copy.deepcopy(type(base).from_pretrained(folder))  # type: ignore[attr-defined]


def write_state(model: nn.Module, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "state.pt")


def read_state(model: nn.Module, folder: Path) -> nn.Module:
    model.load_state_dict(torch.load(folder / "state.pt"))
    return model


WHOLE = Way(
    lambda model, folder: torch.save(model, folder / "model.pt"),
    lambda fresh, folder: torch.load(folder / "model.pt", weights_only=False),
)


def _sent(
    way: Way, model: nn.Module, fresh: Callable[[], nn.Module], folder: Path, look: Looking, warned: str = ""
) -> Verdict:
    try:
        return judge(way, model, fresh, folder, look, warned)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _merged(
    family: Family, model: nn.Module, fresh: Callable[[], nn.Module], folder: Path, look: Looking
) -> dict[str, Verdict]:
    """Merge a copy; if that is not refused, send it by each way."""
    expected, merged = look(model), copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            glora.merge(merged)
        except Exception as error:
            verdict = refusal(error)
            if difference(expected, look(merged)):
                verdict = Verdict(ERROR, f"merge refused and changed the model: {verdict.detail}")
            return {"merge": verdict}
    warned = said(heard, names_of(model))
    verdicts = {"merge": compare(merged, look, expected, ROUNDING, warned)}
    for step, way in merged_ways(family).items():
        verdicts[step] = _sent(way, merged, fresh, folder.with_name(f"{folder.name}-{step}"), look, warned)
    if family.package == "timm" and (fused := _fused(merged, fresh(), look, warned)):
        verdicts["fused"] = fused
    return verdicts


def _fused(merged: nn.Module, base: nn.Module, look: Looking, warned: str) -> Verdict | None:
    """timm's ``reparameterize_model`` of the merged model; None where it does nothing, or is not exact for the base."""
    from timm.utils.model import reparameterize_model

    if not any(hasattr(m, name) for m in merged.modules() for name in ("fuse", "reparameterize", "switch_to_deploy")):
        return None
    if difference(look(base), look(reparameterize_model(base))) > FOLDING:
        return None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            fused = reparameterize_model(merged)
        except Exception as error:  # timm's, such as an assertion that a convolution has no bias: loud, but late
            return Verdict(LATE, f"{type(error).__name__}: {first_line(error)}")
    return compare(fused, look, look(merged), FOLDING, warned or said(heard, names_of(merged)))


# -- the command -----------------------------------------------------------------------------------


def sweep(families: Sequence[Family], jobs: int = 1, progress: bool = True) -> Iterator[Record]:
    """The record of each family, in order, each as soon as it is known."""
    bar = {"total": len(families), "desc": "sweep", "unit": "family", "disable": not progress}
    if jobs == 1:
        yield from tqdm(map(examine, families), **bar)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        yield from tqdm(pool.map(examine, families), **bar)


def quiet() -> None:
    """Silence the logger by which Transformers reports what it leaves out: that is no warning, only noise here."""
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()


@contextmanager
def quietly() -> Iterator[None]:
    """:func:`quiet` for a block."""
    import transformers

    level = transformers.logging.get_verbosity()
    quiet()
    yield
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()


def table(records: Sequence[Record]) -> str:
    rows = [("family", "layers", "head", *COLUMNS, "s", "note")]
    for record in records:
        cells = [str(record.verdicts.get(column, "-")) for column in COLUMNS]
        note = record.note or "; ".join(
            f"{step} {verdict.kind}: {verdict.detail}" for step, verdict in record.verdicts.items() if step == "inject"
        )
        rows.append((record.family, str(record.layers), record.head or "-", *cells, f"{record.seconds:.1f}", note))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]).rstrip() for row in rows)


def summary(records: Sequence[Record]) -> str:
    counts = Counter(verdict.kind for record in records for verdict in record.verdicts.values())
    failing = [record for record in records if record.failures]
    missing = [record.family for record in records if record.note.startswith("not built")]
    lines = [
        f"{len(records)} families, {sum(counts.values())} round trips: "
        + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()),
        *(f"not built: {name}" for name in missing),
        *(
            f"{record.family}: {step}: {verdict.kind} {verdict.detail}"
            for record in failing
            for step, verdict in record.failures.items()
        ),
        f"{len(failing)} families with a silent difference or an error",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description="Every family through every way.")
    parser.add_argument("--only", default="", metavar="PATTERN", help="families whose name this expression is found in")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    options = parser.parse_args(arguments)
    families = [family for family in FAMILIES if re.search(options.only, family.title)]
    if not families:
        parser.error(f"--only: expected part of a name such as {FAMILIES[0].title}, got {options.only!r}")
    quiet()
    records = list(sweep(families, options.jobs))
    print(table(records), summary(records), sep="\n\n")
    if options.json:
        options.json.write_text(json.dumps([_plain(record) for record in records], indent=1) + "\n")
    return int(any(record.failures for record in records))


def _plain(record: Record) -> dict:
    verdicts = {step: verdict._asdict() for step, verdict in record.verdicts.items()}
    return {**asdict(record), "verdicts": verdicts}


if __name__ == "__main__":
    sys.exit(main())
