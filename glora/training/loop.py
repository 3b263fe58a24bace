"""Training: of a supernet, with a random path per layer and step, or of a fixed path or plain model.

Everything that a step depends on is a function of the seed and of a state that is checkpointed:
the batch of step t is a pure function of (seed, t), paths are drawn outside forward from one
generator, and dropout uses torch's global one. A run that was cut and resumed therefore has the
same bits as one that was not (on one device type).

Several processes (see :mod:`glora.distributed`) draw the same paths and the same batches. Each takes its share of a
batch; torch's generator is seeded in each step, from the seed, the step and the rank.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..arguments import FILE, require_function, require_integer, require_type
from ..balancing import Kind, kinds_of, measure, set_scales
from ..config import SearchSpace
from ..dataset import Collate, collate_or_joined, require_batch, require_data
from ..distributed import copy_from_first, holds_shards, require_trainable, require_whole, unwrapped
from ..files import require_file
from ..layers.base import GLoRALayer
from ..models.modules import require_layers
from ..models.wrappers import is_compiled
from ..objective import Loss, Metrics, Objective, Outputs
from ..parameters import require_something_read, trainable_parameters
from ..paths import sampler_for, set_layer_paths, set_paths
from ..processes import from_first, is_first, require_agreement, require_group, together, world_size
from ..progress import progress_bar, say
from ..sampling import PathSampler
from .batches import batches, batches_in, fingerprint
from .first_step import first_step
from .graphing import StepGraphs, require_graphs
from .log import Meter, save_log
from .recipe import Recipe
from .results import Results
from .state import TrainingState
from .step import take_step
from .validation import Validation


@dataclass(frozen=True)
class TrainSummary:
    """What a run did.

    Attributes:
        steps, losses: of the whole run; ``losses`` has one entry per step.
        seconds, images_per_second: of this call.
        total_seconds: of the whole run, without work that was lost when it was cut.
        resumed_from: the step that this call began at.
        graphs: how the steps of this call ran: ``"piecewise"``, ``"whole"``, ``"off"``, or ``"off: "`` and why.
        validations: of the whole run: loss and accuracy on the validation data, by the step after which they were
            formed; empty without such data.
    """

    steps: int
    losses: tuple[float, ...]
    seconds: float
    images_per_second: float
    resumed_from: int
    total_seconds: float
    graphs: str = "off"
    validations: Mapping[int, Metrics] = field(default_factory=dict)


def train(
    model: nn.Module,
    dataset: Dataset | DataLoader,
    recipe: Recipe,
    *,
    space: SearchSpace | None = None,
    validation: Dataset | DataLoader | None = None,
    loss_fn: Loss | None = None,
    outputs: Outputs = None,
    collate: Collate | None = None,
    checkpoint: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
    workers: int = 0,
    progress: bool = True,
    on_step: Callable[[int, float], object] | None = None,
    graphs: str = "auto",
) -> TrainSummary:
    """Train every parameter of ``model`` that requires grad.

    With a ``space`` the model is a supernet: each step draws a path for every layer from it, and
    only the tensors read get a gradient. The others keep ``grad`` None and the optimiser does not
    touch them: neither value, nor moments, nor weight decay. Afterwards the paths are as before, and
    the model is in training mode.

    With several processes (``torchrun`` and ``torch.distributed.init_process_group``), each calls it with the same
    arguments and gets the same parameters and losses, equal to those of one process up to rounding: each takes its
    share of the batch of ``recipe.batch_size`` samples. All models start as rank 0's. Rank 0 alone reads and
    writes the checkpoint, which any number of processes can resume. The model may be within
    ``DistributedDataParallel`` with ``find_unused_parameters=True``, or within ``fully_shard``.

    Args:
        dataset: a map-style data set of ``(input, target)``, or of dictionaries of the model's arguments, with targets
            under ``labels`` (a tokenizer's, a processor's, those of Hugging Face's ``datasets``). Each sample is read
            with generators (Python's, numpy's, torch's) of its own, so that random augmentation too is the same after a
            cut and for any ``workers``. A ``TensorDataset`` is indexed by whole batches instead: on a GPU, if it fits
            into a quarter of what is free there. Or a ``DataLoader`` of either: its batches, in its order, which
            is seeded; ``recipe.batch_size``, ``workers`` and ``collate`` are not read then. It needs a single process,
            and is told to be seeded anew in each pass, which ``persistent_workers`` cannot be.
        recipe: how to train.
        space: draw paths from it; None trains the model as it is.
        validation: samples as for :func:`glora.evaluate`, on which the model is scored at the end of each epoch and
            after the last step: in eval mode, and under the paths that its layers had before the call, so that the
            figures of a supernet can be compared. They are in the log, in the bar and in the summary; nothing that is
            trained depends on them. With several processes rank 0 scores alone, unless parameters are sharded.
        loss_fn: ``(output, target) -> scalar``; for several processes, a mean over samples. None: the loss that the
            model returns (``.loss``) where it is given labels, else the cross-entropy of its logits, in which targets
            of -100 do not count. With a loss of your own, and where its ``forward`` has no such argument, the model is
            not given the labels.
        outputs: what of the model's output counts, a function of it or the name of a part. None: for the cross-entropy,
            a tensor itself, ``logits`` of an object or a dictionary, of a tuple the first tensor that is no scalar; for
            a loss of your own, the whole output.
        collate: makes a batch of a list of samples, such as transformers' data collators.
        checkpoint: a file to resume from, if it exists, and to save to; written atomically. That of another run is
            refused: one with other settings, products, frozen weights or data (a first, a middle and a last sample
            are compared, if reading them twice gives the same).
        log: a CSV file (step, epoch, lr, loss, accuracy, and validation_loss and validation_accuracy if there is such
            data), rewritten with every checkpoint and at the end.
        workers: processes that read samples; 0 reads them in this one.
        progress: show a bar with loss, accuracy (for class targets) and images per second.
        on_step: called with the step and its loss after each step and its checkpoint, on every rank. It makes a GPU
            wait: without it, the loss of a step is read while the next one runs, and one that is not finite is
            noticed after the parameters have taken that step.
        graphs: how steps run on a GPU (:class:`glora.GraphedStep`). ``"auto"``: each adapted layer from CUDA graphs
            (``"piecewise"``), or everything as it comes where that is impossible, as one line and the summary say:
            several processes, a compiled model, a quantised base, ``amp="float16"``, a layer that runs twice a step,
            batches of changing shapes, too little memory. ``"whole"``: the whole step as one graph; ``"off"``: none. A
            checkpoint may be resumed under another choice; results differ in rounding.

    Raises:
        ValueError: nothing to train, or nothing that the paths read; an empty data set, a space that does not fit the
            model, a checkpoint of another run or in no folder, or a loss or parameters that are not finite; processes
            that have no group or differ in their arguments, or a wrapper or batch norm that would train wrongly;
            ``amp="float16"`` on a CPU, or ``label_smoothing`` with a loss of your own; graphs that were asked for by
            name and are impossible.
        TypeError: an argument or samples of another type; an output in which the rule of ``outputs`` finds no logits.
        RuntimeError: another process failed.

    Example:
        >>> glora.train(vit, images, glora.Recipe(steps=500), space=glora.SearchSpace())
        >>> collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
        >>> glora.train(llama, tokenized, glora.Recipe(steps=500, amp="bfloat16"), collate=collator)
    """
    require_group()
    shown = progress and is_first()
    tell = say if shown else _say_nothing
    together(lambda: _check_types(recipe, space, checkpoint, log, on_step))
    join = together(lambda: collate_or_joined(collate))
    loader = dataset if isinstance(dataset, DataLoader) else None
    if loader is not None and loader.batch_size is not None:
        recipe = replace(recipe, batch_size=loader.batch_size)
    objective = together(lambda: Objective(model, loss_fn, outputs, recipe.label_smoothing))
    state, sampler = together(lambda: _prepare(model, dataset, recipe, space, loss_fn, log, workers, graphs))
    paths_before = {name: layer.path for name, layer in state.layers.items()}
    scoring = together(lambda: Validation(state, validation, objective, paths_before, workers, collate))
    if world_size() > 1:
        _start_alike(state, checkpoint is not None, validation is not None)
    if checkpoint is not None and loader is not None and loader.persistent_workers:
        warnings.warn(
            "dataset: a DataLoader with persistent_workers does not seed them anew in each pass; if they draw at "
            "random, a run that is cut goes on with other numbers",
            stacklevel=2,
        )
    if checkpoint is not None:
        state.data = from_first(lambda: fingerprint(dataset))
    if checkpoint is None or not state.load(checkpoint):
        if recipe.balance is not None:
            _balance(state, dataset, objective, join, recipe.balance)
        torch.manual_seed(recipe.seed)
    else:
        tell(f"train: continues from {os.fspath(checkpoint)}, step {state.step} of {recipe.steps}")
    model.train()
    resumed_from, started = state.step, time.perf_counter()
    step_graphs = StepGraphs(state, objective, graphs, tell)
    watched = {} if is_compiled(model) else state.layers  # a graph that was compiled before calls no new hooks
    results = Results(state.records, late=state.device.type == "cuda" and on_step is None)
    steps = batches(dataset, recipe, state.step, workers, state.device, join)
    bar = progress_bar(total=recipe.steps, initial=state.step, desc="train", unit="step", shown=shown)
    meter = Meter(None if loader is not None and loader.batch_size is None else recipe.batch_size)
    try:
        while state.step < recipe.steps:
            if sampler is not None:
                set_layer_paths(state.layers, sampler.sample(state.generator))
            with _first_step(state, watched, step_graphs.used) if state.step == resumed_from else nullcontext():
                records = take_step(state, steps, objective, step_graphs, results)
            if scoring.is_due:
                scoring.run()
            if state.step % recipe.checkpoint_every == 0 or state.step == recipe.steps:
                records += results.read(every=True)
                _save(state, checkpoint, log)
            meter.update(records)
            bar.set_postfix_str(meter.text(state.validations), refresh=False)
            bar.update()
            if on_step is not None:
                on_step(state.step, state.records[-1].loss)
                state.find_layers()  # it may have put others in their place
                step_graphs.renew()
    finally:
        bar.close()
        step_graphs.close()
        if paths_before:
            set_paths(state.inner, paths_before)
    seconds = time.perf_counter() - started
    images = state.seen if world_size() == 1 else (state.step - resumed_from) * recipe.batch_size
    speed = images / seconds if seconds else 0.0
    losses = tuple(record.loss for record in state.records)
    total, graphed = state.seconds, step_graphs.used
    return TrainSummary(state.step, losses, seconds, speed, resumed_from, total, graphed, state.validations)


def _say_nothing(_: str) -> None:
    """For runs that show no progress."""


def _check_types(
    recipe: Recipe,
    space: SearchSpace | None,
    checkpoint: str | os.PathLike | None,
    log: str | os.PathLike | None,
    on_step: Callable[[int, float], object] | None,
) -> None:
    require_type("recipe", recipe, Recipe, "a glora.Recipe")
    require_type("space", space, (SearchSpace, type(None)), "a glora.SearchSpace or None")
    require_type("checkpoint", checkpoint, FILE, "the path of a file or None")
    require_type("log", log, FILE, "the path of a file or None")
    if on_step is not None:
        require_function("on_step", on_step, "a function of the step and its loss")


def _prepare(
    model: nn.Module,
    dataset: Dataset | DataLoader,
    recipe: Recipe,
    space: SearchSpace | None,
    loss_fn: Loss | None,
    log: str | os.PathLike | None,
    workers: int,
    graphs: str,
) -> tuple[TrainingState, PathSampler | None]:
    """The state and the sampler of a run; raises what the arguments alone can tell."""
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("model: expected parameters that require grad, found none")
    if space is None:
        require_something_read(model, "train over a space")
    if recipe.balance is not None:
        require_whole(unwrapped(model))
        require_layers(unwrapped(model))
    samples, rate = _count_samples(dataset), _epochs_per_step(dataset, recipe)
    if recipe.label_smoothing and loss_fn not in (None, F.cross_entropy):
        raise ValueError(
            f"loss_fn: expected the default with label_smoothing={recipe.label_smoothing}, which it does not get"
        )
    if recipe.amp == "float16" and parameters[0].device.type == "cpu":
        raise ValueError("amp: expected 'bfloat16' or None on a CPU, got 'float16'")
    require_integer("workers", workers, 0)
    require_graphs(graphs, parameters[0].device)
    if log is not None:
        require_file("log", log)
    require_trainable(model, space is not None)
    sampler = None if space is None else sampler_for(unwrapped(model), space, training=True)
    return TrainingState(model, parameters, recipe, space, samples, rate, capturable=graphs == "whole"), sampler


def _count_samples(dataset: Dataset | DataLoader) -> int | None:
    """How many samples there are; None if a loader cannot say. Raises TypeError, ValueError for no data set."""
    if not isinstance(dataset, DataLoader):
        return require_data("dataset", dataset)
    if world_size() > 1:
        raise ValueError(
            "dataset: expected a data set where several processes share each batch, got a DataLoader; pass its .dataset"
        )
    return None if isinstance(dataset.dataset, IterableDataset) else require_data("dataset", dataset.dataset)


def _epochs_per_step(dataset: Dataset | DataLoader, recipe: Recipe) -> Fraction | None:
    if not isinstance(dataset, DataLoader):
        return Fraction(recipe.batch_size, len(dataset))  # type: ignore[arg-type]
    length = batches_in(dataset)
    return None if length is None else Fraction(1, length)


def _start_alike(state: TrainingState, saves: bool, validates: bool) -> None:
    """Make sure that all ranks train the same, from the same tensors, and save and validate at the same steps."""
    stops = {"checkpoint": saves, "checkpoint_every": state.recipe.checkpoint_every, "validation": validates}
    require_agreement("arguments", {**state.arguments(), **stops, "scales": state.scales()})
    if not state.averages_itself:
        copy_from_first(state.inner)


def _first_step(state: TrainingState, layers: Mapping[str, GLoRALayer], graphs: str) -> AbstractContextManager[None]:
    """A block for the first step of this call; what it changes is compared if it is that of the run."""
    whole = graphs == "whole" or holds_shards(state.inner)  # within one graph, or in parts, nothing can be read
    compare, group = state.step == 0 and not whole, state.optimizer.param_groups[0]
    return first_step(layers, state.recipe.lr, lambda: float(group["lr"]), compare)


def _balance(
    state: TrainingState, dataset: Dataset | DataLoader, objective: Objective, join: Collate, target: float
) -> None:
    """Set the scales of the kinds that are trained by the first batch, of which rank 0 takes its share."""
    kinds = kinds_of([layer.path for layer in state.layers.values()] if state.space is None else state.space)

    def measured() -> dict[str, dict[Kind, float]]:
        batch = require_batch("dataset", next(batches(dataset, state.recipe, 0, 0, state.device, join)))
        return measure(state.inner, batch.to(state.device), objective, kinds)

    set_scales(state.inner, from_first(measured), target)


def _save(state: TrainingState, checkpoint: str | os.PathLike | None, log: str | os.PathLike | None) -> None:
    """Save all steps so far. The log goes first: every checkpoint has its log."""
    if log is not None:
        save_log(state, log)
    if checkpoint is not None:
        state.save(checkpoint)
