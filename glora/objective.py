"""From the output of a model to a loss, an accuracy, and the sums that scores are made of: one rule everywhere."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import require_function, require_type, type_of
from .dataset import LABELS, Batch
from .layers.packages import loaded
from .models.modules import called, require_model
from .models.wrappers import named_modules

IGNORED = -100  # the target that cross-entropy leaves out, in PyTorch and Transformers
Outputs = Callable[[Any], Any] | str | None
Loss = Callable[[Any, Any], Tensor]
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # ends of class names of Transformers
_CAUSAL_UNLESS_ENCODED = "ForConditionalGeneration"  # images and texts to text; not encoder and decoder


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
        model: whose arguments and kind are looked at; it may be within wrappers.
        loss_fn: ``(output, target) -> scalar``, of the output as it is, or of what ``outputs`` says. None: the
            loss that the model returns (``.loss``), if it does; else the cross-entropy of its logits. The targets of a
            causal language model of Transformers are then moved by one token, as its own loss does.
        outputs: what of the model's output counts, a function of it, or the name of an attribute or key. None: a tensor
            itself; ``logits`` of an object or a dictionary; of a tuple the first tensor that is no scalar.
        label_smoothing: of the cross-entropy, which then stands in place of the model's own loss.

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
                "outputs", outputs, (str, type(None)), "a function of the model's output, a name in it, or None"
            )
        require_model(model)
        self.loss_fn, self.outputs, self.label_smoothing = loss_fn, outputs, label_smoothing
        inner: Any = next(named_modules(model))[1]
        self._arguments = _named_arguments(inner)
        self._is_causal = _is_causal(inner)

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """The output of ``model``; raises TypeError as :meth:`arguments`."""
        return called(model, self.arguments(batch))

    def arguments(self, batch: Batch) -> Tensor | dict[str, Any]:
        """What the model is given of a batch. Labels are among them only if it takes them and its own loss counts.

        Raises:
            TypeError: the batch has inputs that ``forward`` does not take.
        """
        if isinstance(batch.inputs, Tensor):
            return batch.inputs
        inputs = dict(batch.inputs)
        if self.loss_fn is not None or (self._arguments is not None and LABELS not in self._arguments):
            inputs.pop(LABELS, None)
        if self._arguments is not None and (unknown := sorted(inputs.keys() - self._arguments)):
            raise TypeError(
                f"dataset: expected the arguments of the model's forward, {sorted(self._arguments)}, got {unknown} "
                f"too; remove them (datasets: dataset.remove_columns({unknown}))"
            )
        return inputs

    def loss(self, output: Any, target: Tensor | None, named: bool = False) -> Tensor:
        """The loss of a batch, ``()``.

        Args:
            named: whether the target came with named inputs, as in :class:`Batch`.

        Raises:
            TypeError: an output without logits, no target, or a ``loss_fn`` that does not return a scalar tensor.
        """
        own = None if self.label_smoothing or self.loss_fn is not None else own_loss(output)
        if own is not None:
            return own
        if self.loss_fn is None or self.loss_fn is F.cross_entropy:
            return self._cross_entropy(self.logits(output), target, named, "mean")
        loss = self.loss_fn(output if self.outputs is None else self._counted(output), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type_of(loss)
            raise TypeError(f"loss_fn: expected it to return a scalar tensor, got {got}")
        return loss

    def accuracy(self, output: Any, target: Tensor | None, named: bool = False) -> Tensor | None:
        """The share of targets that the logits choose, on their device; None if targets are no classes."""
        found = self._answers(output, target, named)
        return None if found is None else found[0].sum() / found[1].sum()

    def totals(self, output: Any, batch: Batch) -> Totals:
        """Sums for a score. A loss that is a mean counts once for each target, or for each sample without classes.

        Raises:
            TypeError: as :meth:`loss`.
        """
        found = self._answers(output, batch.target, batch.named)
        right, targets = math.nan, batch.size
        if found is not None:
            right, targets = (int(each.sum()) for each in found)
        if self.loss_fn in (None, F.cross_entropy) and (self.loss_fn is not None or own_loss(output) is None):
            logits = self.logits(output).float()
            loss = float(self._cross_entropy(logits, batch.target, batch.named, "sum"))
        else:
            # the mean over nothing is no number
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

    def _cross_entropy(self, logits: Tensor, target: Tensor | None, named: bool, reduction: str) -> Tensor:
        if not isinstance(target, Tensor):
            raise TypeError(
                f"dataset: expected targets, under {LABELS!r} in samples that are dictionaries, got none; name them so,"
                " or use a model that returns its own loss"
            )
        flat = self._flat(logits, target, named)
        smoothing = self.label_smoothing if reduction == "mean" else 0.0
        return F.cross_entropy(*(flat or (logits, target)), reduction=reduction, label_smoothing=smoothing)

    def _answers(self, output: Any, target: Tensor | None, named: bool) -> tuple[Tensor, Tensor] | None:
        """Which targets the logits choose, and which of them count; None if targets are no classes."""
        if not isinstance(target, Tensor) or target.is_floating_point():
            return None
        try:
            flat = self._flat(self.logits(output), target, named)
        except TypeError:  # a loss of one's own may need no logits
            return None
        if flat is None:
            return None
        logits, target = flat
        return logits.argmax(-1) == target, target != IGNORED

    def _flat(self, logits: Tensor, target: Tensor, named: bool) -> tuple[Tensor, Tensor] | None:
        """Logits ``(M, C)`` and classes ``(M,)`` of samples, tokens ``(..., C)`` or pixels ``(N, C, ...)``; or None."""
        if target.is_floating_point() or logits.dim() < 2:
            return None
        if self._is_causal and named and logits.shape[:-1] == target.shape:
            logits, target = logits[..., :-1, :], target[..., 1:]
        if logits.dim() == 2 and target.dim() == 1:
            return logits, target
        if logits.shape[:-1] == target.shape:
            return logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
        if (logits.shape[0], *logits.shape[2:]) == tuple(target.shape):
            return logits.movedim(1, -1).reshape(-1, logits.shape[1]), target.reshape(-1)
        return None


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


def _named_arguments(model: nn.Module) -> frozenset[str] | None:
    """The names that ``forward`` takes; None if it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _is_causal(model: Any) -> bool:
    """Whether it is a language model of Transformers whose labels are its inputs."""
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    if pretrained is None or not isinstance(model, pretrained):
        return False
    name = type(model).__name__
    return name.endswith(_CAUSAL) or (name.endswith(_CAUSAL_UNLESS_ENCODED) and not model.config.is_encoder_decoder)
