"""Our adapters as LoRA folders of PEFT's, which most servers of models load."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from glora_kernels import LowRank, Terms, Vector, reference

from ..arguments import listed, require_integer, require_type
from ..distributed import require_whole
from ..files import require_new_folder
from ..layers.base import GLoRALayer, parts_of, support_dtype
from ..layers.conv1d import GLoRAConv1D
from ..layers.conv2d import GLoRAConv2d
from ..models.contents import check_written, warn_of_buffers
from ..models.modules import require_layers, require_real
from .writing import FILES, require_names, saved_whole, write_adapter

TOLERANCE = 0.1  # of a layer's relative error, where a rank is given


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of :func:`export_lora`. Errors are measured in fp64, on the factors as they are stored.

    Attributes:
        name: in the model.
        rank: how many columns of ``lora_B`` are its own; the others are zeros.
        exact: whether that rank expresses dW, so that the errors are those of rounding.
        relative_error: ``||dW - lora_B lora_A|| / ||dW||``, Frobenius norms; 0 where dW is zero.
        largest_error: the largest entry of ``|dW - lora_B lora_A|``.
    """

    name: str
    rank: int
    exact: bool
    relative_error: float
    largest_error: float

    @property
    def kept_energy(self) -> float:
        """The share of ``||dW||^2`` that is kept: ``1 - relative_error^2``."""
        return 1 - self.relative_error**2

    def to_dict(self) -> dict:
        return {**asdict(self), "kept_energy": self.kept_energy}


@dataclass(frozen=True)
class LoRAExport:
    """What :func:`export_lora` wrote.

    Attributes:
        rank: r of the folder, the same for all layers.
        bias: whether the layers have a ``lora_B.bias``.
        layers: one entry per layer, in the model's order.
    """

    rank: int
    bias: bool
    layers: tuple[ExportedLayer, ...]

    @property
    def exact(self) -> bool:
        """Whether every layer is exact."""
        return all(layer.exact for layer in self.layers)

    @property
    def worst(self) -> ExportedLayer:
        """The layer of the largest relative error."""
        return max(self.layers, key=lambda layer: layer.relative_error)

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {"rank": self.rank, "bias": self.bias, "layers": [layer.to_dict() for layer in self.layers]}

    def __str__(self) -> str:
        exact = sum(layer.exact for layer in self.layers)
        worst, largest = self.worst, max(layer.largest_error for layer in self.layers)
        return (
            f"exported {len(self.layers)} layers as LoRA of rank {self.rank}{', with biases' * self.bias}: {exact} "
            f"exactly, largest relative error of an update {worst.relative_error:.2e} ({worst.name!r}), largest error "
            f"of a weight {largest:.2e}"
        )


