"""From the output of a model to a loss, an accuracy, and the sums that scores are made of: one rule everywhere."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import require_function, require_type, type_of
from .dataset import LABEL_NAMES, LABELS, Batch, label_key
from .layers.packages import is_a
from .models.modules import called, require_model
from .models.wrappers import named_modules

IGNORED = -100  # the target that cross-entropy leaves out, in PyTorch and Transformers
Outputs = Callable[[Any], Any] | str | None
Loss = Callable[[Any, Any], Tensor]


class Metrics(NamedTuple):
    """Of a data set: the mean loss, the accuracy (0 to 1; NaN if targets are no classes), and the number of samples.

    Both are means over the targets that count: samples, or tokens that are not ignored.
    """

    loss: float
    accuracy: float
    samples: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Totals(NamedTuple):
    """Loss and right answers added up over ``targets``, of ``samples``; those of parts of a data set can be added."""

    loss: float
    right: float
    samples: int
    targets: int

    def plus(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self, other)))  # type: ignore[arg-type]

    @property
    def means(self) -> Metrics:
        targets = max(self.targets, 1)
        return Metrics(self.loss / targets, self.right / targets, self.samples)


class Objective:
    """What a model is trained for and scored by.

    Args:
        model: whose arguments are looked at; it may be within wrappers.
        loss_fn: ``(output, target) -> scalar``, of the output as it is, or of what ``outputs`` says; losses of
            ``torch.nn`` get the logits. None: the loss that the model returns (``.loss``), where it was given labels by
            name; else the cross-entropy of its logits.
        outputs: what of the model's output counts, a function of it, or the name of an attribute or key. None: a tensor
            itself; ``logits`` of an object or a dictionary; of a tuple the first tensor that is no scalar.
        label_smoothing: of the cross-entropy, which then stands in place of the model's own loss.

    In a causal language model each logit is held against the next token. Whether named targets are to be moved so is
    told by the model's own loss: of the first batch, it is nearer to the cross-entropy of moved targets or of others.

    Raises:
        TypeError: a ``loss_fn`` or ``outputs`` of another type.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Loss | None = None, outputs: Outputs = None, label_smoothing: float = 0.0
    ):
        if loss_fn is not None:
            require_function("loss_fn", loss_fn, "a function of output and target, or None")
        if not callable(outputs):
            require_type(
                "outputs", outputs, (str, type(None)), "a function of the model's output, a name in it or None"
            )
        require_model(model)
        self.loss_fn, self.outputs, self.label_smoothing = loss_fn, outputs, label_smoothing
        self._is_entropy = loss_fn in (None, F.cross_entropy) or isinstance(loss_fn, nn.CrossEntropyLoss)
        self._ignored = getattr(loss_fn, "ignore_index", IGNORED)
        self._arguments = _named_arguments(_innermost(model))
        self._moved: bool | None = None  # whether targets are moved by one token; None: not known yet

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """The output of ``model``; raises TypeError as :meth:`arguments`."""
        return called(model, self.arguments(batch))

    def arguments(self, batch: Batch, name: str = "dataset") -> Tensor | dict[str, Any]:
        """What the model is given of a batch: labels only if it takes them, and the loss is its own or an entropy.

        Args:
            name: of the argument that the batch came from, for the error.

        Raises:
            TypeError: the batch has inputs that ``forward`` does not take.
        """
        if isinstance(batch.inputs, Tensor):
            return batch.inputs
        inputs, key = dict(batch.inputs), label_key(batch.inputs)
        if key is not None:
            labels = inputs.pop(key)
            taken = LABELS if self._takes(LABELS) else key
            if self._is_entropy and self._takes(taken):
                inputs[taken] = labels
        if self._arguments is not None and (unknown := sorted(inputs.keys() - self._arguments)):
            raise TypeError(
                f"{name}: expected the arguments of the model's forward, {sorted(self._arguments)}, got {unknown} too; "
                f"remove them (datasets: dataset.remove_columns({unknown}))"
            )
        return inputs

    def loss(self, output: Any, target: Tensor | None, named: bool = False) -> Tensor:
        """The loss of a batch, ``()``.

        Args:
            named: whether the target came with named inputs, as in :class:`Batch`.

        Raises:
            TypeError: an output without logits, no target, or a ``loss_fn`` that does not return a scalar tensor.
            ValueError: targets that do not fit the logits.
        """
        own = self._own_loss(output, target, named)
        if own is not None:
            return own
        if self.loss_fn is None or self._is_entropy:
            return self._cross_entropy(output, target, named, "mean")
        logits = isinstance(self.loss_fn, nn.Module) and type(self.loss_fn).__module__.startswith("torch.nn.")
        counted = self.logits(output) if logits else output if self.outputs is None else self._counted(output)
        loss = self.loss_fn(counted, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type_of(loss)
            raise TypeError(f"loss_fn: expected it to return a scalar tensor, got {got}")
        return loss

    def accuracy(self, output: Any, target: Tensor | None, named: bool = False) -> Tensor | None:
        """The share of targets that the logits choose, on their device; None if targets are no classes."""
        found = self.answers(output, target, named)
        return None if found is None else found[0] / found[1]

    def totals(self, output: Any, batch: Batch) -> Totals:
        """Sums for a score. The loss of a batch, if it is given as a mean, counts once for each target.

        Raises:
            TypeError, ValueError: as :meth:`loss`.
        """
        found = self.answers(output, batch.target, batch.named)
        right, targets = (math.nan, batch.size) if found is None else map(int, found)
        summed = self.loss_fn in (None, F.cross_entropy)
        if summed and self._own_loss(output, batch.target, batch.named) is None:
            loss = float(self._cross_entropy(output, batch.target, batch.named, "sum"))
        else:  # the mean over nothing is no number
            loss = float(self.loss(output, batch.target, batch.named)) * targets if targets else 0.0
        return Totals(loss, right, batch.size, targets)

    def logits(self, output: Any) -> Tensor:
        """The logits in a model's output. Raises TypeError if there are none."""
        return _logits(self._counted(output), output)

    def _counted(self, output: Any) -> Any:
        if callable(self.outputs):
            return self.outputs(output)
        if isinstance(self.outputs, str):
            found = _part(output, self.outputs)
            if found is None:
                raise TypeError(
                    f"outputs: expected the name of a part of the model's output, {_described(output)}, got "
                    f"{self.outputs!r}"
                )
            return found
        return logits_of(output)

    def _takes(self, name: str) -> bool:
        return self._arguments is None or name in self._arguments

    def _own_loss(self, output: Any, target: Tensor | None, named: bool) -> Tensor | None:
        """The loss that the model returned, if that is what it is trained for."""
        if self.loss_fn is not None or self.label_smoothing or not named:
            return None
        # without such targets, it has got others by names of its own
        given = target is None or any(self._takes(name) for name in LABEL_NAMES)
        return own_loss(output) if given else None

    def _cross_entropy(self, output: Any, target: Tensor | None, named: bool, reduction: str) -> Tensor:
        logits = self.logits(output)
        if not isinstance(target, Tensor):
            raise TypeError(
                f"dataset: expected targets, under {LABELS!r} in samples that are dictionaries, got none; name them so,"
                " or use a model that returns its own loss; for a causal language model "
                "collate=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False) adds them"
            )
        options: dict[str, Any] = {"reduction": reduction}
        if reduction == "sum":
            logits = logits.float()
        else:
            options["label_smoothing"] = self.label_smoothing
        if not target.is_floating_point():
            target = target.long()
        axis = _class_axis(logits, target, named)
        if axis is not None and logits.dim() > 2:
            if self._is_moved(output, logits, target, named, axis):
                logits, target = logits[:, :-1], target[:, 1:]
            logits, target = logits.movedim(axis, -1).flatten(0, -2), target.flatten()
        try:
            if isinstance(self.loss_fn, nn.CrossEntropyLoss):
                return self.loss_fn(logits, target)
            return F.cross_entropy(logits, target, **options)
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"dataset: expected targets of the cross-entropy of logits {tuple(logits.shape)}, classes or "
                f"probabilities, got {target.dtype} {tuple(target.shape)} ({error}); loss_fn= takes another loss"
            ) from None

    @torch.no_grad()
    def answers(self, output: Any, target: Tensor | None, named: bool = False) -> tuple[Tensor, Tensor] | None:
        """How many targets the logits choose, and how many count, on their device; None if targets are no classes."""
        if not isinstance(target, Tensor) or target.is_floating_point():
            return None
        try:
            logits = self.logits(output)
        except TypeError:  # a loss of one's own may need no logits
            return None
        axis = _class_axis(logits, target, named)
        if axis is None or logits.shape[axis] == 1:
            return None
        chosen = logits.argmax(axis)
        if self._is_moved(output, logits, target, named, axis):
            chosen, target = chosen[:, :-1], target[:, 1:]
        return (chosen == target).sum(), (target != self._ignored).sum()

    @torch.no_grad()
    def _is_moved(self, output: Any, logits: Tensor, target: Tensor, named: bool, axis: int) -> bool:
        """Whether logits are held against the targets one token later, as the model's own loss says."""
        own = own_loss(output) if named and axis == -1 and logits.dim() == 3 else None
        if own is None:
            return False
        if self._moved is None:
            aligned = F.cross_entropy(logits.float().flatten(0, -2), target.long().flatten())
            moved = F.cross_entropy(logits[:, :-1].float().flatten(0, -2), target[:, 1:].long().flatten())
            distances = (own - aligned).abs(), (own - moved).abs()
            if any(bool(distance.isnan()) for distance in distances):
                return bool(distances[0].isnan())  # a batch in which too little counts decides nothing
            self._moved = bool(distances[1] < distances[0])
        return self._moved


