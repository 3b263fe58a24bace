"""How quantised weights are read by rows and made again: 4 bit and int8 of bitsandbytes, int8 of torchao.

Their own packages decode and encode. They are used only if a model has such a weight already.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .packages import is_a, loaded
from .plain import qualified_name

_BITSANDBYTES_LAYERS = ("Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt")


class Format(Protocol):
    """One kind of quantised weight.

    Attributes:
        unit: a block of rows starts at a multiple of this many rows.
        dtype: what rows are decoded to.
    """

    unit: int
    dtype: torch.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """These rows of W0, decoded: ``(stop - start, K)``."""

    def encode(self, plain: nn.Linear, weight: Tensor) -> None:
        """Give ``plain``, a layer without values, a quantised ``weight``, from ``(N, K)`` in fp32, in these settings.

        Raises:
            ValueError: values beyond the range of the dtype that the format quantises.
        """


def layer_types() -> tuple[type[nn.Linear], ...]:
    """The quantised layers of bitsandbytes; none where it is not loaded."""
    kinds = (loaded("bitsandbytes.nn", name) for name in _BITSANDBYTES_LAYERS)
    return tuple(kind for kind in kinds if kind is not None)


def is_quantised(linear: nn.Module) -> bool:
    """Whether it is exactly a quantised layer of bitsandbytes, or an ``nn.Linear`` with a weight of torchao's."""
    if type(linear) is nn.Linear:
        weight = linear.weight
        return is_a(weight, "torchao.utils", "TorchAOBaseTensor") or is_a(weight, *_NF4_TENSOR)
    return type(linear) in layer_types()


def scales_of(linear: nn.Linear) -> Tensor | None:
    """The scales of an int8 weight of bitsandbytes, (N,); the layer's first call moves them from weight to layer."""
    if not is_a(linear, "bitsandbytes.nn", "Linear8bitLt"):
        return None
    scales = getattr(linear.weight, "SCB", None)
    return linear.state.SCB if scales is None else scales  # type: ignore[union-attr, return-value]


def settings_of(linear: nn.Linear) -> dict[str, Any]:
    """The arguments that make a plain layer of the same type and settings."""
    if is_a(linear, "bitsandbytes.nn", "Linear8bitLt"):
        state: Any = linear.state
        return {"has_fp16_weights": False, "threshold": state.threshold, "index": linear.index}
    if type(linear) is nn.Linear:
        return {}
    weight: Any = linear.weight
    settings = {"compute_dtype": linear.compute_dtype, "compress_statistics": weight.compress_statistics}
    settings["quant_storage"] = weight.quant_storage
    if type(linear) is loaded("bitsandbytes.nn", "Linear4bit"):  # LinearNF4 and LinearFP4 need no such argument
        settings["quant_type"] = weight.quant_type
    return settings


def format_of(kind: type[nn.Module], weight: Tensor, scales: Tensor | None) -> Format:
    """How the ``weight`` of a layer of type ``kind`` is read. (Pickled weights of bitsandbytes lose their type.)

    Raises:
        TypeError: not quantised yet, or in a format that cannot be read by rows.
    """
    if kind is nn.Linear:
        return _TorchAO(weight)
    if kind is loaded("bitsandbytes.nn", "Linear8bitLt"):
        return _EightBit(weight, scales)
    return _FourBit(weight)


_NOT_YET = "linear: expected a quantised weight, got one that is not quantised yet; move the model to its device first"
_NF4_TENSOR = ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "NF4Tensor")


class _EightBit:
    """``W0 = values * scales / 127``, a scale for each row."""

    unit = 1
    dtype = torch.float32

    def __init__(self, weight: Tensor, scales: Tensor | None):
        if weight.dtype != torch.int8 or scales is None:
            raise TypeError(_NOT_YET)
        self.values, self.scales = weight.data, scales

    def rows(self, start: int, stop: int) -> Tensor:
        from bitsandbytes import functional

        return functional.int8_vectorwise_dequant(self.values[start:stop], self.scales[start:stop])

    def encode(self, plain: nn.Linear, weight: Tensor) -> None:
        import bitsandbytes as bnb

        half = weight.to(torch.float16)  # what bitsandbytes quantises from
        if not bool(half.isfinite().all()):
            raise ValueError("merged weight: expected values within the range of fp16, which int8 is quantised from")
        values, scales, _ = bnb.functional.int8_vectorwise_quant(half)
        plain.weight = bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales)


