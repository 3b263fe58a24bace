"""The drop-in for ``nn.Conv2d``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glora_kernels import Terms, configured_conv2d, glora_conv2d, glora_merge, reference, takes_operator

from ..config import PathConfig
from .base import GLoRALayer
from .plain import require_plain, unfilled

_PROBE_IMAGES = 2


class GLoRAConv2d(GLoRALayer):
    """A frozen convolution with five support tensors (arXiv 2306.07967, Eq. 10, on the kernels as a matrix).

    The weight ``(N, I, kh, kw)`` is seen as ``(N, K)`` with ``K = I * kh * kw``; then ``W_eff = W0 + W0 * A + B``, or
    ``W0 + W0 @ A + B`` for the matmul product, and ``y = conv2d(x, W_eff) + b0 + b0 * D + E + W0 c`` as for
    :class:`GLoRALinear`. The prompt c has one entry for each weight of a kernel, so that ``W0 c`` is one number per
    output channel: the same at every position, also where the kernel hangs over a padded border. So a plain convolution
    can hold all of it exactly. With groups, I is the number of channels of a group, and the matmul A and c are the
    same for all groups. A freshly made layer computes what the convolution does, whatever its path.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as for :class:`torch.nn.Conv2d`.
        rank: the largest rank a path may ask for.
        product: ``"hadamard"`` or ``"matmul"``.

    Parameters:
        weight (N, I, kh, kw), bias (N,): frozen; the support tensors: see :class:`glora.GLoRALayer`.

    Raises:
        ValueError: a rank below 1, or an unknown product.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        rank: int = 8,
        product: str = "hadamard",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        conv = nn.Conv2d(*geometry, bias, padding_mode, device=device, dtype=dtype)  # type: ignore[arg-type]
        self._wrap(conv, rank, product)

    @classmethod
    def from_conv2d(cls, conv: nn.Conv2d, rank: int = 8, product: str = "hadamard") -> GLoRAConv2d:
        """A layer around the very parameters of ``conv``, which are frozen; nothing is copied.

        Raises:
            TypeError: ``conv`` is not exactly an :class:`torch.nn.Conv2d`: a subclass may compute something else; or it
                has hooks, pruning or weight norm.
        """
        require_plain("conv", conv, nn.Conv2d)
        return cls._around(conv, rank, product)

    @staticmethod
    def features(conv: nn.Conv2d) -> tuple[int, int]:
        """N and K of ``conv``."""
        return conv.out_channels, conv.weight[0].numel()

    def _wrap(self, conv: nn.Conv2d, rank: int, product: str) -> None:
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = _pair(conv.kernel_size), _pair(conv.stride)
        self.padding = conv.padding if isinstance(conv.padding, str) else _pair(conv.padding)
        self.dilation, self.groups, self.padding_mode = _pair(conv.dilation), conv.groups, conv.padding_mode
        self._border = _border(self.padding, self.kernel_size, self.dilation)
        self._take_over(conv, self.features(conv), rank, product)

    @property
    def matrix(self) -> Tensor:
        return self.weight.flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        """``(M, in_channels, height, width) -> (M, N, ...)``, or without M; compiled, one graph serves every path."""
        if takes_operator():
            x, padding = self._padded(input)
            storages = self.storages_times(self._factors)
            geometry = (self.stride, padding, self.dilation, self.groups)
            return configured_conv2d(x, self.weight, self.bias, storages, self._config, self.product, *geometry)
        return self.compute(input, self._terms_in_force())

    def compute(self, x: Tensor, terms: Terms) -> Tensor:
        x, padding = self._padded(x)
        return glora_conv2d(x, self.weight, self.bias, terms, self.stride, padding, self.dilation, self.groups)

    @torch.inference_mode(False)
    def merge(self, path: PathConfig | None = None, safe: bool = True) -> nn.Conv2d:
        """A plain convolution, sharing nothing with this one, that computes what this one does.

        It is formed in fp32 (fp64 for fp64) and rounded once. It has a bias if this layer has one or if the path makes
        one (C or E). Its parameters are frozen, as the base's are.

        Raises:
            ValueError: with ``safe``, a NaN or infinity in the merged weight or bias.
        """
        weight, bias = glora_merge(self.matrix, self.bias, self.terms(path), safe)
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        conv = unfilled(nn.Conv2d, *sizes, *geometry, True, self.padding_mode)
        kernels = torch.empty_like(self.weight)  # in the memory format of the base
        return self._fill(conv, kernels.copy_(weight.reshape(kernels.shape)), bias)

    def probe(self, generator: torch.Generator) -> Tensor:
        """Images for a few output positions, borders included."""
        sizes = [
            max(dilation * (kernel - 1) + 1, border + 1) + stride
            for kernel, stride, dilation, border in zip(
                self.kernel_size, self.stride, self.dilation, self._border[::-2]
            )
        ]
        return torch.randn(_PROBE_IMAGES, self.in_channels, *sizes, generator=generator).to(self.weight)

    def exact(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        terms = self.terms().map(lambda storage: storage.double())
        w_eff, b_eff = reference.glora_merge(self.matrix.double(), bias, terms)
        x, padding = self._padded(x.double())
        w_eff = w_eff.reshape(self.weight.shape)
        return F.conv2d(x, w_eff, b_eff, self.stride, padding, self.dilation, self.groups)

    def _padded(self, x: Tensor) -> tuple[Tensor, str | int | tuple[int, int]]:
        """x, padded already in the modes that the convolution itself does not have, and the padding left for it."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._border, mode=self.padding_mode), 0

    def _geometry(self) -> str:
        """As ``nn.Conv2d`` shows it."""
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        others = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        return ", ".join([text, *(f"{name}={value}" for name, value in others.items())])


def _border(padding: str | tuple[int, int], kernel: tuple[int, int], dilation: tuple[int, int]) -> list[int]:
    """What the padding adds on each side, as ``F.pad`` takes it: left, right, top, bottom."""
    sides = [(total, total) for total in padding] if not isinstance(padding, str) else [(0, 0)] * 2
    if padding == "same":  # the odd one of an even kernel comes last
        totals = [step * (size - 1) for step, size in zip(dilation, kernel)]
        sides = [(total // 2, total - total // 2) for total in totals]
    return [*sides[1], *sides[0]]


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width
