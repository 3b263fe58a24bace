"""The drop-in for ``transformers.pytorch_utils.Conv1D``: GPT-2's linear layer, which holds its weight transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels import glora_merge

from ..config import PathConfig
from .base import GLoRALayer
from .plain import require_plain, unfilled


class GLoRAConv1D(GLoRALayer):
    """:class:`GLoRALinear` for Hugging Face's ``Conv1D``, whose weight is ``(K, N)``.

    ``y = (W0 + W0 * A + B) x + W0 c + b0 * D + E + b0`` with ``W0 = weight^T``, read in place through its strides: the
    paths, support tensors and counts are those of the linear layer of the same size.

    Args:
        nf, nx: N and K, as for ``Conv1D``.
        rank: the largest rank a path may ask for.
        product: ``"hadamard"`` or ``"matmul"``.
        device, dtype: of the parameters.

    Parameters:
        weight (K, N), bias (N,): frozen; the support tensors: see :class:`glora.GLoRALayer`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a rank below 1, or an unknown product.
    """

    def __init__(
        self,
        nf: int,
        nx: int,
        *,
        rank: int = 8,
        product: str = "hadamard",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self._wrap(Conv1D(nf, nx).to(device=device, dtype=dtype), rank, product)

    @classmethod
    def from_conv1d(cls, conv: Any, rank: int = 8, product: str = "hadamard") -> GLoRAConv1D:
        """A layer around the very parameters of ``conv``, which are frozen; nothing is copied.

        Raises:
            TypeError: ``conv`` is not exactly a ``transformers.pytorch_utils.Conv1D``, or it has hooks, pruning or
                weight norm.
        """
        from transformers.pytorch_utils import Conv1D

        require_plain("conv", conv, Conv1D)
        return cls._around(conv, rank, product)

    @staticmethod
    def features(conv: Any) -> tuple[int, int]:
        """N and K of ``conv``."""
        return conv.nf, conv.nx

    def _wrap(self, conv: Any, rank: int, product: str) -> None:
        self.nf, self.nx = conv.nf, conv.nx
        self._take_over(conv, self.features(conv), rank, product)

    @property
    def matrix(self) -> Tensor:
        return self.weight.t()

    @torch.inference_mode(False)
    def merge(self, path: PathConfig | None = None, safe: bool = True) -> nn.Module:
        """A plain ``Conv1D``, sharing nothing with this one, that computes what this one does.

        Its weight is formed in fp32 (fp64 for fp64) and rounded once: the very bits this layer multiplies by,
        transposed. It may sum products in another order. Its parameters are frozen, as the base's are.

        Raises:
            ValueError: with ``safe``, a NaN or infinity in the merged weight or bias.
        """
        from transformers.pytorch_utils import Conv1D

        weight, bias = glora_merge(self.matrix, self.bias, self.terms(path), safe)
        return self._fill(unfilled(Conv1D, self.nf, self.nx), weight.t().contiguous(), bias)
