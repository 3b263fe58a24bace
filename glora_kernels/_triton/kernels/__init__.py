"""The Triton kernels: each in a file with its equations and the function that launches it."""
