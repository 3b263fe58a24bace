"""Which modules of a model are its heads: usually fresh in fine-tuning, so they train in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..layers.packages import loaded
from .wrappers import named_modules

# Names of heads, by place. Some models of Transformers call a pooling layer "head", so IN_TRANSFORMERS lacks it.
ANYWHERE = ("head", "head_dist", "classifier", "lm_head")  # anywhere in a model
IN_TRANSFORMERS = ("classifier", "lm_head", "score", "qa_outputs", "classification_head")  # children of such a model
IN_A_WHOLE_MODEL = (*ANYWHERE, *IN_TRANSFORMERS, "heads")  # children of any other whole model
IN_TORCHVISION = ("aux1", "aux2", "AuxLogits", "aux_classifier", "box_predictor", "mask_predictor")  # torchvision's
TASK_ENDS = ("head", "classifier", "fc")  # ends of names, in a Transformers model for a task without a base model


def find_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost heads of ``model`` that have parameters, by name without wrappers.

    A head is

    - what ``get_classifier()`` of a timm model returns (two modules for a distilled one);
    - in a Transformers model, a module beside its ``base_model``, and its ``get_output_embeddings()``; in one for a
      task without a base model, a child whose name ends in ``head``, ``classifier`` or ``fc``;
    - in models of torchvision, the last linear layer of ``classifier``, auxiliary classifiers and box predictors;
    - a direct child of any of these, or of ``model`` itself, that has the name of a head: ``classifier``, ``lm_head``,
      ``score``, ``qa_outputs``, ``classification_head``, and outside of Transformers ``head``, ``heads``,
      ``head_dist``, or ``fc`` if it is the last one;
    - outside of Transformers models, every module named ``head``, ``head_dist``, ``classifier`` or ``lm_head``.
    """
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    found: dict[nn.Module, None] = {}
    within: set[nn.Module] = set()  # Transformers models
    whole = _innermost(model)
    for _, module in named_modules(model):
        if pretrained is not None and isinstance(module, pretrained):
            found |= dict.fromkeys([*_of_transformers(module), *_children(module, IN_TRANSFORMERS)])
            within |= set(module.modules())
        elif type(module).__module__.startswith("torchvision.models."):
            found |= dict.fromkeys(_of_torchvision(module))
        elif hasattr(module, "get_classifier"):
            found |= dict.fromkeys([*_of_timm(module), *_of_whole(module)])
        elif module is whole:
            found |= dict.fromkeys(_of_whole(module))
        elif module not in within:
            found |= dict.fromkeys(_children(module, ANYWHERE))
    heads = {next(named_modules(head))[1] for head in found}  # within their wrappers
    inner = {part for head in heads for part in head.modules() if part is not head}
    return {
        name: module
        for name, module in named_modules(model)
        # a model is no head of its own
        if name and module in heads and module not in inner and any(True for _ in module.parameters())
    }


def loose_parameters(model: nn.Module) -> set[int]:
    """The ids of bare parameters beside the base model of a Transformers model: they belong to the head too."""
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    found: list[Any] = [m for m in model.modules() if pretrained is not None and isinstance(m, pretrained)]
    return {id(p) for module in found if module.base_model is not module for p in module.parameters(recurse=False)}


def _innermost(model: nn.Module) -> nn.Module:
    """The model within wrappers and within modules that hold nothing else (such as a user's training module)."""
    module = next(named_modules(model))[1]
    holders = [part for part in (module, *module.children()) if any(True for _ in part.parameters(part is not module))]
    alone = len(holders) == 1 and holders[0] is not module and any(True for _ in holders[0].children())
    return _innermost(holders[0]) if alone else module


def _of_transformers(model: Any) -> Iterator[nn.Module]:
    base = model.base_model
    if base is not model:
        yield from (child for child in model.children() if base not in set(child.modules()))
    elif "For" in type(model).__name__:
        yield from (child for name, child in model.named_children() if name.endswith(TASK_ENDS))
    output = model.get_output_embeddings()
    if isinstance(output, nn.Module):
        yield output


def _of_torchvision(module: nn.Module) -> Iterator[nn.Module]:
    yield from _children(module, IN_TORCHVISION)
    for child in _of_whole(module):
        linears = [part for part in child.children() if isinstance(part, nn.Linear)]
        yield linears[-1] if len(linears) > 1 else child


def _of_timm(model: Any) -> Iterator[nn.Module]:
    try:
        found = model.get_classifier()
    except TypeError:  # not timm's: it takes arguments
        return
    several = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else [found]
    yield from (module for module in several if isinstance(module, nn.Module))


def _of_whole(model: nn.Module) -> list[nn.Module]:
    named = list(_children(model, IN_A_WHOLE_MODEL))
    last = [(name, child) for name, child in model.named_children() if any(True for _ in child.parameters())][-1:]
    return named or [child for name, child in last if name == "fc"]


def _children(module: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    yield from (child for name, child in module.named_children() if name in names)
