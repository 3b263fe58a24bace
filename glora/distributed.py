"""Gradients, tensors and shares of a model that several processes train.

A random path leaves most support tensors without a gradient. ``DistributedDataParallel``, with its default settings,
then silently leaves some of the other gradients unaveraged. Here the ranks first make sure that they read the same
tensors, and then average the gradients of those alone.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .layers.base import support_shapes
from .models.contents import BATCH_NORMS, require_held
from .models.modules import glora_layers, require_model
from .models.wrappers import is_fsdp1, named_parameters
from .parameters import trainable_parameters
from .paths import get_paths
from .processes import has_group, process_rank, require_agreement, world_size


def sync_gradients(model: nn.Module) -> None:
    """Average the gradients of ``model`` over all processes; call it between ``backward`` and ``step``.

    ``grad = (1 / W) * sum over the W ranks of grad``, by one all-reduce per dtype and device. Gradients that are
    None stay None. After several backward passes under different paths, the tensors with a gradient are those
    that any of the paths read. Does nothing with one process.

    Every rank calls it. Where their shares of a batch differ in size, multiply the mean loss of each share by
    ``W * share / batch`` before ``backward``, as :func:`glora.train` does.

    Raises:
        ValueError: on every rank, if ranks differ in the path of a layer or in which parameters have a gradient
            (the first such rank and layer are named); a model within ``DistributedDataParallel`` or
            ``fully_shard``, which average gradients themselves; a sparse gradient.
    """
    require_model(model)
    if not has_group():
        return
    if holds_replica(model):
        raise ValueError("model: expected one without DistributedDataParallel, which averages gradients itself")
    if holds_shards(model):
        raise ValueError("model: expected one without fully_shard, which averages gradients itself")
    if world_size() == 1:
        return
    named = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    state = {
        **{name: str(path) for name, path in sorted(get_paths(model).items())},
        **{name: f"gradient {_form(gradient)}" for name, gradient in gradients.items()},
    }
    if not _same_everywhere(state, next(model.parameters()).device):
        require_agreement("paths", state)
    for name, gradient in gradients.items():
        if gradient.layout != torch.strided:
            raise ValueError(f"model: expected dense gradients, got {gradient.layout} for {name!r}")
    _average(gradients.values())


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tensor.layout} {tuple(tensor.shape)}"


def _same_everywhere(state: dict[str, str], device: torch.device) -> bool:
    """Whether ``state`` is the same on all ranks: one all-reduce finds the largest hash, and the smallest, negated."""
    digest = hashlib.blake2b(repr(state).encode(), digest_size=7).digest()
    own = int.from_bytes(digest, "big")
    bounds = torch.tensor([own, -own], device=device)
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    largest, smallest = bounds.tolist()
    return largest == -smallest


@torch.no_grad()
def _average(gradients: Iterable[Tensor]) -> None:
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        buckets[gradient.dtype, gradient.device].append(gradient)
    for bucket in buckets.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        flat /= world_size()  # before the sum, which might overflow fp16
        dist.all_reduce(flat)
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(mean.view_as(gradient))


def share(batch_size: int) -> tuple[slice, int]:
    """The samples of a batch that this rank takes, and how many of them count.

    Shares are consecutive; their sizes differ by at most one. An empty share takes the first sample and counts none, so
    that all ranks run the same graph.
    """
    start, stop = (index * batch_size // world_size() for index in (process_rank(), process_rank() + 1))
    return (slice(start, stop) if start < stop else slice(0, 1)), stop - start


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within ``DistributedDataParallel``; any other model as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def holds_replica(model: nn.Module) -> bool:
    """Whether ``DistributedDataParallel`` is around the model or a part of it."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules())


