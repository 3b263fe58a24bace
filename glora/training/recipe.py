"""How to train, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

AMP = ("bfloat16", "float16")


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, with a linear warm-up and a cosine decay of the learning rate.

    Args:
        steps: optimiser steps.
        batch_size: samples per step.
        lr: peak learning rate.
        weight_decay: AdamW's, on every trained tensor.
        warmup: the share of the steps that the warm-up takes.
        warmup_lr: the learning rate that the warm-up starts at; None for ``lr / (1 + steps of warm-up)``.
        min_lr: the learning rate that the cosine ends at.
        label_smoothing: of the cross-entropy.
        clip_norm: scale gradients down to this norm over all trained tensors; None leaves them.
        amp: ``"bfloat16"`` or ``"float16"``: autocast of forward and loss, parameters as they are. float16 works on
            GPUs only and scales the loss. None computes in the parameters' own types.
        seed: of batches, paths, dropout and augmentation.
        checkpoint_every: steps between checkpoints.
        balance: measure the scales of kinds before the first step (:func:`glora.balance`, of which this is the
            ``target``); None leaves the scales as they are: 1, the paper, unless they were set. The first batch is read
            for it, once more than otherwise. Copies of the model from before (averages of weights) do not get them.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 500
    batch_size: int = 32
    lr: float = 1e-2
    weight_decay: float = 1e-4
    warmup: float = 0.02
    warmup_lr: float | None = None
    min_lr: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    amp: str | None = None
    seed: int = 0
    checkpoint_every: int = 100
    balance: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer from 1, got {getattr(self, name)!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        for name in ("lr", "weight_decay", "warmup", "min_lr", "label_smoothing"):
            _require_number(name, getattr(self, name))
        for name in ("clip_norm", "warmup_lr", "balance"):
            if getattr(self, name) is not None:
                _require_number(name, getattr(self, name))
        for name in ("clip_norm", "balance"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0 or None, got {getattr(self, name)}")
        if not self.lr > 0 or not self.weight_decay >= 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                "recipe: expected lr > 0, weight_decay >= 0 and 0 <= warmup < 1, got "
                f"lr={self.lr}, weight_decay={self.weight_decay}, warmup={self.warmup}"
            )
        for name, value in (("min_lr", self.min_lr), ("warmup_lr", self.warmup_lr)):
            if value is not None and not 0 <= value <= self.lr:
                raise ValueError(f"{name}: expected a number from 0 to lr={self.lr}, got {value}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number from 0 and below 1, got {self.label_smoothing}")
        if self.amp not in (None, *AMP):
            raise ValueError(f"amp: expected one of {AMP} or None, got {self.amp!r}")

    @classmethod
    def for_epochs(
        cls, epochs: float, samples: int, batch_size: int, *, warmup_epochs: float = 0, **others: Any
    ) -> Recipe:
        """A recipe of ``epochs`` passes over ``samples``, of which ``warmup_epochs`` warm up.

        Batches continue across the ends of epochs and none is cut short: ``epochs * samples / batch_size`` steps,
        rounded, at least one.

        Args:
            others: the remaining arguments of :class:`Recipe`.

        Raises:
            ValueError: a value out of range.
        """
        for name, value in (("epochs", epochs), ("samples", samples), ("batch_size", batch_size)):
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        if not isinstance(warmup_epochs, (int, float)) or not 0 <= warmup_epochs < epochs:
            raise ValueError(
                f"warmup_epochs: expected a number from 0 and below epochs={epochs}, got {warmup_epochs!r}"
            )
        steps = max(1, round(epochs * samples / batch_size))
        return cls(steps, batch_size, warmup=warmup_epochs / epochs, **others)


def _require_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name}: expected a number, got {value!r}")
