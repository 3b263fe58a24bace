"""Linear layers whose frozen weight stays quantised in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels import Terms, blocked_linear, glora_merge, terms_of_rows

from ..config import PathConfig
from .base import PROBE_TOKENS
from .linear import GLoRALinear
from .packages import loaded
from .plain import qualified_name, require_plain
from .quantised_formats import Format, format_of, is_quantised, layer_types, scales_of, settings_of

# Elements of W0 that are decoded at a time: 16 MiB in fp32.
BLOCK_ELEMENTS = 2**22


class GLoRAQuantisedLinear(GLoRALinear):
    """:class:`GLoRALinear` on a weight that stays quantised in memory (arXiv 2306.07967, Eq. 10).

    ``y = (W0 + W0 * A + B) x + W0 c + b0 * D + E + b0``, or ``W0 @ A``, where W0 is what the quantised weight stands
    for. It is decoded by blocks of rows at every call, in forward and again in backward; no dense W0 or W_eff is kept.
    Products are formed in the dtype of x (for a ``Linear4bit``, in its ``compute_dtype``). Activations are not
    quantised: a layer whose own kernel quantises them (``Linear8bitLt``) gives slightly other outputs once adapted.

    Made by ``from_linear`` and by :func:`glora.inject` from a ``Linear4bit`` (NF4 or FP4) or ``Linear8bitLt`` of
    bitsandbytes, or an ``nn.Linear`` whose weight is an ``Int8Tensor`` of torchao.

    Parameters:
        weight: quantised, frozen; bias (N,): frozen; the support tensors: see :class:`glora.GLoRALayer`.
    """

    merges_exactly = False
    SCB: Tensor | None

    def __init__(self, *_: Any, **__: Any):
        raise TypeError("GLoRAQuantisedLinear: expected to be made from a layer, by from_linear or glora.inject")

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 8, product: str = "hadamard") -> GLoRAQuantisedLinear:
        """A layer around the very parameters of ``linear``, which are frozen; nothing is copied or decoded.

        Raises:
            TypeError: not one of the types above, one with hooks, pruning or weight norm, or a weight that is not
                quantised yet or in a format that cannot be read by rows.
        """
        if not is_quantised(linear):
            names = ", ".join(qualified_name(kind) for kind in layer_types()) or "a quantised layer of bitsandbytes"
            got = qualified_name(type(linear))
            raise TypeError(f"linear: expected {names} or an nn.Linear with a weight of torchao's, got {got}")
        require_plain("linear", linear, type(linear))
        format_of(type(linear), linear.weight, scales_of(linear))
        return cls._around(linear, rank, product)

    def _wrap(self, linear: nn.Linear, rank: int, product: str) -> None:
        self._settings = settings_of(linear)
        self._take_over(linear, self.features(linear), rank, product)
        self.register_buffer("SCB", scales_of(linear))  # under the name that bitsandbytes gives it

    @property
    def format(self) -> Format:
        """How the current weight is read; moving to another device makes another weight."""
        return format_of(self.plain_type, self.weight, self.SCB)

    @property
    def matrix(self) -> Tensor:
        """W0 decoded as a whole, ``(N, K)``: a new tensor, for inspection."""
        blocks = _Blocks(self)
        return torch.cat([blocks.rows(*bounds) for bounds in blocks.bounds])

    def forward(self, input: Tensor) -> Tensor:
        """``(..., K) -> (..., N)``."""
        return self.compute(input, self._terms_in_force())

    def compute(self, x: Tensor, terms: Terms) -> Tensor:
        dtype = self._settings.get("compute_dtype")
        tokens = x if dtype is None else x.to(dtype)
        bias = None if self.bias is None else self.bias.to(tokens.dtype)
        y = blocked_linear(tokens, _Blocks(self), bias, terms)
        return y if dtype is None else y.to(x.dtype)

    @torch.inference_mode(False)
    def merge(self, path: PathConfig | None = None, safe: bool = True, requantise: bool = False) -> nn.Linear:
        """A plain quantised layer of the type and settings of the one that was adapted, sharing nothing with this one.

        W_eff is formed in fp32 from the decoded W0 and quantised again. Unlike other merges, this rounds as coarsely as
        the format: see :meth:`requantisation_error`.

        Raises:
            ValueError: without ``requantise``; with ``safe``, a NaN or infinity in the merged weight or bias; a weight
                beyond the range that the format is quantised from.
        """
        if not requantise:
            raise ValueError(
                "requantise: expected True, since merging into a quantised weight rounds it anew; got False. The layer "
                "can stay as it is, unmerged"
            )
        parts = [self._merged_rows(*bounds, path, safe) for bounds in _Blocks(self).bounds]
        biases = [bias for _, bias in parts if bias is not None]
        plain = self.plain_type(
            self.in_features, self.out_features, bool(biases), device="meta", **self._settings
        )  # on meta: nothing is allocated or drawn at random
        assert isinstance(plain, nn.Linear)
        self.format.encode(plain, torch.cat([weight for weight, _ in parts]))
        if biases:
            dtype = self.format.dtype if self.bias is None else self.bias.dtype
            plain.bias = nn.Parameter(torch.cat(biases).to(dtype), requires_grad=False)
        return plain.train(self.training)

    def requantisation_error(self, plain: nn.Linear) -> float:
        """The largest absolute difference between W_eff and the decoded weight of ``plain``, merged from this layer."""
        merged = _Blocks(GLoRAQuantisedLinear.from_linear(plain, 1))
        exact = ((bounds, self._merged_rows(*bounds, None, False)[0]) for bounds in merged.bounds)
        return max(float((merged.rows(*bounds).double() - rows).abs().max()) for bounds, rows in exact)

    def _merged_rows(self, start: int, stop: int, path: PathConfig | None, safe: bool) -> tuple[Tensor, Tensor | None]:
        """W_eff and b_eff of these rows, in fp32."""
        bias = None if self.bias is None else self.bias[start:stop].float()
        terms = terms_of_rows(self.terms(path), start, stop)
        return glora_merge(self.format.rows(start, stop).float(), bias, terms, safe)

    def stands_merged(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or type(module) is not self.plain_type or not is_quantised(module):
            return False
        return self.features(module) == (self.out_features, self.in_features)

    def outputs_merged(self, plain: nn.Module, x: Tensor) -> Tensor:
        """The output of the decoded ``plain``: its own kernel may also quantise x, or repack the weight."""
        assert isinstance(plain, nn.Linear)
        return GLoRAQuantisedLinear.from_linear(plain, 1).forward(x)

    def probe(self, generator: torch.Generator) -> Tensor:
        x = torch.randn(PROBE_TOKENS, self.in_features, generator=generator)
        return x.to(device=self.weight.device, dtype=self._settings.get("compute_dtype") or self.format.dtype)

    def _apply(self, fn, recurse=True):
        """Move and cast the layer, but do not cast the scales: they decode the weight."""
        scales = self.SCB
        super()._apply(fn, recurse)
        moved = self.SCB
        if scales is not None and moved is not None and moved.dtype != scales.dtype:
            self.SCB = scales.to(moved.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Also save what decodes a 4-bit weight, under the names that bitsandbytes gives it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight: Any = self.weight
        if issubclass(self.plain_type, loaded("bitsandbytes.nn", "Linear4bit") or ()):
            for name, tensor in weight.quant_state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{name}"] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        start = f"{prefix}weight."
        found = {name.removeprefix(start): tensor for name, tensor in state_dict.items() if name.startswith(start)}
        weight: Any = self.weight
        four_bits = issubclass(self.plain_type, loaded("bitsandbytes.nn", "Linear4bit") or ())
        given = state_dict.get(f"{prefix}weight")
        if given is not None and given.dtype != self.weight.dtype:
            errors.append(f"{prefix}weight: expected the packed {self.weight.dtype} of its base, got {given.dtype}")
            return
        if given is not None and four_bits and not found:
            missing += [start + name for name in weight.quant_state.as_dict(packed=True)]
            return
        before = len(unexpected)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if found and four_bits:
            weight.quant_state = loaded("bitsandbytes.functional", "QuantState").from_dict(found, weight.device)
            unexpected[before:] = [name for name in unexpected[before:] if not name.startswith(start)]
        # bitsandbytes' entry for the order of int8 values; there is only one order
        unexpected[before:] = [name for name in unexpected[before:] if name != f"{prefix}weight_format"]


class _Blocks:
    """The rows of a layer's W0, for :func:`glora_kernels.blocked_linear`."""

    def __init__(self, layer: GLoRAQuantisedLinear):
        self.format, self.shape = layer.format, (layer.out_features, layer.in_features)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        rows, columns = self.shape
        height = max(1, BLOCK_ELEMENTS // (columns * self.format.unit)) * self.format.unit
        return [(start, min(start + height, rows)) for start in range(0, rows, height)]

    def rows(self, start: int, stop: int) -> Tensor:
        return self.format.rows(start, stop)
