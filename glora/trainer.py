"""GLoRA in ``transformers.Trainer``: a path per step, small checkpoints, exact resumption, 4-bit bases.

>>> from glora.trainer import GLoRATrainer
>>> model = glora.inject(AutoModelForCausalLM.from_pretrained(name), 8, targets=("q_proj", "v_proj"), heads=())
>>> space = glora.SearchSpace(ranks=(8, 4), bias_free=True)
>>> trainer = GLoRATrainer(model, TrainingArguments("out"), train_dataset=data, space=space)
>>> trainer.train(resume_from_checkpoint=True)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer import TRAINING_ARGS_NAME
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    message = "glora.trainer: expected the package transformers, found none: pip install 'glora[peft]'"
    raise ModuleNotFoundError(message, name="transformers") from None

from .arguments import require_integer, require_type
from .config import SearchSpace
from .distributed import require_trainable
from .formats.adapter_file import ADAPTER, load_adapter, save_adapter
from .layers.base import GLoRALayer
from .models.modules import require_layers
from .parameters import count_parameters, drop_unread_gradients, require_something_read, trainable_parameters
from .paths import Paths, get_paths, sampler_for, set_layer_paths, using_paths
from .random_numbers import mix
from .sampling import PathSampler


class GLoRACallback(TrainerCallback):
    """Draws a path for every layer and optimiser step, for any ``transformers.Trainer`` and what derives from it.

    Path number t is a function of the seed and t alone: it is the path of step t of ``glora.train`` with that seed, and
    a run that is resumed goes on with the same paths. The steps of gradient accumulation share a path. At the end of a
    step the layers have the paths from before training again: evaluation, checkpoints and the model after training are
    of these. Every checkpoint folder gets ``adapter.safetensors`` (:func:`glora.save_adapter`).

    ``trainer.state.log_history`` has ``glora_parameters`` beside each loss: the mean number of support values that the
    paths since the last entry read. Callbacks that come before this one, as TensorBoard's and W&B's do, get their logs
    without it; of :class:`GLoRATrainer` all get it.

    An exception within a step leaves the path of that step. The next ``train`` of the trainer begins under the paths
    from before, unless others were set since; :class:`GLoRATrainer` sets them at once.

    Args:
        space: what paths are drawn from, evenly or by its shares; None keeps the paths that the layers have.
        seed: of the paths; None takes ``args.seed``.

    Raises:
        TypeError, ValueError: an argument of another type; when training begins, a model that would not train, a space
            that does not fit it, or arguments under which DistributedDataParallel would not average the gradients of
            all that a path reads (``ddp_find_unused_parameters=False``).

    Example:
        >>> trainer = SFTTrainer(model, args, train_dataset=data, callbacks=[GLoRACallback(glora.SearchSpace((8,)))])
    """

    def __init__(self, space: SearchSpace | None = None, seed: int | None = None):
        require_type("space", space, (SearchSpace, type(None)), "a glora.SearchSpace or None")
        if seed is not None:
            require_integer("seed", seed, 0)
        self.space, self.seed = space, seed
        self.saves = True
        self._sampler: PathSampler | None = None
        self._generator = torch.Generator()
        self._layers: dict[str, GLoRALayer] = {}
        self.before: Paths = {}  # from before training, where it goes on
        self._drawn: Paths = {}  # of the step that goes on
        self._counts: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._drawn == {name: layer.path for name, layer in self._layers.items()}:  # an exception ended that step
            self._end_step()
        require_trained(model, self.space is not None)
        _require_unused_found(args, model, self.space is not None)
        self._layers, self.before, self._drawn, self._counts = require_layers(model), get_paths(model), {}, []
        self._sampler = None if self.space is None else sampler_for(model, self.space, training=True)
        if self._sampler is not None:
            self._generator.manual_seed(mix(args.seed if self.seed is None else self.seed, -1))
            for _ in range(state.global_step):
                self._sampler.sample(self._generator)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._sampler is None:
            self._counts.append(count_parameters(model))
            return
        self._drawn = self._sampler.sample(self._generator)
        set_layer_paths(self._layers, self._drawn)
        self._counts.append(self._sampler.count(self._drawn))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        drop_unread_gradients(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and self.add_size(logs):
            for entry in state.log_history[-1:]:
                entry["glora_parameters"] = logs["glora_parameters"]

    def add_size(self, logs: dict[str, float]) -> bool:
        """Put ``glora_parameters`` into logs with a loss; whether there were steps since the last such logs."""
        adds = bool(self._counts) and "loss" in logs
        if adds:
            logs["glora_parameters"] = sum(self._counts) / len(self._counts)
            self._counts = []
        return adds

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.saves and state.is_world_process_zero:
            save_adapter(model, Path(args.output_dir, f"checkpoint-{state.global_step}", ADAPTER))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.end()

    def end(self) -> None:
        """Set the paths from before training again, and forget the model."""
        set_layer_paths(self._layers, self.before)
        self._layers, self.before, self._drawn, self._sampler = {}, {}, {}, None

    def _end_step(self) -> None:
        """Set the paths from before training again, if the step has drawn its own."""
        if self._drawn:
            set_layer_paths(self._layers, self.before)
        self._drawn = {}


class GLoRATrainer(Trainer):
    """``transformers.Trainer`` for a model with GLoRA: as :class:`GLoRACallback`, and its checkpoints hold no base.

    A checkpoint has the adapter (``adapter.safetensors``: support tensors, paths, heads, statistics of norms) in place
    of the whole model, and the state of optimiser, schedule and random numbers as ever. ``resume_from_checkpoint``,
    ``load_best_model_at_end`` and ``save_model`` work with it; ``glora.load_adapter(base, file)`` reads it anywhere.
    Evaluation runs under the paths that the layers had before training, so that its figures can be compared; they have
    these after training too, also where an exception ended it. ``glora_parameters`` is in the logs of every callback.
    Bases in 4 or 8 bits of bitsandbytes are accepted where only adapters and heads train.

    Args:
        model: adapted by :func:`glora.inject`; None with ``model_init``, whose models are checked when training begins.
        space, path_seed: as of :class:`GLoRACallback`.
        args, kwargs: as of ``Trainer``.

    Raises:
        TypeError: ``args`` are no ``TrainingArguments``.
        ValueError: no adapted layer; nothing that the paths read and that trains; DeepSpeed or FSDP, whose parts of
            parameters an adapter file cannot hold.

    Example:
        >>> trainer = GLoRATrainer(model, args, train_dataset=data, data_collator=collator, space=space)
        >>> trainer.train()
        >>> best = glora.search(model, space, validation, metric="perplexity", collate=collator, limit=500_000).best
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *others: Any,
        space: SearchSpace | None = None,
        path_seed: int | None = None,
        **kwargs: Any,
    ):
        callback = GLoRACallback(space, path_seed)
        require_type("args", args, (TrainingArguments, type(None)), "transformers.TrainingArguments or None")
        if model is not None:
            require_trained(model, space is not None)
        if args is not None and (args.fsdp or args.deepspeed):
            raise ValueError("args: expected neither fsdp nor deepspeed, which part the parameters of an adapter")
        with _shown_as_adapted(model):
            super().__init__(model, args, *others, **kwargs)
        callback.saves = False  # _save does
        self.glora = callback
        self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of ``Trainer``; the paths are as before it, also after an exception."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.glora.end()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As of ``Trainer``, with ``glora_parameters`` beside a loss."""
        self.glora.add_size(logs)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As of ``Trainer``, but for the model itself."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        with using_paths(model, self.glora.before or get_paths(model)):  # a callback may save within a step
            save_adapter(model, folder / ADAPTER)
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model if model is None else model, Path(resume_from_checkpoint, ADAPTER))

    def _load_best_model(self) -> None:
        load_adapter(self.model, Path(self.state.best_model_checkpoint, ADAPTER))  # type: ignore[arg-type]


