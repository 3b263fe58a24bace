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
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from .arguments import require_integer, require_type
from .config import SearchSpace
from .distributed import require_trainable
from .formats.adapter_file import load_adapter, save_adapter
from .models.modules import require_layers
from .parameters import count_parameters, drop_unread_gradients, support_ids, trainable_parameters
from .paths import Paths, get_paths, sampler_for, set_paths, using_paths
from .sampling import PathSampler
from .training.batches import mix

ADAPTER = "adapter.safetensors"


class GLoRACallback(TrainerCallback):
    """Draws a path for every layer and optimiser step, for any ``transformers.Trainer`` and what derives from it.

    Path number t is a function of the seed and t alone: it is the path of step t of ``glora.train`` with that seed, and
    a run that is resumed goes on with the same paths. The steps of gradient accumulation share a path. The log has
    ``glora_parameters``, the mean number of support values that the paths since the last entry read. Every checkpoint
    folder gets ``adapter.safetensors`` (:func:`glora.save_adapter`). After training the paths are as before.

    Args:
        space: what paths are drawn from, uniformly; None keeps the paths that the layers have.
        seed: of the paths; None takes ``args.seed``.

    Raises:
        TypeError, ValueError: an argument of another type; when training begins, a space that does not fit the model,
            or a wrapper around the model that would train wrongly (``ddp_find_unused_parameters=False``).

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
        self._before: Paths = {}
        self._counts: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        require_trained(model)
        _require_unused_found(args, model, self.space is not None)
        self._before, self._counts = get_paths(model), []
        self._sampler = None if self.space is None else sampler_for(model, self.space)
        if self._sampler is not None:
            self._generator.manual_seed(mix(args.seed if self.seed is None else self.seed, -1))
            for _ in range(state.global_step):
                self._sampler.sample(self._generator)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._sampler is not None:
            set_paths(model, self._sampler.sample(self._generator))
        self._counts.append(count_parameters(model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        drop_unread_gradients(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._counts and logs is not None and "loss" in logs:
            for entry in (logs, *state.log_history[-1:]):
                entry["glora_parameters"] = sum(self._counts) / len(self._counts)
            self._counts = []

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.saves and state.is_world_process_zero:
            with self.paths_before(model):
                save_adapter(model, Path(args.output_dir, f"checkpoint-{state.global_step}", ADAPTER))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._before:
            set_paths(model, self._before)
        self._before, self._sampler = {}, None

    @contextmanager
    def paths_before(self, model: nn.Module) -> Iterator[None]:
        """A block in which the layers have the paths from before training, where it goes on."""
        if not self._before:
            yield
            return
        with using_paths(model, self._before):
            yield


class GLoRATrainer(Trainer):
    """``transformers.Trainer`` for a model with GLoRA: as :class:`GLoRACallback`, and its checkpoints hold no base.

    A checkpoint has the adapter (``adapter.safetensors``: support tensors, paths, heads, statistics of norms) in place
    of the whole model, and the state of optimiser, schedule and random numbers as ever. ``resume_from_checkpoint``,
    ``load_best_model_at_end`` and ``save_model`` work with it; ``glora.load_adapter(base, file)`` reads it anywhere.
    Evaluation runs under the paths that the layers had before training, so that its figures can be compared. Bases in 4
    or 8 bits of bitsandbytes are accepted where only adapters and heads train.

    Args:
        model: adapted by :func:`glora.inject`.
        space, path_seed: as of :class:`GLoRACallback`.
        args, kwargs: as of ``Trainer``.

    Raises:
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
        require_trained(model, space is not None)
        if args is not None and (args.fsdp or args.deepspeed):
            raise ValueError("args: expected neither fsdp nor deepspeed, which part the parameters of an adapter")
        with _shown_as_adapted(model):
            super().__init__(model, args, *others, **kwargs)
        callback.saves = False  # _save does
        self.glora = callback
        self.add_callback(callback)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.glora.paths_before(self.model):  # type: ignore[arg-type]
            return super().evaluation_loop(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As of ``Trainer``, but for the model itself."""
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with self.glora.paths_before(self.model):  # type: ignore[arg-type]
            save_adapter(self.model, folder / ADAPTER)  # type: ignore[arg-type]
        processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.model if model is None else model, Path(resume_from_checkpoint, ADAPTER))

    def _load_best_model(self) -> None:
        load_adapter(self.model, Path(self.state.best_model_checkpoint, ADAPTER))  # type: ignore[arg-type]


def require_trained(model: Any, random_paths: bool = False) -> None:
    """Raise ValueError unless ``model`` has adapted layers that train, and no wrapper would train them wrongly."""
    layers = require_layers(model)
    require_trainable(model, random_paths)
    read = {id(p) for p in trainable_parameters(model, None if random_paths else get_paths(model))}
    if not read & (support_ids(layers) if random_paths else read):
        raise ValueError(
            "model: expected paths that read a support tensor, or something else to train, got neither; call "
            "glora.set_paths(model, glora.PathConfig(B='lora_8')), say, or pass a space"
        )


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
