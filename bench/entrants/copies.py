"""Copies of a backbone that hold the same weights."""

import copy

from torch import nn


def sharing(backbone: nn.Module) -> nn.Module:
    """A copy that shares the parameters of ``backbone``, so that all have W0 in the cache, or none."""
    return copy.deepcopy(backbone, {id(parameter): parameter for parameter in backbone.parameters()})