def require_trained(model: Any, random_paths: bool = False) -> None:
    """Raise ValueError unless ``model`` has adapted layers and something that trains.

    Args:
        random_paths: whether paths are drawn, for which support tensors have to train; else what the paths read, or
            something beside them.
    """
    layers = require_layers(model)
    require_trainable(model, random_paths)
    if not random_paths:
        require_something_read(model, "pass a space")
    elif not any(p.requires_grad for layer in layers.values() for p in layer.support_parameters()):
        raise ValueError("model: expected support tensors that require grad, to draw paths for; got only frozen ones")


def _require_unused_found(args: Any, model: nn.Module, random_paths: bool) -> None:
    """Raise ValueError where ``Trainer`` wraps the model so that what a path leaves out would not be averaged."""
    unread = random_paths or len(trainable_parameters(model, get_paths(model))) < len(trainable_parameters(model))
    found = args.ddp_find_unused_parameters
    if args.world_size > 1 and unread and not (not args.gradient_checkpointing if found is None else found):
        raise ValueError(
            "args.ddp_find_unused_parameters: expected True where several processes train paths that leave tensors "
            f"out, got {found} with gradient_checkpointing={args.gradient_checkpointing}"
        )


@contextmanager
def _shown_as_adapted(model: Any) -> Iterator[None]:
    """A block in which ``Trainer`` sees that adapters train on a quantised base, by the mark that PEFT's leave there.

    The mark is taken back: ``save_pretrained`` would look for PEFT's adapters. The quantised weights must be frozen.
    """
    marks = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    if marks:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if marks:
            model._hf_peft_config_loaded = False