def export_lora(
    model: nn.Module,
    folder: str | os.PathLike,
    rank: int | None = None,
    tolerance: float | None = None,
    bias: bool = False,
) -> LoRAExport:
    """Write a LoRA adapter for PEFT (``peft.PeftModel.from_pretrained(base, folder)``), vLLM and SGLang.

    A layer's update ``dW = W_eff - W0`` (N, K) becomes ``lora_B @ lora_A``, (N, r) and (r, K), with scaling 1
    (``lora_alpha`` is r). It is formed in fp64 from the support tensors; the factors are stored in fp32 (fp64 for fp64
    layers). These are exact:

    ======================  ===========================================  ==============
    path                    ``lora_B``, ``lora_A``                       rank
    ======================  ===========================================  ==============
    B low rank              ``Bd``, ``Bu``: the same bits                of B
    B vector or constant    the values of the rows, ones                 1
    A low rank, matmul      ``W0 @ Ad``, ``Au``: rounded                 of A
    ======================  ===========================================  ==============

    A and B together need the sum of their ranks. Every other A (hadamard, vector or constant) gives an update of full
    rank, whose best approximation of the given rank is written: the singular value decomposition, cut off. Its error
    is measured, and refused above the tolerance.

    Convolutions get ``lora_A`` (r, I, kh, kw) and ``lora_B`` (N, r, 1, 1). For a quantised base, dW is the update of
    the decoded weight; without A and C nothing is decoded. Base weights are not written. What is trained beside the
    adapters is written as :func:`glora.peft.export_peft` does it, as ``modules_to_save``; PEFT loads that, vLLM does
    not.

    Args:
        model: with GLoRA layers: of any kind, but GPT-2's ``Conv1D`` only among themselves.
        folder: a new one, or one to replace that holds nothing but a former export; written atomically.
        rank: r of all layers, since servers want one; layers that need less are filled up with zeros. None: the
            smallest rank that expresses every layer.
        tolerance: with ``rank``, the largest relative error of a layer, ``||dW - lora_B lora_A|| / ||dW||``; 0.1 if
            None. 0 means that every layer has to be exact up to rounding, as without ``rank``.
        bias: whether ``b_eff - b0 = W0 c + b0 * D + E`` may be written, as PEFT's ``lora_bias``. PEFT loads it, but
            not on a base of torchao's, and cannot merge it into a layer without bias; vLLM and SGLang do not read it.

    Returns:
        The rank, and the errors of each layer.

    Raises:
        TypeError: ``model`` is no module, ``folder`` no path, or ``bias`` no bool.
        ValueError: a wrong rank or tolerance; no GLoRA layer, or a model that is one itself; what PEFT's LoRA cannot
            express, by layer (convolutions with groups, dilation or a padding other than zeros; ``Conv1D`` among other
            layers); without ``rank``, an update of full rank; with it, an error above the tolerance; without ``bias``,
            a bias that changes; values that are not finite; trained tensors that PEFT could not save, or that this
            process does not hold whole; a folder that holds other files. Nothing is written then.

    Warns:
        UserWarning: statistics of norm layers and other buffers that PEFT cannot save.

    The decomposition of an (N, K) update costs about ``20 N K min(N, K)`` operations in fp64, on the layer's device.

    >>> model = glora.inject(AutoModelForCausalLM.from_pretrained(name), 8, targets=("q_proj", "v_proj"), heads=())
    >>> glora.set_paths(model, dict.fromkeys(glora.glora_layers(model), glora.PathConfig(B="lora_8")))
    >>> ...  # train
    >>> print(glora.export_lora(model, "adapter"))
    """
    _check_arguments(rank, tolerance, bias)
    require_whole(model)
    require_new_folder("folder", folder, FILES)
    require_real(model)
    layers = require_layers(model)
    _require_expressible(layers)
    shifts = _bias_updates(layers, bias)
    rank = _smallest_rank(layers) if rank is None else rank
    saved, tensors = saved_whole(model, layers)
    entries = []
    for name, layer in layers.items():
        factors, entry = _fitted(name, layer, rank)
        entries.append(entry)
        tensors |= {f"{name}.{key}": tensor for key, tensor in _stored(layer, *factors, shifts.get(name)).items()}
    report = LoRAExport(rank, bool(shifts), tuple(entries))
    _require_near(report, TOLERANCE if tolerance is None else tolerance)
    check_written(tensors)
    warn_of_buffers(model, layers.values(), tuple(saved))
    write_adapter(model, layers, folder, _config(layers, report), saved, tensors)
    return report


def _check_arguments(rank: int | None, tolerance: float | None, bias: bool) -> None:
    require_type("bias", bias, bool, "True or False")
    if rank is not None:
        require_integer("rank", rank, 1)
    if tolerance is None:
        return
    if type(tolerance) not in (int, float) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a number from 0, got {tolerance!r}")
    if rank is None:
        raise ValueError(
            f"tolerance: expected None without a rank, where every layer has to be exact, got {tolerance}; give rank="
        )


def _require_expressible(layers: Mapping[str, GLoRALayer]) -> None:
    """Raise ValueError, listing layers, for those that PEFT's LoRA computes otherwise."""
    require_names(layers)
    faults = {name: fault for name, layer in layers.items() if (fault := _fault(layer)) is not None}
    if faults:
        listing = listed(f"{name}: {fault}" for name, fault in faults.items())
        raise ValueError(
            f"model: expected layers that PEFT's LoRA can express, not so are {listing}; leave them out of "
            "glora.inject (exclude=...), or merge the model (glora.merge)"
        )
    others = [name for name, layer in layers.items() if not isinstance(layer, GLoRAConv1D)]
    if 0 < len(others) < len(layers):
        raise ValueError(
            "model: expected no Conv1D among other adapted layers, since PEFT's fan_in_fan_out speaks for all of them; "
            f"got Conv1D and {listed(others)}; leave one kind out of glora.inject (exclude=...)"
        )


