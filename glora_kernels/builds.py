"""Which kernel builds a supernet's layers launch, asked without a GPU, and without compiling anything."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .dispatch import MAX_TRITON_RANK
from .planning.cases import Layer, cases, paths
from .planning.machines import machine_for
from .planning.prediction import STRATEGIES
from .terms import PRODUCTS, compute_dtype

if TYPE_CHECKING:
    from ._triton.builds import Build

TOKENS = 12608  # 64 images of 197 tokens
DTYPES = torch.bfloat16, torch.float16, torch.float32


def builds_for(
    shapes: Iterable[tuple[int, int]],
    ranks: Sequence[int],
    dtype: torch.dtype,
    architecture: str,
    *,
    tokens: Sequence[int] = (TOKENS,),
    products: Sequence[str] = ("hadamard",),
    strategies: Sequence[str] | None = None,
    bias: bool = True,
    training: bool = True,
    input_gradients: Sequence[bool] = (True, False),
    kept_outputs: Sequence[bool] = (True,),
) -> list[Build]:
    """The distinct builds of Triton kernels that such layers launch, over all paths: what Triton compiles once each.

    The layers are :class:`glora.GLoRALinear`: storages of the largest rank, in fp32 around half types, contiguous and
    aligned. The paths are all choices of A to E among the ranks, vector, constant and none. fp32 layers follow torch's
    present setting for products.

    Args:
        shapes: (out, in) of each layer.
        ranks: the ranks that paths may ask for.
        dtype: of the layers: bf16, fp16 or fp32.
        architecture: ``"sm_90"``, ``"gfx942"`` and the like.
        tokens: the numbers of tokens of a call.
        products: ``"hadamard"``, ``"matmul"`` or both.
        strategies: ``"assemble"``, ``"fused"`` or both; None for the one that is predicted to be faster, path by path.
        bias: whether the layers have a bias.
        training: whether backward is launched too, with a gradient of every term.
        input_gradients: whether x wants a gradient; that of a model's first layer does not.
        kept_outputs: whether y is kept where the gradient of A can be solved from it; within an activation checkpoint
            that is not reentrant, or under other hooks on saved tensors, it is not.

    Raises:
        ValueError, TypeError: an argument of another kind, or an architecture of which nothing is known; or kernels
            are interpreted in this process.

    Example:
        >>> found = builds_for([(768, 768)], (8, 4), torch.bfloat16, "sm_90", training=False)
        >>> {build.kernel for build in found}
        {'assemble'}
        >>> found[0].num_warps
        4
    """
    layers = [Layer(*_shape(shape), bias) for shape in _some("shapes", shapes)]
    numbers = [_integer("tokens", number) for number in _some("tokens", tokens)]
    calls = itertools.product(layers, numbers)
    return builds_of_calls(
        calls,
        ranks,
        dtype,
        architecture,
        products,
        strategies,
        training=training,
        kept_outputs=kept_outputs,
        input_gradients=input_gradients,
    )


def builds_of_calls(
    calls: Iterable[tuple[Layer, int]],
    ranks: Sequence[int],
    dtype: torch.dtype,
    architecture: str,
    products: Sequence[str],
    strategies: Sequence[str] | None,
    *,
    training: bool,
    kept_outputs: Sequence[bool],
    input_gradients: Sequence[bool] = (True, False),
) -> list[Build]:
    """As :func:`builds_for`, for layers that are each called with numbers of tokens of their own."""
    ranks = [_integer("ranks", rank, MAX_TRITON_RANK) for rank in _some("ranks", ranks)]
    _choices("dtype", [dtype], DTYPES)
    products = _choices("products", products, PRODUCTS)
    strategies = None if strategies is None else _choices("strategies", strategies, STRATEGIES)
    input_gradients = _choices("input_gradients", input_gradients, (True, False))
    kept_outputs = _choices("kept_outputs", kept_outputs, (True, False))
    if not isinstance(architecture, str):
        raise TypeError(f"architecture: expected a name such as sm_90 or gfx942, got {architecture!r}")
    machine_for(architecture)
    from ._triton.builds import builds_of

    calls, taken = list(calls), list(paths(tuple(dict.fromkeys(ranks))))
    found = (
        cases(
            calls,
            taken,
            strategies,
            rank=max(ranks),
            product=product,
            dtype=dtype,
            factors=compute_dtype(dtype),
            architecture=architecture,
            wants_x=input_gradients,
            keeps_output=kept_outputs,
        )
        for product in products
    )
    return builds_of(itertools.chain.from_iterable(found), training)


def _some(argument: str, values: Iterable[Any]) -> list[Any]:
    found = _listed(argument, values)
    if not found:
        raise ValueError(f"{argument}: expected at least one, got none")
    return found


def _listed(argument: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{argument}: expected a sequence, got {values!r}")
    return list(values)


def _shape(shape: Any) -> tuple[int, int]:
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise TypeError(f"shapes: expected pairs (out, in), got {shape!r}")
    outputs, inputs = (_integer("shapes", size) for size in shape)
    return outputs, inputs


def _integer(argument: str, value: Any, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected integers, got {value!r}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{argument}: expected integers from 1{f' to {most}' if most else ''}, got {value}")
    return value


def _choices(argument: str, values: Iterable[Any], known: Sequence[Any]) -> list[Any]:
    found = _listed(argument, values)
    if not found or any(value not in known for value in found):
        names = ", ".join(map(str, known))
        raise ValueError(f"{argument}: expected some of {names}, got {found!r}")
    return found