class _FourBit:
    """NF4 or FP4: two values per byte in row-major order, a scale for each block of values."""

    def __init__(self, weight: Any):
        state = weight.quant_state
        if state is None:
            raise TypeError(_NOT_YET)
        if getattr(state, "packing_format_for_cpu", False):
            raise TypeError(
                "linear: expected the storage order of bitsandbytes, got a weight that a forward pass in eval mode has "
                "repacked for this CPU; adapt the model before it is run"
            )
        self.weight, self.state, self.dtype = weight, state, state.dtype
        # A block of rows starts where a block of values, and so a byte, does.
        self.unit = state.blocksize // math.gcd(state.shape[1], state.blocksize)

    def rows(self, start: int, stop: int) -> Tensor:
        from bitsandbytes import functional

        columns, size = self.state.shape[1], self.state.blocksize
        scales = self._scales()[start * columns // size : -(-stop * columns // size)]
        # As one row: for several, the CPU kernel of 0.50 misplaces the scales if K is no multiple of the block size.
        shape = torch.Size((1, (stop - start) * columns))
        state = functional.QuantState(scales, shape, self.state.code, size, self.state.quant_type, self.dtype)
        packed = self.weight.data.reshape(-1).view(torch.uint8)[start * columns // 2 : -(-stop * columns // 2)]
        return functional.dequantize_4bit(packed[:, None], state).reshape(stop - start, columns)

    def _scales(self) -> Tensor:
        """One scale per block of values, decoded if the scales are quantised too."""
        from bitsandbytes import functional

        if not self.state.nested:
            return self.state.absmax
        return functional.dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset

    def encode(self, plain: nn.Linear, weight: Tensor) -> None:
        import bitsandbytes as bnb

        settings = {
            "blocksize": self.state.blocksize,
            "compress_statistics": self.state.nested,
            "quant_type": self.state.quant_type,
            "quant_storage": self.weight.dtype,
        }
        source = weight.to(self.dtype)
        if not bool(source.isfinite().all()):
            raise ValueError(f"merged weight: expected values within the range of {self.dtype}")
        packed, state = bnb.functional.quantize_4bit(source, **settings)
        plain.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, module=plain, bnb_quantized=True, **settings
        )
        plain.quant_state = state


class _TorchAO:
    """An ``Int8Tensor``, which slices and decodes itself."""

    unit = 1

    def __init__(self, weight: Any):
        if type(weight) is not loaded("torchao.quantization", "Int8Tensor"):
            raise TypeError(f"linear: expected a weight of torchao's Int8Tensor, got {qualified_name(type(weight))}")
        if weight.act_pre_scale is not None:
            raise TypeError("linear: expected an Int8Tensor without act_pre_scale, got one that scales activations")
        self.weight, self.dtype = weight, weight.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight.detach()[start:stop].dequantize()

    def encode(self, plain: nn.Linear, weight: Tensor) -> None:
        from torchao.quantization import Int8Tensor, MappingType, PerGroup, PerRow, PerTensor

        old, size = self.weight, tuple(self.weight.block_size)
        rowwise = PerRow() if size[1] == weight.shape[1] else PerGroup(size[1])
        shifted = old.zero_point is not None and bool(old.zero_point.any())
        tensor = Int8Tensor.from_hp(
            weight.to(self.dtype),
            PerTensor() if size == tuple(weight.shape) else rowwise,
            MappingType.ASYMMETRIC if shifted else MappingType.SYMMETRIC,
            act_quant_kwargs=old.act_quant_kwargs,
            act_quant_scale=old.act_quant_scale,
            act_quant_zero_point=old.act_quant_zero_point,
            reduce_range=old.reduce_range,
        )
        plain.weight = nn.Parameter(tensor, requires_grad=False)