def _fault(layer: GLoRALayer) -> str | None:
    """Why PEFT's LoRA computes another layer than this one; None if it does not."""
    if not isinstance(layer, GLoRAConv2d):
        return None
    if layer.groups != 1:
        return f"{layer.groups} groups"
    if layer.dilation != (1, 1):
        return f"dilation {layer.dilation}, which PEFT leaves out"
    return None if layer.padding_mode == "zeros" else f"padding mode {layer.padding_mode}, which PEFT leaves out"


def _bias_updates(layers: Mapping[str, GLoRALayer], allowed: bool) -> dict[str, Tensor]:
    """b_eff - b0 of every layer; empty if all are zero. Raises ValueError unless they are zero or ``allowed``."""
    shifts = {name: _bias_update(name, layer) for name, layer in layers.items()}
    changed = [name for name, shift in shifts.items() if shift.any()]
    if changed and not allowed:
        raise ValueError(
            f"bias: expected biases that stay as they are, since vLLM and SGLang read no others; C, D or E changes "
            f"those of {listed(changed)}. Search over glora.SearchSpace(..., C=('none',), D=('none',), E=('none',)), "
            "or pass bias=True for PEFT's lora_bias"
        )
    return shifts if changed else {}


@torch.no_grad()
def _bias_update(name: str, layer: GLoRALayer) -> Tensor:
    """``b_eff - b0 = W0 c + b0 * D + E``, (N,), in fp64."""
    terms = layer.terms().map(lambda storage: storage.double())
    rows, columns = layer.out_features, layer.in_features
    shift = torch.zeros(rows, dtype=torch.float64, device=layer.E.device)
    if terms.C is not None:
        shift += layer.matrix.double() @ reference.dense(terms.C, columns, 1)[:, 0]
    if terms.D is not None and layer.bias is not None:
        shift += layer.bias.double() * reference.dense(terms.D, rows, 1)[:, 0]
    if terms.E is not None:
        shift += reference.dense(terms.E, rows, 1)[:, 0]
    return _finite(name, shift)


def _smallest_rank(layers: Mapping[str, GLoRALayer]) -> int:
    """The rank of the largest update of low rank. Raises ValueError if that does not express every layer."""
    terms = {name: _weight_terms(layer) for name, layer in layers.items()}
    needed = {name: _rank_needed(layer, terms[name]) for name, layer in layers.items()}
    rank = max([needed[name] for name in layers if _is_low_rank(terms[name])], default=0) or 1
    beyond = [
        f"{name}: A is {layer.path.A}, {layer.product} product, exact from rank {needed[name]}"
        for name, layer in layers.items()
        if needed[name] > rank
    ]
    if beyond:
        raise ValueError(
            f"rank: expected one for updates of full rank, got None with {listed(beyond)}; give rank= for the best "
            "approximation, or search over glora.SearchSpace(..., A=('none',))"
        )
    return rank


def _weight_terms(layer: GLoRALayer) -> Terms:
    """A and B in fp64, without those that are zero, as after ``inject``."""
    terms = layer.terms(layer.path.without_bias()).map(lambda storage: storage.double())
    kept = {slot: term for slot, term in terms.active if all(part.any() for part in parts_of(term))}
    return Terms(**kept, product=layer.product)  # type: ignore[arg-type]


def _is_low_rank(terms: Terms) -> bool:
    return terms.A is None or (terms.product == "matmul" and isinstance(terms.A, LowRank))


def _rank_needed(layer: GLoRALayer, terms: Terms) -> int:
    """The rank that expresses dW, whatever values the terms have."""
    full = min(layer.out_features, layer.in_features)
    if not _is_low_rank(terms):
        return full
    ranks = [term.read_rank if isinstance(term, LowRank) else 1 for _, term in terms.active]
    return min(sum(ranks), full)