def holds_shards(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has split the parameters of the model or of a part of it."""
    if "torch.distributed.tensor" not in sys.modules:
        return False  # nobody can have made a DTensor
    return any(is_sharded(parameter) for parameter in model.parameters())


def averages_itself(model: nn.Module) -> bool:
    """Whether a backward pass leaves averaged gradients."""
    return holds_replica(model) or holds_shards(model)


def require_trainable(model: nn.Module, random_paths: bool) -> None:
    """Raise ValueError for a model that several processes would silently train wrongly."""
    _require_no_fsdp1(model)
    _require_held(model)
    inner = unwrapped(model)
    if holds_replica(inner):
        raise ValueError("model: expected DistributedDataParallel around the whole model or none, got it around a part")
    if isinstance(model, DistributedDataParallel):
        unread = random_paths or len(trainable_parameters(inner, get_paths(inner))) < len(trainable_parameters(inner))
        if unread and (model.static_graph or not model.find_unused_parameters):
            raise ValueError(
                "model: expected DistributedDataParallel with find_unused_parameters=True and without static_graph, "
                "which otherwise leaves gradients that are not averaged where a path does not read every tensor; or "
                "the model without it, whose gradients glora averages itself"
            )
    if holds_shards(inner):
        _require_fully_sharded(inner)
    if world_size() > 1 or holds_shards(inner):
        _require_plain_bases(inner)
    if world_size() > 1:
        _require_no_batch_norm(inner)


def _require_fully_sharded(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    whole = [name for name, p in model.named_parameters() if not is_sharded(p)]
    if not isinstance(model, FSDPModule) or whole:
        raise ValueError(f"model: expected fully_shard on the whole model, got it on a part; without it are {whole}")
    for name, parameter in model.named_parameters():
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        if mesh.ndim != 1 or mesh.size() != world_size():
            raise ValueError(
                f"model: expected fully_shard over one dimension of all {world_size()} ranks, got {mesh} for {name!r}"
            )


def _require_plain_bases(model: nn.Module) -> None:
    quantised = [name for name, layer in glora_layers(model).items() if not layer.merges_exactly]
    if quantised:
        raise ValueError(
            "model: expected no quantised base with several processes, which would have to exchange its packed values "
            f"and scales, got {quantised}"
        )


def _require_no_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and not isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"model: expected no batch norm, which would normalise each rank's share by itself, got {name!r}; "
                "use torch.nn.SyncBatchNorm.convert_sync_batchnorm"
            )


@torch.no_grad()
def copy_from_first(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0's model, which has to be of the same form.

    Raises:
        ValueError: on every rank, if models differ in the name, shape or dtype of a tensor.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    require_agreement("model", {name: _form(tensor) for name, tensor in tensors.items()})
    for _, tensor in sorted(tensors.items()):
        data = tensor.detach().contiguous()
        dist.broadcast(data, src=0)
        if data.data_ptr() != tensor.data_ptr():
            tensor.copy_(data)


def require_whole(model: nn.Module) -> None:
    """Raise ValueError for a model of which this rank holds only a part."""
    require_model(model)
    _require_no_fsdp1(model)
    if holds_shards(model):
        raise ValueError(
            "model: expected whole parameters, got those of fully_shard; gather them with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict and load them into a model without it"
        )
    _require_held(model)


def _require_no_fsdp1(model: nn.Module) -> None:
    if any(is_fsdp1(module) for module in model.modules()):
        raise ValueError(
            "model: expected one without FullyShardedDataParallel, which puts frozen and trained parameters into one; "
            "train within torch.distributed.fsdp.fully_shard, and save a plain model that has loaded its whole state"
        )


def _require_held(model: nn.Module) -> None:
    """Raise ValueError if a support tensor has lost its shape, or another trained tensor is empty."""
    absent = {name for name, p in named_parameters(model) if p.requires_grad and tuple(p.shape) == (0,)}
    for name, layer in glora_layers(model).items():
        shapes = support_shapes((layer.out_features, layer.in_features), layer.rank, layer.product)
        absent |= {f"{name}.{own}" for own, shape in shapes.items() if tuple(getattr(layer, own).shape) != shape}
    require_held(sorted(absent))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of ``tensor``."""
    from torch.distributed.tensor import DTensor  # here: half a second to import

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every rank; any other tensor as it is."""
    return tensor.full_tensor() if has_group() and is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(tensor: Tensor, model_tensor: Tensor) -> Tensor:
    """The inverse of :func:`whole`, for a ``tensor`` that is the same on every rank."""
    if not has_group() or not is_sharded(model_tensor) or tensor.shape != model_tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = model_tensor.device_mesh, model_tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(model_tensor.device), mesh, placements, src_data_rank=None)
