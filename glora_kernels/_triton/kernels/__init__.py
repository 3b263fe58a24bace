"""The Triton kernels: each in a file with its equations. What each is given: ``planning/forward.py`` and ``passes.py``.

M tokens, N outputs, K inputs, R rank. dX is the gradient of X, ``*`` multiplies elements. The names in all kernels:

    x (M, K)    y, dy (M, N)    W0, W_eff, dW (N, K)    b0, b_eff, db, D, E (N,)    c, dc (K,)
    A hadamard  Ad (N, R), Au (R, K);  or a vector a (N,);  or a constant
    A matmul    Ad (K, R), Au (R, K);  or a vector a (K,);  or a constant;  V = W0 Ad (N, R)
    B           Bd (N, R), Bu (R, K);  or a vector (N,);  or a constant
    C           Cd (K, R), Cu (R, 1);  or a vector c (K,)

A constant is passed as a vector of stride 0. What differs from path to path is a run-time number wherever that costs
little, so that many paths share a build: an absent A or B is a vector of rank 0, a sum that nobody wants lies at
UNWANTED, and ``has_d`` and the like say what else is there. A pointer that is then not read is a stand-in of the same
type (planning/operands.py); where a constant keeps a kernel from reading, it is None.
A *slice* is the partial sum that one program, or one block of tokens, rows or columns, stores. All slices of a backward
pass lie in one buffer, in fp32 (fp64 for fp64 layers); those of a gradient begin at its ``at_...`` (planning/sums.py).
"""

from .assemble import assemble_kernel
from .contract import contract_kernel
from .finish import finish_kernel
from .fused import fused_kernel
from .token_pass import token_pass_kernel
from .weight_pass import weight_pass_kernel

KERNELS = {
    "assemble": assemble_kernel,
    "fused": fused_kernel,
    "token_pass": token_pass_kernel,
    "weight_pass": weight_pass_kernel,
    "contract": contract_kernel,
    "finish": finish_kernel,
}
