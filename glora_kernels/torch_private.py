"""Every private name of PyTorch that this project uses, and what takes its place where a PyTorch lacks it.

PyTorch promises to keep none of these names. Each is looked up and tried once, when this module is imported. Where a
name is missing, or the trial raises, a public and slower way takes its place. Where there is no public way, the feature
that needs the name is off, and :data:`FEATURES_OFF` says so. docs/private-names.md has the table. No other file names
anything private of PyTorch, apart from four methods of ``nn.Module`` that layers override.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial, reduce
from importlib import import_module
from operator import attrgetter, contains
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction

FEATURES_OFF: dict[str, str] = {}  # what does not work on this PyTorch, by the name that is missing


def _tried(name: str, trial: Callable[[Any], object], feature: str = "") -> Any:
    """The object called ``torch.<name>``, or None where it is missing or ``trial`` of it raises.

    Args:
        feature: what is off then; empty where a slower way has the same results.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):  # whatever the importer is within
            found = reduce(_member, name.split("."), torch)
            trial(found)
    except Exception:  # whatever a changed signature makes of the trial
        if feature:
            FEATURES_OFF[f"torch.{name}"] = feature
        return None
    return found


def _member(holder: Any, name: str) -> Any:
    if not hasattr(holder, name) and isinstance(holder, ModuleType):
        import_module(f"{holder.__name__}.{name}")
    return getattr(holder, name)


# What every call of a layer asks is no function of Python, but one of C, where PyTorch has what it takes.

# -- calls that repeat -------------------------------------------------------------------------------------------------


