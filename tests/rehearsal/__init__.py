"""The program of ``bench/gpu.sh`` on a machine without a GPU: each part runs over a stub of libcuda."""
