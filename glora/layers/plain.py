"""Plain modules: the name of their type, and whether they are nothing more than it."""

from __future__ import annotations

from types import MethodType

from torch import nn

from glora_kernels.torch_private import has_call_hooks, has_state_hooks, held_parameters, is_compiled_in_place


def require_plain(argument: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise TypeError if ``module`` is not exactly a ``kind``, or something on it would be lost by replacing it."""
    if type(module) is not kind:
        raise TypeError(f"{argument}: expected exactly {qualified_name(kind)}, got {qualified_name(type(module))}")
    if not is_bare(module) or "weight" not in held_parameters(module):
        raise TypeError(f"{argument}: expected one without hooks, pruning or weight norm; they would be lost")
    if _holds_more(module):
        raise TypeError(
            f"{argument}: expected one with a weight and a bias alone and without hooks on its state dict, got more, "
            "which would be lost"
        )
    if is_compiled_in_place(module):
        raise TypeError(
            f"{argument}: expected one that is not compiled yet, which would be lost; compile it afterwards"
        )


def is_bare(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the forward of its class and nothing else: no hooks, no wrapper."""
    if has_call_hooks(module):
        return False
    # accelerate leaves behind the class's own forward when it takes its hooks away
    return "forward" not in vars(module) or module.forward == MethodType(type(module).forward, module)


def qualified_name(kind: type) -> str:
    """The name to import ``kind`` by."""
    module = "torch.nn" if getattr(nn, kind.__name__, None) is kind else kind.__module__
    return f"{module}.{kind.__qualname__}"


def _holds_more(module: nn.Module) -> bool:
    """Whether a module of PyTorch's own has tensors, children or hooks that its class does not give it."""
    if not type(module).__module__.startswith("torch.nn."):
        return False
    others = {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    others |= {name for name, _ in module.named_buffers(recurse=False)} | set(dict(module.named_children()))
    return bool(others) or has_state_hooks(module)
