"""The extension's C++ built for the host alone: the same code but for the launches, on tensors of a CPU."""

import os
import shutil
import sys
import zlib
from pathlib import Path

import pytest

from glora.files import write_atomically
from glora_kernels import use_backend
from glora_kernels._cuda import fault
from tests.tiers import at

ROOT = Path(__file__).parents[2]
SOURCES = ("autograd.cpp", "bindings.cpp", "host.cpp", "launch.cpp", "layer.cpp", "plan.cpp")
NAME = "glora_kernels._C"


@pytest.fixture(scope="session")
def extension():
    """Built once for its sources and this PyTorch; into build/."""
    import torch
    from torch.utils import cpp_extension

    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None:
            pytest.skip(f"no {program} here to build the extension with")
    content = b"".join(file.read_bytes() for file in sorted((ROOT / "csrc").iterdir()))
    built = f"{zlib.crc32(content):08x}-{torch.__version__}-{sys.version_info.minor}"
    folder = ROOT / "build" / f"extension-{at('whole', 'parts')}-{built}"
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        patch.setenv("MAX_JOBS", "2")
        return cpp_extension.load(
            "_C",
            at([whole_source(folder)], [str(ROOT / "csrc" / name) for name in SOURCES]),
            build_directory=str(folder),
            extra_cflags=["-O1", "-Wall", "-Wextra"],
            extra_include_paths=[str(ROOT / "csrc")],
        )


def whole_source(folder):
    """All sources as one file, so that PyTorch's headers, which take most of the time, are read once."""
    file = folder / "whole.cpp"
    text = "".join(f'#include "{name}"\n' for name in SOURCES)
    if not file.exists() or file.read_text() != text:  # a file written anew would be compiled anew
        write_atomically(file, lambda stream: stream.write(text.encode()))
    return str(file)


@pytest.fixture
def backend(extension, monkeypatch):
    """Every call goes to the extension."""
    monkeypatch.setitem(sys.modules, NAME, extension)
    fault.cache_clear()
    with use_backend("cuda"):
        yield
    fault.cache_clear()
