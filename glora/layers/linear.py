"""The drop-in for ``nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels import PreparedLinear, can_prepare, glora_linear, glora_merge
from glora_kernels.torch_private import held_parameters

from ..config import PathConfig
from .base import SUPPORT_NAMES, GLoRALayer
from .plain import qualified_name, require_plain, unfilled
from .quantised_formats import is_quantised

PARAMETER_NAMES = ("weight", "bias", *SUPPORT_NAMES)


class GLoRALinear(GLoRALayer):
    """A frozen linear layer with five support tensors (arXiv 2306.07967, Eq. 10).

    ``y = (W0 + W0 * A + B) x + W0 c + b0 * D + E + b0``, or ``W0 @ A`` for the matmul product.
    :attr:`path` says which kind each tensor is; it is set from outside, never inside forward. A
    freshly made layer computes what the linear layer does, whatever its path.

    Args:
        in_features, out_features, bias, device, dtype: as for :class:`torch.nn.Linear`.
        rank: the largest rank a path may ask for.
        product: ``"hadamard"`` (the paper, the official code, PEFT) or ``"matmul"`` (RepAdapter, LyCORIS).

    Parameters:
        weight (N, K), bias (N,): frozen.
        Ad (N, R) or, for the matmul product, (K, R); Au (R, K); Bd (N, R); Bu (R, K); Cd (K, R);
        Cu (R, 1); D (N,); E (N,): trainable, under the official names. They are fp32 if ``dtype`` is
        a half type, which would round small updates away (``.to(dtype)`` casts all).

    Raises:
        ValueError: a rank below 1, or an unknown product.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 8,
        product: str = "hadamard",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._wrap(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype), rank, product)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 8, product: str = "hadamard") -> GLoRALinear:
        """A layer around the very parameters of ``linear``, which are frozen; nothing is copied.

        Raises:
            TypeError: ``linear`` is not exactly an :class:`torch.nn.Linear`, since a subclass may compute something
                else; or its weight is quantised, for which there is :class:`GLoRAQuantisedLinear`.
        """
        if is_quantised(linear):
            raise TypeError(
                f"linear: expected a dense weight, got a quantised one ({qualified_name(type(linear.weight))}); "
                "use glora.inject or glora.GLoRAQuantisedLinear.from_linear"
            )
        require_plain("linear", linear, nn.Linear)
        return cls._around(linear, rank, product)

    @staticmethod
    def features(linear: nn.Linear) -> tuple[int, int]:
        """N and K of ``linear``."""
        return linear.out_features, linear.in_features

    def _wrap(self, linear: nn.Linear, rank: int, product: str) -> None:
        self._prepared: PreparedLinear | None = None
        self._take_over(linear, self.features(linear), rank, product)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., K) -> (..., N)``. Under ``torch.compile`` the path is data: one graph serves every path."""
        if torch.compiler.is_compiling():
            return super().forward(input)
        path = self._history.in_force_eagerly()
        y = None if self._prepared is None else self._prepared(input, held_parameters(self), path.choices)
        return self._forward_anew(input, path) if y is None else y

    def _forward_anew(self, x: Tensor, path: PathConfig) -> Tensor:
        """A call with all checks; prepares for further calls like it if that is possible."""
        y = glora_linear(x, self.weight, self.bias, self.terms(path))
        operands = held_parameters(self)
        plain = all(type(operand) is nn.Parameter for operand in operands.values() if operand is not None)
        if plain and tuple(operands) == PARAMETER_NAMES and can_prepare(x):
            weight, bias, *storages = operands.values()
            scales = self.scales.factors
            self._prepared = PreparedLinear(x, weight, bias, tuple(storages), self.product, scales)
        return y

    def _unprepare(self) -> None:
        self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles do not hold the prepared layer."""
        return {**super().__getstate__(), "_prepared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_prepared": None, **state})

    @torch.inference_mode(False)
    def merge(self, path: PathConfig | None = None, safe: bool = True) -> nn.Linear:
        """A plain linear layer, sharing nothing with this one, that computes what this one does.

        It is formed in fp32 (fp64 for fp64) and rounded once. It has a bias if this layer has one or if
        the path makes one (C or E). Its parameters are frozen, as the base's are.

        Raises:
            ValueError: with ``safe``, a NaN or infinity in the merged weight or bias.
        """
        weight, bias = glora_merge(self.weight, self.bias, self.terms(path), safe)
        return self._fill(unfilled(nn.Linear, self.in_features, self.out_features), weight, bias)
