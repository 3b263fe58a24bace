"""GLoRA on tensors: the adapted linear layer, its gradients and its merge.

Knows tensors, never modules or configurations. Importing it loads no Triton and starts no CUDA.
"""

from . import reference
from ._torch.passes import fault as cpu_passes_fault
from .builds import builds_for
from .dispatch import available_backends, use_backend
from .ops.assembly import glora_assemble
from .ops.convolution import configured_conv2d, glora_conv2d
from .ops.explain import Explanation, explain
from .ops.linear import glora_linear, glora_merge
from .ops.operators import configured_linear, takes_operator
from .ops.path_masks import masked_terms, path_masks, row_scaled_terms, storages_read
from .ops.prepared import PreparedLinear, can_prepare
from .ops.recompute import recompute_inputs
from .ops.row_blocks import RowBlocks, blocked_linear, terms_of_rows
from .ops.row_scaled import row_scaled_linear
from .path_encoding import encode
from .terms import Constant, LowRank, Terms, Vector
from .torch_private import warn_of_features_off

__all__ = [
    "Constant",
    "Explanation",
    "LowRank",
    "PreparedLinear",
    "RowBlocks",
    "Terms",
    "Vector",
    "available_backends",
    "blocked_linear",
    "builds_for",
    "can_prepare",
    "configured_conv2d",
    "configured_linear",
    "cpu_passes_fault",
    "encode",
    "explain",
    "glora_assemble",
    "glora_conv2d",
    "glora_linear",
    "glora_merge",
    "masked_terms",
    "path_masks",
    "recompute_inputs",
    "reference",
    "row_scaled_linear",
    "row_scaled_terms",
    "storages_read",
    "takes_operator",
    "terms_of_rows",
    "use_backend",
]

warn_of_features_off()