def own_loss(output: Any) -> Tensor | None:
    """The loss that a model returned: ``loss`` of an object or a dictionary, or a scalar at the head of a tuple."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, (tuple, list)) and not hasattr(output, "loss"):
        found = output[0] if len(output) > 1 else None
    else:
        found = _part(output, "loss")
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output; the rule of :class:`Objective`. Raises TypeError if there are none."""
    if isinstance(output, Tensor):
        return output
    found = _part(output, "logits")
    if found is None and isinstance(output, (tuple, list)):
        found = next((part for part in output if isinstance(part, Tensor) and part.dim()), None)
    return _logits(found, output)


def _logits(found: Any, output: Any) -> Tensor:
    if not isinstance(found, Tensor):
        got = _described(output if found is None else found)
        raise TypeError(
            f"model: expected it to return a tensor of logits, or an object, dictionary or tuple with such logits, got "
            f"{got}; say where they are by outputs=, a function of the output or the name of a part"
        )
    return found


def _part(output: Any, name: str) -> Any:
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return None if callable(found) and not isinstance(found, Tensor) else found


def _described(output: Any) -> str:
    return f"{type_of(output)} with {list(output)}" if isinstance(output, Mapping) else type_of(output)


def _innermost(model: nn.Module) -> Any:
    """The model within wrappers, and within PEFT's."""
    inner: Any = next(named_modules(model))[1]
    return inner.get_base_model() if is_a(inner, "peft.peft_model", "PeftModel") else inner


def _named_arguments(model: Any) -> frozenset[str] | None:
    """The names that ``forward`` takes; None if it takes any, or does not say."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _class_axis(logits: Tensor, target: Tensor, named: bool) -> int | None:
    """Where the classes are: 1 in ``(N, C)`` and ``(N, C, H, W)``, -1 in ``(N, T, C)``; None: targets are no classes.

    Where both fit, named targets are those of tokens, and others as ``torch.nn.functional.cross_entropy`` has them.
    """
    if target.is_floating_point() or logits.dim() < 2:
        return None
    pixels = (logits.shape[0], *logits.shape[2:]) == tuple(target.shape)
    tokens = logits.dim() > 2 and logits.shape[:-1] == target.shape
    if pixels and not (named and tokens):
        return 1
    return -1 if tokens else None
