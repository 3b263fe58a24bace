"""The optional modules of csrc/; everything else is in pyproject.toml.

``glora_kernels._C``, the CUDA extension, needs a CUDA build of PyTorch, nvcc and its headers, a C++ compiler and
Python's headers. No GPU is needed: it is built for TORCH_CUDA_ARCH_LIST, by default for ARCHITECTURES.
``glora_kernels._cpu``, passes of the torch backend for CPUs, needs GCC on x86-64, Python's headers and PyTorch.

The environment variables GLORA_BUILD_CUDA and GLORA_BUILD_CPU decide: ``auto`` (default) builds a module where that is
found, and otherwise says in one line why it does not; ``0`` never builds it; ``1`` fails if something is missing.
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


def compiler():
    """The C++ compiler as a list of arguments."""
    return shlex.split(os.environ.get("CXX") or "c++")


def missing():
    """What is missing to build either module, or None."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "PyTorch cannot be imported by this build (pip builds apart from it without --no-build-isolation)"
    if shutil.which(compiler()[0]) is None:
        return f"the C++ compiler {compiler()[0]} is not there"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the headers of Python are not there"
    return None


def missing_for_cuda():
    """What is missing to build the CUDA extension, or None."""
    if (reason := missing()) is not None:
        return reason
    import torch

    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    home = cuda_home()
    if home is None:
        return "no CUDA toolkit with nvcc and headers is on the PATH, in CUDA_HOME or in /usr/local/cuda"
    told = subprocess.run([home / "bin/nvcc", "--version"], check=False, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", told)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc of {home} is of CUDA {release[1] if release else '?'}, this PyTorch of {torch.version.cuda}"
    return None


def missing_for_cpu():
    """What is missing to build the passes for CPUs, or None."""
    if (reason := missing()) is not None:
        return reason
    told = subprocess.run(
        [*compiler(), "-dM", "-E", "-x", "c++", os.devnull], check=False, capture_output=True, text=True
    )
    macros = {line.split()[1] for line in told.stdout.splitlines()}
    if "__x86_64__" not in macros or "__GNUC__" not in macros or "__clang__" in macros:
        return f"the C++ compiler {compiler()[0]} is not GCC for x86-64"
    return None


def cuda_extension():
    """The CUDA extension."""
    os.environ["CUDA_HOME"] = str(cuda_home())
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    from torch.utils.cpp_extension import CUDAExtension

    return CUDAExtension(
        "glora_kernels._C",
        [f"csrc/{name}" for name in SOURCES],
        define_macros=[("GLORA_WITH_CUDA", None)],
        extra_compile_args={"cxx": ["-O3"], "nvcc": ["-O3"]},
    )


def cpu_extension():
    """The passes for CPUs."""
    from torch.utils.cpp_extension import CppExtension

    flags = ["-O3", "-fopenmp"]  # torch's threads are OpenMP's
    return CppExtension("glora_kernels._cpu", ["csrc/cpu.cpp"], extra_compile_args=flags, extra_link_args=["-fopenmp"])


MODULES = {
    "GLORA_BUILD_CUDA": ("the CUDA extension is", missing_for_cuda, cuda_extension),
    "GLORA_BUILD_CPU": ("the passes for CPUs are", missing_for_cpu, cpu_extension),
}


def is_chosen(variable):
    """Whether a module is to be built."""
    choice = os.environ.get(variable, "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    what, missing_for, _ = MODULES[variable]
    reason = missing_for()
    if choice == "1" and reason is not None:
        raise SystemExit(f"{variable}=1: {reason}")
    if reason is not None:
        print(f"glora: {what} not built: {reason}")
    return reason is None


def chosen():
    """The arguments of setup() that the environment asks for."""
    variables = [variable for variable in MODULES if is_chosen(variable)]
    if not variables:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Goes on without a module that was not asked for by name and cannot be compiled."""

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    raise
                print(f"glora: {extension.name} is not built: {error}".splitlines()[0])

    modules = [MODULES[variable][2]() for variable in variables]
    for variable, module in zip(variables, modules):
        module.optional = os.environ.get(variable, "auto") == "auto"
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    setup(**chosen())
