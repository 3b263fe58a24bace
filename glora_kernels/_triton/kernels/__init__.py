"""The Triton kernels: each in a file with its equations and the function that launches it.

M tokens, N outputs, K inputs, R rank. dX is the gradient of X, ``*`` multiplies elements. The names in all kernels:

    x (M, K)    y, dy (M, N)    W0, W_eff, dW (N, K)    b0, b_eff, db, D, E (N,)    c, dc (K,)
    A hadamard  Ad (N, R), Au (R, K);  or a vector a (N,);  or a constant
    A matmul    Ad (K, R), Au (R, K);  or a vector a (K,);  or a constant;  V = W0 Ad (N, R)
    B           Bd (N, R), Bu (R, K);  or a vector (N,);  or a constant
    C           Cd (K, R), Cu (R, 1);  or a vector c (K,)

A constant is passed as a vector of stride 0, an absent tensor as None: the flags keep a kernel from reading it.
A *slice* is the partial sum that one program, or one block of tokens, rows or columns, stores. All slices of a backward
pass lie in one buffer, in fp32 (fp64 for fp64 layers); those of a gradient begin at its ``at_...`` (see run.py).
"""
