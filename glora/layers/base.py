"""What all adapted layers have in common."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from glora_kernels import (
    Constant,
    LowRank,
    Terms,
    Vector,
    configured_linear,
    encode,
    glora_linear,
    reference,
    takes_operator,
)
from glora_kernels.terms import Term

from ..config import STORAGES, Choice, LayerShape, PathConfig
from ..scales import Scales
from .path_history import PathHistory, next_start
from .plain import Plain

PROBE_TOKENS = 16
SUPPORT_NAMES = tuple(name for names in STORAGES.values() for name in names)
_LEFT = {names[0]: index for index, names in enumerate(STORAGES.values())}  # of every tensor the storage that is scaled
_NO_PATHS = (
    "load_state_dict: expected the paths of the support tensors too, which a state dict carries in its metadata; got "
    "none, as from a plain dict, a safetensors file or an older glora. Every layer keeps the path and the scales that "
    "it has: set the right ones by glora.set_paths(model, paths) and layer.scales. glora.save_adapter and load_adapter "
    "keep them and the tensors together"
)
Layer = TypeVar("Layer", bound="GLoRALayer")


class GLoRALayer(nn.Module):
    """What every adapted layer is: a frozen weight, seen as an ``(N, K)`` matrix, five support tensors and a path.

    Find layers by this type (:func:`glora.glora_layers`); make them by :class:`GLoRALinear` and its siblings.

    Attributes:
        out_features, in_features: N and K.
        weight, bias: the frozen base, in the shapes of the plain layer; ``bias`` (N,) or None.
        rank: the largest rank a path may ask for.
        product: ``"hadamard"`` or ``"matmul"``.
        merges_exactly: whether the merged weight has the very bits that this layer multiplies by.
        compiled_with: the arguments of :meth:`compile`, if that was called.
        plain_type: the type of the module that was adapted, and of the merged one.

    Parameters:
        Ad (N, R) or, for the matmul product, (K, R); Au (R, K); Bd (N, R); Bu (R, K); Cd (K, R);
        Cu (R, 1); D (N,); E (N,): trainable, under the official names. They are fp32 if the weight is
        of a half type, which would round small updates away (``.to(dtype)`` casts all).
    """

    merges_exactly: ClassVar[bool] = True
    in_features: int
    out_features: int
    rank: int
    product: str
    compiled_with: tuple[tuple, dict[str, Any]] | None = None
    plain_type: type[nn.Module]
    weight: nn.Parameter
    bias: nn.Parameter | None
    Ad: nn.Parameter
    Au: nn.Parameter
    Bd: nn.Parameter
    Bu: nn.Parameter
    Cd: nn.Parameter
    Cu: nn.Parameter
    D: nn.Parameter
    E: nn.Parameter
    _config: Tensor
    _scales: Scales = Scales()
    _factors: Tensor | None = None

    @classmethod
    def _around(cls: type[Layer], base: nn.Module, rank: int, product: str) -> Layer:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._wrap(base, rank, product)
        return layer

    def _wrap(self, base: Any, rank: int, product: str) -> None:
        """Take over the geometry and the parameters of ``base``."""
        raise NotImplementedError

    def _take_over(self, base: nn.Module, features: tuple[int, int], rank: int, product: str) -> None:
        """Adopt and freeze the parameters of ``base``, whose weight is a matrix of ``features = (N, K)``."""
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank: expected an integer from 1, got {rank!r}")
        self.out_features, self.in_features = features
        self.rank, self.product = rank, Terms(product=product).product
        self.plain_type = type(base)
        base.requires_grad_(False)
        self.weight = base.weight  # type: ignore[assignment]
        self.register_parameter("bias", base.bias)  # type: ignore[arg-type]
        wide = support_dtype(self.weight)
        with torch.inference_mode(False):  # they are trained later
            for name, shape in support_shapes(features, rank, product).items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=self.weight.device, dtype=wide)))
        self._begin(PathConfig(f"lora_{rank}", f"lora_{rank}", f"lora_{rank}", "vector", "vector"))
        self.register_state_dict_post_hook(_write_path)
        self.training = base.training
        self.reset_support()

    @property
    def matrix(self) -> Tensor:
        """W0 as ``(N, K)``: a view of :attr:`weight` where that is possible."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K) -> (..., N)``. Under ``torch.compile`` the path is data: one graph serves every path."""
        if takes_operator():
            storages = self.storages_times(self._factors)
            return configured_linear(x, self.matrix, self.bias, storages, self._config, self.product)
        return self.compute(x, self._terms_in_force())

    def storages_times(self, factors: Tensor | None) -> list[Tensor]:
        """All storages, where the path is data: the left one of each tensor times its factor, ``(5,)``; None for 1."""
        storages = {name: getattr(self, name) for name in SUPPORT_NAMES}
        if factors is not None:
            storages |= {name: storages[name] * factors[index] for name, index in _LEFT.items()}
        return list(storages.values())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As ``nn.Module.compile``; merging the model compiles the plain layer too. Copies are not compiled."""
        super().compile(*args, **kwargs)
        self.compiled_with = args, kwargs

    def compute(self, x: Tensor, terms: Terms) -> Tensor:
        """What forward does, with ``terms`` in place of those of the path."""
        return glora_linear(x, self.matrix, self.bias, terms)

    def merge(self, path: PathConfig | None = None, safe: bool = True) -> nn.Module:
        """A plain layer, sharing nothing with this one, that computes what this one does under ``path``."""
        raise NotImplementedError

    def stands_merged(self, module: nn.Module) -> bool:
        """Whether ``module`` can be what this layer was merged into."""
        return type(module) is self.plain_type and module.weight.shape == self.weight.shape  # type: ignore[union-attr]

    def outputs_merged(self, plain: nn.Module, x: Tensor) -> Tensor:
        """The output of ``plain``, merged from this layer, for x."""
        return plain.forward(x)

    def probe(self, generator: torch.Generator) -> Tensor:
        """A small random input of unit variance, on the layer's device and in its dtype."""
        x = torch.randn(PROBE_TOKENS, self.in_features, generator=generator)
        return x.to(self.weight)

    def exact(self, x: Tensor) -> Tensor:
        """The formula in fp64, written out (:mod:`glora_kernels.reference`)."""
        bias = None if self.bias is None else self.bias.double()
        return reference.glora_linear(x.double(), self.matrix.double(), bias, self.terms())

    def reset_support(self) -> None:
        """Reset to the identity as the official code does: right factors Xavier-uniform, all else zero; scales 1."""
        self.scales = Scales()
        with torch.no_grad():
            for name in SUPPORT_NAMES:
                parameter = getattr(self, name)
                if name in ("Au", "Bu", "Cu"):
                    nn.init.xavier_uniform_(parameter)
                else:
                    parameter.zero_()

    @property
    def path(self) -> PathConfig:
        """The kind of each support tensor; may be set to any path of up to :attr:`rank`, at any time outside backward.

        A forward pass that activation checkpointing runs again during backward takes the path of its first run
        (:mod:`glora.layers.path_history`).
        """
        return self._history.now

    @path.setter
    def path(self, path: PathConfig) -> None:
        self.require_takes(path)
        take_paths([(self, path)])

    @property
    def scales(self) -> Scales:
        """What each kind is multiplied by when it is read (:func:`glora.balance`); all 1 unless they were set.

        Other scales change what a trained layer computes. :func:`glora.fold_scales` makes them 1 without that.

        Raises:
            TypeError: set to anything but :class:`glora.Scales`.
        """
        return self._scales

    @scales.setter
    def scales(self, scales: Scales) -> None:
        if not isinstance(scales, Scales):
            raise TypeError(f"scales: expected glora.Scales, got {type(scales).__name__}")
        self.__dict__["_scales"] = scales
        self._unprepare()
        with _trainable():
            self._encode_path()

    def _unprepare(self) -> None:
        """Forget what was prepared for calls under the scales of before."""

    def require_takes(self, path: PathConfig) -> None:
        """Raise TypeError or ValueError for what :attr:`path` cannot be set to."""
        if not isinstance(path, PathConfig):
            raise TypeError(f"path: expected glora.PathConfig, got {type(path).__name__}")
        if path.rank > self.rank:
            raise ValueError(f"path: expected ranks up to {self.rank} (the rank of the storage), got {path}")

    def _begin(self, path: PathConfig) -> None:
        """Begin with ``path`` and without a history of others."""
        self._history = PathHistory(path)
        with _trainable():
            self._encode_path()

    def _encode_path(self) -> None:
        """Encode the path as data for compiled graphs. It is no buffer: it stays on the CPU and out of state dicts."""
        history = self._history
        _ = history.now.read  # cached now: a graph that is being traced cannot do it
        # Past nn.Module.__setattr__, which looks for parameters, modules and buffers first.
        self.__dict__["_config"] = encode(history.now.choices, history.since)
        if self._scales.factors or self._factors is not None:
            self.__dict__["_factors"] = self._scales.of_path(history.now) if self._scales.factors else None

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.out_features, self.in_features, self.bias is not None, self.product)

    def support_parameters(self, path: PathConfig | None = None) -> Iterator[nn.Parameter]:
        """The support tensors: all of them, or those that ``path`` reads."""
        names = SUPPORT_NAMES if path is None else names_read(path, self.bias is not None)
        return iter([getattr(self, name) for name in names])

    def terms(self, path: PathConfig | None = None, storages: Mapping[str, Tensor] | None = None) -> Terms:
        """The storages, or others by their names, times the scales, and how much ``path`` (default: its own) reads."""
        terms: dict[str, Any] = {}
        scales = self._scales
        for slot, choice, names in (self.path if path is None else path).read:
            left, *right = [getattr(self, name) if storages is None else storages[name] for name in names]
            terms[slot] = term_of(choice, scales.apply(slot, choice.kind, left), *right)
        return Terms(**terms, product=self.product)

    def folded(self, path: PathConfig | None = None) -> dict[str, Tensor]:
        """All storages by name, as they are under ``path`` (default: :attr:`path`) if no kind had a scale.

        A storage without a scale is the parameter itself.
        """
        storages: dict[str, Tensor] = {name: getattr(self, name) for name in SUPPORT_NAMES}
        for slot, choice, (left, *_) in (self.path if path is None else path).read:
            storages[left] = self._scales.apply(slot, choice.kind, storages[left])
        return storages

    def parts_read(self, path: PathConfig | None = None) -> dict[str, Tensor]:
        """What ``path`` (default: :attr:`path`) reads, by the names of the storages: views where the scale is 1."""
        return parts_read(self.folded(path), self.path if path is None else path, self.bias is not None)

    def _terms_in_force(self) -> Terms:
        """The terms of this forward pass, or of its first run if a checkpoint runs it again (:mod:`.path_history`)."""
        return self.terms(self._history.in_force())

    def _fill(self, plain: Plain, weight: Tensor, bias: Tensor | None) -> Plain:
        """``plain`` with these parameters, frozen, in this layer's mode."""
        plain.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        plain.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        return plain.train(self.training)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Also takes the state dict of an ``nn.Linear``: the support tensors and the path then stay as they are."""
        before, faults = len(missing), len(errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        support = [prefix + name for name in SUPPORT_NAMES]
        if any(name in state_dict for name in support) and len(errors) == faults:
            self._load_path(local_metadata, prefix, errors)
        elif prefix + "weight" in state_dict:
            missing[before:] = [name for name in missing[before:] if name not in support]

    def _load_path(self, metadata: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
        if metadata.get("path") is None:
            warnings.warn(_NO_PATHS, stacklevel=2)
            return
        try:
            scales = Scales.from_dict(metadata.get("scales", {}))
            self.path = PathConfig.from_dict(metadata["path"])
            self.scales = scales
        except ValueError as error:
            errors.append(f"{prefix}path: {error}")

    @property
    def has_run(self) -> bool:
        """Whether forward has been called since the layer was made or copied, other than under ``torch.compile``."""
        return self._history.has_run

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of ``nn.Module``; raises ValueError for a weight that the support tensors do not fit.

        An example is the weight of a head tied to an embedding that was resized and tied again.
        """
        super().register_parameter(name, param)
        if name != "weight" or param is None or not param.numel() or not self.merges_exactly or not hasattr(self, "E"):
            return
        expected, got = (len(self.E), self.Bu.shape[1]), tuple(self.matrix.shape)
        if got != expected:
            raise ValueError(
                f"weight: expected {expected}, which the layer was adapted for, got {got}; resize the model before "
                "glora.inject (resize_token_embeddings), or leave this layer out of it (exclude)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "compiled_with"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give copies, shallow ones too, a path of their own."""
        super().__setstate__(state)
        self._begin(self.path)

    def _replicate_for_data_parallel(self) -> GLoRALayer:
        """A replica lives for one forward pass and its backward; its own thread numbers their autograd nodes."""
        replica = super()._replicate_for_data_parallel()
        replica._begin(self.path)
        return replica

    def extra_repr(self) -> str:
        """Geometry, rank and what the path reads; ``bias=False`` and ``product=matmul`` where that is so."""
        others = [] if self.bias is not None else ["bias=False"]
        others += [] if self.product == "hadamard" else [f"product={self.product}"]
        path = [
            f"{slot}={getattr(self.path, slot)}"
            + (f" * {scale:.3g}" if (scale := self.scales.of(slot, kind)) != 1 else "")
            for slot, (kind, _), _ in self.path.read
        ]
        return ", ".join([self._geometry(), *others, f"rank={self.rank}", *path])

    def _geometry(self) -> str:
        return f"{self.in_features}, {self.out_features}"


def take_paths(paths: Iterable[tuple[GLoRALayer, PathConfig]]) -> None:
    """Set the path of every layer, which has to take it (:meth:`GLoRALayer.require_takes`).

    Raises:
        RuntimeError: during a backward pass; no path is changed then.
    """
    start = next_start()
    with _trainable():
        for layer, path in paths:
            layer._history.set(path, start)
            layer._encode_path()


def _trainable() -> AbstractContextManager[object]:
    """A block in which tensors that are made can be read by graphs that train, whatever mode it is in."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _write_path(layer: Any, _state: dict, _prefix: str, local_metadata: dict[str, Any]) -> None:
    """Put path and scales into the metadata of a state dict, where nobody takes them for tensors."""
    local_metadata["path"] = layer.path.to_dict()
    if layer.scales.factors:
        local_metadata["scales"] = layer.scales.to_dict()


def term_of(choice: Choice, storage: Tensor, up: Tensor | None = None) -> Term:
    """What ``choice``, which is not none, reads of the storages that :attr:`PathConfig.read` names."""
    if up is not None:
        return LowRank(storage, up, choice.rank)
    return Vector(storage) if choice.kind == "vector" else Constant(storage)


def as_layer(layer: GLoRALayer, x: Tensor) -> Tensor:
    """``x`` in the type that the layer computes in outside of autocast; a quantised base takes any."""
    return x.to(layer.weight.dtype) if layer.weight.is_floating_point() and layer.merges_exactly else x


def parts_of(term: Term) -> tuple[Tensor, ...]:
    """Views of what is read of the storages of a term: of a vector ``(length,)``, of a constant ``()``."""
    if isinstance(term, LowRank):
        return term.factors
    return (term.entries if isinstance(term, Vector) else term.entry,)


def parts_read(storages: Mapping[str, Tensor], path: PathConfig, has_bias: bool) -> dict[str, Tensor]:
    """Views of what ``path`` reads of ``storages`` (:func:`parts_of`), by name."""
    parts: dict[str, Tensor] = {}
    for slot, choice, names in path.read:
        if has_bias or slot != "D":
            parts.update(zip(names, parts_of(term_of(choice, *[storages[name] for name in names]))))
    return parts


def names_read(path: PathConfig, has_bias: bool) -> list[str]:
    """The support tensors that ``path`` reads; D scales the bias, so it is read only where there is one."""
    return [name for slot, _, names in path.read if has_bias or slot != "D" for name in names]


def support_shapes(features: tuple[int, int], rank: int, product: str) -> dict[str, tuple[int, ...]]:
    """The shape of every support tensor of a layer of ``features = (N, K)``."""
    rows, columns = features
    return {
        "Ad": (rows if product == "hadamard" else columns, rank),
        "Au": (rank, columns),
        "Bd": (rows, rank),
        "Bu": (rank, columns),
        "Cd": (columns, rank),
        "Cu": (rank, 1),
        "D": (rows,),
        "E": (rows,),
    }


def support_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the support tensors around ``weight``: no half type, which would round small updates away."""
    return torch.promote_types(weight.dtype if weight.is_floating_point() else torch.float32, torch.float32)
