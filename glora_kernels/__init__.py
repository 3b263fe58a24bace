"""GLoRA on tensors: the adapted linear layer, its gradients and its merge.

Knows tensors, never modules or configurations. Importing it loads no Triton and starts no CUDA.
"""

from . import reference
from .assembly import glora_assemble
from .blocked import RowBlocks, blocked_linear, terms_of_rows
from .configuration import encode
from .convolution import configured_conv2d, glora_conv2d
from .dispatch import available_backends, use_backend
from .ops import glora_linear, glora_merge
from .plan import Explanation, explain
from .prepared import PreparedLinear, can_prepare
from .registered import configured_linear, takes_operator
from .terms import Constant, LowRank, Terms, Vector

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
    "can_prepare",
    "configured_conv2d",
    "configured_linear",
    "encode",
    "explain",
    "glora_assemble",
    "glora_conv2d",
    "glora_linear",
    "glora_merge",
    "reference",
    "takes_operator",
    "terms_of_rows",
    "use_backend",
]
