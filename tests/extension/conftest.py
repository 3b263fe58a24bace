"""The C++ of csrc/, built here: the extension for the host alone, as on a GPU but for the launches; and the passes."""

import os
import shutil
import sys
import zlib
from pathlib import Path

import pytest

from glora.files import write_atomically
from glora_kernels import use_backend
from glora_kernels._cuda import fault
from glora_kernels._torch import passes
from tests.tiers import at

ROOT = Path(__file__).parents[2]
SOURCES = ("autograd.cpp", "bindings.cpp", "host.cpp", "launch.cpp", "layer.cpp", "plan.cpp")
NAME = "glora_kernels._C"


@pytest.fixture(scope="session")
def extension():
    folder = folder_for(f"extension-{at('whole', 'parts')}")
    sources = at([whole_source(folder)], [ROOT / "csrc" / name for name in SOURCES])
    return built("_C", sources, folder, ["-O1"], extra_include_paths=[str(ROOT / "csrc")])


@pytest.fixture(scope="session")
def cpu_module():
    """The passes for CPUs, with the flags of setup.py."""
    if passes.fault() is None:  # built into the source tree; its operators cannot be registered twice
        return sys.modules[passes.NAME]
    flags = ["-O3", "-fopenmp"]
    return built("_cpu", [ROOT / "csrc/cpu.cpp"], folder_for("cpu"), flags, extra_ldflags=["-fopenmp"])


def folder_for(name):
    """Where ``name`` is built once for these sources and this PyTorch: in build/."""
    import torch

    content = b"".join(file.read_bytes() for file in sorted((ROOT / "csrc").iterdir()))
    folder = ROOT / "build" / f"{name}-{zlib.crc32(content):08x}-{torch.__version__}-{sys.version_info.minor}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def built(name, sources, folder, flags, **options):
    """The module, built unless it is there."""
    from torch.utils import cpp_extension

    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
            pytest.skip(f"no {program} here to build {name} with")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("MAX_JOBS", "2")
        warnings = ["-Wall", "-Wextra"]
        return cpp_extension.load(
            name, [str(s) for s in sources], build_directory=str(folder), extra_cflags=[*flags, *warnings], **options
        )


def whole_source(folder):
    """All sources as one file, so that PyTorch's headers, which take most of the time, are read once."""
    file = folder / "whole.cpp"
    text = "".join(f'#include "{name}"\n' for name in SOURCES)
    if not file.exists() or file.read_text() != text:  # a file written anew would be compiled anew
        write_atomically(file, lambda stream: stream.write(text.encode()))
    return file


@pytest.fixture
def backend(extension, monkeypatch):
    """Every call goes to the extension."""
    monkeypatch.setitem(sys.modules, NAME, extension)
    fault.cache_clear()
    with use_backend("cuda"):
        yield
    fault.cache_clear()


@pytest.fixture
def cpu_passes(cpu_module, monkeypatch):
    """The torch backend takes the passes for CPUs."""
    if not cpu_module.can_run():
        pytest.skip("no AVX2 here")
    monkeypatch.setitem(sys.modules, passes.NAME, cpu_module)
    passes.fault.cache_clear()
    assert passes.fault() is None
    yield
    passes.fault.cache_clear()
