"""Which modules of a model are its heads: as a rule fresh in fine-tuning, so that they train in full."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .packages import loaded
from .wrappers import named_modules

# Names of heads: anywhere in a model; among the direct children of a whole one; of a whole one of Transformers, some of
# which call a pooling layer "head".
ANYWHERE = ("head", "head_dist", "classifier", "lm_head")
IN_TRANSFORMERS = ("classifier", "lm_head", "score", "qa_outputs", "classification_head")
IN_A_WHOLE_MODEL = (*ANYWHERE, *IN_TRANSFORMERS, "heads")


def find_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The heads of ``model`` by name without wrappers, none within another, and none without parameters.

    A head is

    - what ``get_classifier()`` of a timm model returns (two modules for a distilled one);
    - of a Transformers model, what stands beside its ``base_model``, and its ``get_output_embeddings()``;
    - a direct child of any of these, of torchvision's models or of ``model`` itself that has the name of a head:
      ``classifier``, ``lm_head``, ``score``, ``qa_outputs``, ``classification_head``, and outside of Transformers
      ``head``, ``heads``, ``head_dist``, or ``fc`` if there is no other;
    - outside of Transformers models, whatever is called ``head``, ``head_dist``, ``classifier`` or ``lm_head``.
    """
    pretrained = loaded("transformers.modeling_utils", "PreTrainedModel")
    found: dict[nn.Module, None] = {}
    within: set[nn.Module] = set()  # Transformers models
    for name, module in named_modules(model):
        if pretrained is not None and isinstance(module, pretrained):
            found |= dict.fromkeys([*_of_transformers(module), *_children(module, IN_TRANSFORMERS)])
            within |= set(module.modules())
        elif hasattr(module, "get_classifier"):
            found |= dict.fromkeys([*_of_timm(module), *_of_whole(module)])
        elif not name or type(module).__module__.startswith("torchvision.models."):
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


def _of_transformers(model: Any) -> Iterator[nn.Module]:
    base = model.base_model
    if base is not model:
        yield from (child for child in model.children() if base not in set(child.modules()))
    output = model.get_output_embeddings()
    if isinstance(output, nn.Module):
        yield output


def _of_timm(model: Any) -> Iterator[nn.Module]:
    found = model.get_classifier()
    several = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else [found]
    yield from (module for module in several if isinstance(module, nn.Module))


def _of_whole(model: nn.Module) -> list[nn.Module]:
    return list(_children(model, IN_A_WHOLE_MODEL)) or list(_children(model, ("fc",)))


def _children(module: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    yield from (child for name, child in module.named_children() if name in names)