@torch.no_grad()
def _fitted(name: str, layer: GLoRALayer, rank: int) -> tuple[tuple[Tensor, Tensor], ExportedLayer]:
    """``lora_B`` (N, rank) and ``lora_A`` (rank, K) of a layer, as they are stored, and how near they are."""
    terms = _weight_terms(layer)
    if _is_low_rank(terms):
        left, right = _factors(layer, terms)
        update = _finite(name, left @ right)
        if left.shape[1] > rank:
            left, right = _cut_product(left, right, rank)
    else:
        update = _finite(name, _full_update(layer, terms))
        left, right = _cut(update, rank)
    own = left.shape[1]
    dtype = support_dtype(layer.E)
    lora_b, lora_a = left.new_zeros(len(left), rank, dtype=dtype), left.new_zeros(rank, right.shape[1], dtype=dtype)
    lora_b[:, :own], lora_a[:own] = left, right
    error = update - lora_b.double() @ lora_a.double()
    norm = float(update.norm())
    relative = float(error.norm()) / norm if norm else 0.0
    exact = _rank_needed(layer, terms) <= rank
    return (lora_b, lora_a), ExportedLayer(name, own, exact, relative, float(error.abs().max()))


def _factors(layer: GLoRALayer, terms: Terms) -> tuple[Tensor, Tensor]:
    """An update of low rank as (N, s) and (s, K), in fp64."""
    rows, columns = layer.out_features, layer.in_features
    nothing = torch.empty(0, dtype=torch.float64, device=layer.E.device)
    lefts, rights = [nothing.new_zeros(rows, 0)], [nothing.new_zeros(0, columns)]
    if isinstance(terms.A, LowRank):
        down, up = terms.A.factors
        lefts.append(layer.matrix.double() @ down)
        rights.append(up)
    if isinstance(terms.B, LowRank):
        lefts.append(terms.B.factors[0])
        rights.append(terms.B.factors[1])
    elif terms.B is not None:
        lefts.append(reference.dense(terms.B, rows, 1))
        rights.append(nothing.new_ones(1, columns))
    return torch.cat(lefts, 1), torch.cat(rights)


def _full_update(layer: GLoRALayer, terms: Terms) -> Tensor:
    """``dW = W0 * A + B``, or ``W0 @ A + B`` with a diagonal A, (N, K), in fp64."""
    shape = layer.out_features, layer.in_features
    assert terms.A is not None
    diagonal = terms.product == "matmul" and isinstance(terms.A, Vector)
    update = layer.matrix.double() * (parts_of(terms.A)[0] if diagonal else reference.dense(terms.A, *shape))
    return update if terms.B is None else update + reference.dense(terms.B, *shape)


def _cut(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of ``rank``, with the singular values shared between both."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return u[:, :rank] * roots, roots[:, None] * v[:rank]


def _cut_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As :func:`_cut` of ``left @ right``, (N, s) and (s, K), by a decomposition of an (s, s) matrix."""
    q, r = torch.linalg.qr(left)
    p, s = torch.linalg.qr(right.mT)
    inner_left, inner_right = _cut(r @ s.mT, rank)
    return q @ inner_left, inner_right @ p.mT


def _finite(name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ValueError(f"model: expected finite values, got NaN or infinity in {name!r}; training has diverged")
    return values


def _stored(layer: GLoRALayer, lora_b: Tensor, lora_a: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a layer by PEFT's names, in its shapes."""
    if isinstance(layer, GLoRAConv2d):
        lora_b, lora_a = lora_b[:, :, None, None], lora_a.unflatten(1, layer.weight.shape[1:])
    tensors = {"lora_A.weight": lora_a, "lora_B.weight": lora_b}
    return tensors if shift is None else {**tensors, "lora_B.bias": shift.to(lora_b.dtype)}


def _require_near(report: LoRAExport, tolerance: float) -> None:
    """Raise ValueError, the worst layers first, if a layer that is not exact is above the tolerance."""
    far = [layer for layer in report.layers if not layer.exact and layer.relative_error > tolerance]
    far.sort(key=lambda layer: layer.relative_error, reverse=True)
    if far:
        figures = listed(f"{layer.name}: {layer.relative_error:.3g}" for layer in far)
        raise ValueError(
            f"tolerance: expected relative errors up to {tolerance} at rank {report.rank}, got {figures}; give a "
            "larger rank= or tolerance="
        )


def _config(layers: Mapping[str, GLoRALayer], report: LoRAExport) -> dict:
    """What PEFT's LoraConfig says of the adapter."""
    return {
        "peft_type": "LORA",
        "r": report.rank,
        "lora_alpha": report.rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": report.bias,
        "fan_in_fan_out": all(isinstance(layer, GLoRAConv1D) for layer in layers.values()),
    }