def _guard(guards: Any, x: Tensor, operands: Sequence[Tensor]) -> Callable[..., bool]:
    sizes = [[None] * (x.dim() - 1) + [x.shape[-1]], *(list(tensor.shape) for tensor in operands)]
    strides = [[None] * x.dim(), *(list(tensor.stride()) for tensor in operands)]
    return guards(x, *operands, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _try_guards(guards: Any) -> None:
    x, other = torch.ones(2, 3), torch.ones(3)
    check = _guard(guards, x, [other])
    if not check(x, other) or not check(torch.ones(5, 3), other) or check(torch.ones(2, 4), other):
        raise RuntimeError("another meaning")


# torch.compile asks these before it runs a graph again. Without them every call is checked in Python.
_tensor_guards = _tried("_C._dynamo.guards.TensorGuards", _try_guards)


def can_guard() -> bool:
    """Whether :func:`guard` works here."""
    return _tensor_guards is not None


def guard(x: Tensor, operands: Sequence[Tensor]) -> Callable[..., bool]:
    """A function, to be called as ``found(x, *operands)``, that says whether the tensors are still what they are now.

    It compares the type, dtype, device, layout and ``requires_grad`` of every tensor; the sizes and strides of the
    ``operands``; the number of dimensions and the last size of ``x``. It also compares whether autocast, inference
    mode, ``torch.func`` transforms and dispatch modes are on. It does not see forward-mode AD.
    """
    return _guard(_tensor_guards, x, operands)


# -- the backward pass -------------------------------------------------------------------------------------------------

_REPEATS = (
    "a forward pass that activation checkpointing repeats takes the path of today, not that of its first run: keep the "
    "paths until backward is done"
)
# The engine calls one of these for a custom function; newer versions of PyTorch have two.
_ENTRIES = {
    getattr(BackwardCFunction, name).__code__ for name in ("apply", "apply_boxed") if hasattr(BackwardCFunction, name)
}
_STARTS = {getattr(start, "__code__", None) for start in (torch.autograd.backward, torch.autograd.grad)}


def _sequence_number(node: Any) -> int:
    return node._sequence_nr()


_current_node = _tried("_C._current_autograd_node", lambda find: find(), _REPEATS)
_next_number = _tried("_C._autograd._get_sequence_nr", lambda find: find() + 1, _REPEATS)
_numbered = _tried("ones", lambda ones: _sequence_number(ones((), requires_grad=True).exp().grad_fn) + 1)
if _numbered is None:
    FEATURES_OFF["torch.autograd.graph.Node._sequence_nr"] = _REPEATS
_hooks_on_top = _tried("_C._autograd._top_saved_tensors_default_hooks", lambda find: find(True))


def _task_on_the_stack() -> int:
    return 0 if any(frame.f_code in _STARTS or frame.f_code in _ENTRIES for frame in _frames()) else NO_TASK


# The number of the backward pass that the engine of autograd runs in this thread, NO_TASK outside of backward. No
# function of Python where there is another: it is asked at every call of a layer.
NO_TASK = -1
graph_task: Callable[[], int] = _tried("_C._current_graph_task_id", lambda find: find() + 1) or _task_on_the_stack


def in_backward() -> bool:
    """Whether the engine of autograd is running in this thread."""
    return graph_task() != NO_TASK


def _frames() -> Iterable[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def repeated_node() -> int | None:
    """The number of the autograd node for which backward runs forward again; None outside of backward, and at its end.

    A thread numbers its nodes in the order in which it makes them, so the number tells when the first run was. A
    reentrant checkpoint runs a backward pass of its own inside backward, over nodes that it has just made. The first
    run made the outermost custom function on the stack.
    """
    if not in_backward() or _current_node is None or not _can_number():
        return None
    node = _current_node()
    for frame in _frames():
        if frame.f_code in _ENTRIES:
            node = frame.f_locals["self"]
    return None if node is None else _sequence_number(node)


def next_node() -> int:
    """The number of the next autograd node that this thread makes; 0 where nodes cannot be numbered."""
    return _next_number() if _can_number() else 0


def _can_number() -> bool:
    return _next_number is not None and _numbered is not None


# The saved-tensor hooks (checkpointing, offloading) in force, None if there are none; not None where it cannot be told.
hooks_on_top: Callable[[], object] = (lambda: True) if _hooks_on_top is None else partial(_hooks_on_top, True)


# -- what an operation keeps for its own backward pass -----------------------------------------------------------------

Made = tuple[str, tuple[Any, ...], Any]
Reader = Callable[[Any], Made | None]


def _of_gelu(node: Any) -> Made | None:
    if node._raw_saved_self.unpack_hook is not None:
        return None
    return "gelu", (node._saved_self,), node._saved_approximate


def _of_norm(node: Any) -> Made | None:
    if node._raw_saved_input.unpack_hook is not None:
        return None
    statistics = node._saved_result1, node._saved_result2
    tensors = node._saved_input, *statistics, node._saved_weight, node._saved_bias
    return "layer norm", tensors, node._saved_normalized_shape


def _try_maker(kind: Callable[..., torch.nn.Module], read: Reader, *arguments: int) -> None:
    h, operation = torch.ones(2, 3, requires_grad=True).exp(), kind(*arguments)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        hooked = operation(h).grad_fn
    made = read(operation(h).grad_fn)
    if read(hooked) is not None or made is None or made[1][0] is not h:
        raise RuntimeError("another meaning")
    _makers[type(hooked)] = made[0], read


_makers: dict[type, tuple[str, Reader]] = {}  # the operation and what reads its node, by the type of the node
_tried("nn.GELU", lambda kind: _try_maker(kind, _of_gelu))
_tried("nn.LayerNorm", lambda kind: _try_maker(kind, _of_norm, 3))


def made_from(x: Tensor, operations: Container[str]) -> Made | None:
    """What made x, if that is one of ``operations``; what autograd keeps for its backward pass; what else defines it.

    ``("gelu", (h,), approximate)``, ``("layer norm", (h, mean, rstd, weight, bias), normalized_shape)``, where these
    tensors are kept as they are, without hooks, and have not been changed in place since; else None, and None for a
    subclass of tensors. Whether x has been changed since is not asked.
    """
    node = x.grad_fn
    maker = _makers.get(type(node))
    if maker is None or maker[0] not in operations or type(x) is not Tensor:
        return None
    try:
        return maker[1](node)
    except RuntimeError:  # a tensor was changed in place, or a backward pass has released it
        return None


# -- modes and kinds of tensors ----------------------------------------------------------------------------------------

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")
_any_autocast = _tried("_C._is_any_autocast_enabled", lambda find: find())
_transforms = _tried(
    "_C._are_functorch_transforms_active", lambda find: find(), "torch.func transforms raise PyTorch's own error"
)
_level = _tried("autograd.forward_ad._current_level", lambda level: level + 0)
_batched = _tried("_C._functorch.is_batchedtensor", lambda find: find(torch.ones(())))
_legacy_batched = _tried("_C._functorch.is_legacy_batchedtensor", lambda find: find(torch.ones(())))
_fake = _tried("_subclasses.fake_tensor.FakeTensor", lambda kind: isinstance(torch.ones(()), kind))
_version = _tried("Tensor._version", lambda version: version.__get__(torch.ones(())) + 0)
_view = _tried("ops.aten._unsafe_view", lambda view: view(torch.ones(2, 3), (6,)))
_foreach_copy = _tried("_foreach_copy_", lambda copy: copy([torch.ones(2)], [torch.ones(2)]))


def _autocasts(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # a type of device that this PyTorch does not know
        return False


def _autocasts_anywhere() -> bool:
    return any(map(_autocasts, _AUTOCAST_DEVICES))


# Whether autocast is active for any type of device.
autocast_is_on: Callable[[], bool] = _autocasts_anywhere if _any_autocast is None else _any_autocast


def transforms_are_active() -> bool:
    """Whether a ``torch.func`` transform runs."""
    return _transforms is not None and _transforms()


def _tried_level() -> int:
    try:
        forward_ad.make_dual(torch.ones(()), torch.ones(()))
    except RuntimeError:  # no level
        return -1
    return 0


# The level of forward-mode AD that has been entered, -1 if none has.
forward_level: Callable[[], int] = _tried_level if _level is None else partial(attrgetter("_current_level"), forward_ad)


def forward_mode_is_on() -> bool:
    """Whether a level of forward-mode AD has been entered. torch.compile can trace it, unlike :data:`forward_level`."""
    return (forward_level() if _level is None else forward_ad._current_level) >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap has batched the tensor."""
    if _batched is not None and _legacy_batched is not None:
        return _legacy_batched(tensor) or _batched(tensor)
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # only wrappers have none
        return True
    return False


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a fake tensor, which has no memory."""
    return isinstance(tensor, _fake) if _fake is not None else type(tensor).__name__ == "FakeTensor"


# The number of changes in place that a tensor has seen; None where that cannot be told.
version_of: Callable[[Tensor], int | None] = (lambda _: None) if _version is None else attrgetter("_version")


def _copied(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return tensor.reshape(tuple(shape)).clone()


# A view that autograd does not track as one: a successor such as ``ReLU(inplace=True)`` may overwrite it.
unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = _copied if _view is None else _view


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy every source into its target."""
    if _foreach_copy is not None:
        _foreach_copy(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)


# -- the environment ---------------------------------------------------------------------------------------------------


def watched(variable: str) -> Callable[[], bool]:
    """A function that says whether an environment variable is set. ``os.environ`` itself takes a microsecond for it."""
    try:
        key, values = os.environ.encodekey(variable), os.environ._data  # type: ignore[attr-defined]
        assert (key in values) == (variable in os.environ)
    except Exception:
        return lambda: variable in os.environ
    return partial(contains, values, key)


# -- modules: objects with the attributes of a torch.nn.Module ---------------------------------------------------------

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_COMPILED = "_compiled_call_impl"


for _name in (*_CALL_HOOKS, *_STATE_HOOKS, _COMPILED):
    if not hasattr(torch.nn.Module(), _name):
        FEATURES_OFF[f"torch.nn.Module.{_name}"] = "a layer that uses it is adapted and loses it"


def has_call_hooks(module: Any) -> bool:
    """Whether calling the module runs hooks."""
    return any(getattr(module, name, None) for name in _CALL_HOOKS)


def has_state_hooks(module: Any) -> bool:
    """Whether saving or loading the module's state dict runs hooks."""
    return any(getattr(module, name, None) for name in _STATE_HOOKS)


def is_compiled_in_place(module: Any) -> bool:
    """Whether ``module.compile()`` has been called."""
    return getattr(module, _COMPILED, None) is not None


def _named_parameters(module: Any) -> dict[str, Any]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))


# The module's own parameters by name, with None for those that are registered as absent where that can be told.
held_parameters: Callable[[Any], dict[str, Any]] = _named_parameters
if hasattr(torch.nn.Module(), "_parameters"):
    held_parameters = attrgetter("_parameters")  # no function of Python: it is asked at every call of a layer


def children_of(module: Any) -> list[tuple[str, Any]]:
    """The module's own children by name, each as often as it stands there (``named_children`` has each once)."""
    held = getattr(module, "_modules", None)
    if held is None:
        named = module.named_modules(remove_duplicate=False)
        return [(name, child) for name, child in named if name and "." not in name]
    return [(name, child) for name, child in held.items() if child is not None]


# Those of PyTorch, and the class that batch norms of others derive from, where it is there.
_batch_norm = _tried("nn.modules.batchnorm._BatchNorm", lambda kind: isinstance(None, kind))
_PUBLIC = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "LazyBatchNorm1d", "LazyBatchNorm2d")
BATCH_NORMS = (*(getattr(torch.nn, name) for name in _PUBLIC), *([] if _batch_norm is None else [_batch_norm]))

# The wrappers of PyTorch: where each type stands, and the child that it is around. A type that is no longer there is
# not recognised, and names of parameters keep its part.
WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
)
COMPILED = WRAPPERS[0]


def warn_of_features_off() -> None:
    """Warn, once for each, of what does not work on this PyTorch."""
    for name, feature in FEATURES_OFF.items():
        warnings.warn(f"PyTorch {torch.__version__} has no {name}: {feature}", RuntimeWarning, stacklevel=3)
