"""The optional CUDA extension ``glora_kernels._C`` of csrc/; everything else is in pyproject.toml.

The environment variable GLORA_BUILD_CUDA decides: ``auto`` (default) builds it where a CUDA build of PyTorch, nvcc and
its headers, a C++ compiler and Python's headers are found, and otherwise says in one line why it does not; ``0``
never builds it; ``1`` fails if something is missing. No GPU is needed: it is built for TORCH_CUDA_ARCH_LIST, by
default for ARCHITECTURES.
"""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import setup

ARCHITECTURES = "8.0;9.0a;10.0+PTX"
SOURCES = ("autograd.cpp", "bindings.cpp", "cuda.cu", "host.cpp", "launch.cpp", "layer.cpp", "plan.cpp")


def cuda_home():
    """The folder of the CUDA toolkit, with nvcc and the headers, or None."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parent.parent]
    for folder in [*candidates, "/usr/local/cuda"]:
        if folder and (Path(folder) / "bin/nvcc").is_file() and (Path(folder) / "include/cuda_runtime.h").is_file():
            return Path(folder)
    return None


def missing():
    """What is missing to build the extension, or None."""
    try:
        import torch
    except ImportError:
        return "PyTorch cannot be imported by this build (pip builds apart from it without --no-build-isolation)"
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    home = cuda_home()
    if home is None:
        return "no CUDA toolkit with nvcc and headers is on the PATH, in CUDA_HOME or in /usr/local/cuda"
    told = subprocess.run([home / "bin/nvcc", "--version"], check=False, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", told)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc of {home} is of CUDA {release[1] if release else '?'}, this PyTorch of {torch.version.cuda}"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler} is not there"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the headers of Python are not there"
    return None


def extension():
    """The arguments of setup() that build the extension."""
    os.environ["CUDA_HOME"] = str(cuda_home())
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    built = CUDAExtension(
        "glora_kernels._C",
        [f"csrc/{name}" for name in SOURCES],
        define_macros=[("GLORA_WITH_CUDA", None)],
        extra_compile_args={"cxx": ["-O3"], "nvcc": ["-O3"]},
    )
    return {"ext_modules": [built], "cmdclass": {"build_ext": BuildExtension}}


def chosen():
    """The arguments of setup() that GLORA_BUILD_CUDA asks for."""
    choice = os.environ.get("GLORA_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"GLORA_BUILD_CUDA: expected auto, 0 or 1, got {choice!r}")
    reason = None if choice == "0" else missing()
    if choice == "1" and reason is not None:
        raise SystemExit(f"GLORA_BUILD_CUDA=1: {reason}")
    if reason is not None:
        print(f"glora: the CUDA extension is not built: {reason}")
    return {} if choice == "0" or reason is not None else extension()


if __name__ == "__main__":
    setup(**chosen())
