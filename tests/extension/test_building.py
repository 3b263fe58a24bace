"""csrc/ compiled for GPUs, and what setup.py does where it cannot be."""

import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from glora_kernels import _cuda, available_backends, use_backend

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {"compute_80": "sm_80", "compute_90a": "sm_90a", "compute_100": "sm_100"}


def setup(choice, path=None):
    """What ``setup.py`` says under GLORA_BUILD_CUDA, and its exit status; with nothing to build."""
    environment = {**os.environ, "GLORA_BUILD_CUDA": choice, "GLORA_BUILD_CPU": "0", "PYTHONWARNINGS": "ignore"}
    if path is not None:
        environment.update(PATH=path, CUDA_HOME="/nowhere")
    code = "import setup; setup.chosen()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def no_toolkit(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("glora_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("GLORA_BUILD_CPU", "0")
    monkeypatch.setattr(module, "cuda_home", lambda: None)
    return module


def test_an_unknown_choice_is_refused():
    status, said = setup("yes")
    assert status != 0
    assert "GLORA_BUILD_CUDA: expected auto, 0 or 1, got 'yes'" in said


def test_nothing_is_built_where_that_is_chosen():
    assert setup("0") == (0, "")


def test_without_a_toolkit_auto_says_why_in_one_line(no_toolkit, monkeypatch, capsys):
    monkeypatch.delenv("GLORA_BUILD_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert no_toolkit.chosen() == {}
    said = capsys.readouterr().out
    assert said.startswith("glora: the CUDA extension is not built: no CUDA toolkit") and said.count("\n") == 1


def test_without_a_toolkit_one_fails(no_toolkit, monkeypatch):
    monkeypatch.setenv("GLORA_BUILD_CUDA", "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(SystemExit, match=r"GLORA_BUILD_CUDA=1: no CUDA toolkit with nvcc and headers"):
        no_toolkit.chosen()


def test_a_pytorch_without_cuda_is_told(no_toolkit, monkeypatch, capsys):
    monkeypatch.delenv("GLORA_BUILD_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert no_toolkit.chosen() == {}
    assert "this PyTorch has no CUDA" in capsys.readouterr().out


@pytest.fixture
def toolkit(no_toolkit, monkeypatch, tmp_path):
    """As where there is an nvcc of PyTorch's release."""
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho release 13.0,\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(no_toolkit, "cuda_home", lambda: tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CXX", sys.executable)  # any program: it is looked for, not run
    return no_toolkit


def test_a_compiler_that_is_not_there_is_told(toolkit, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    monkeypatch.delenv("GLORA_BUILD_CUDA", raising=False)
    assert toolkit.chosen() == {}
    assert capsys.readouterr().out.endswith("the C++ compiler no-such-compiler is not there\n")
    monkeypatch.setenv("GLORA_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="GLORA_BUILD_CUDA=1: the C\\+\\+ compiler no-such-compiler is not there"):
        toolkit.chosen()


def test_headers_of_python_that_are_not_there_are_told(toolkit, monkeypatch, tmp_path):
    monkeypatch.setattr(toolkit.sysconfig, "get_path", lambda name: str(tmp_path))
    assert toolkit.missing_for_cuda() == toolkit.missing_for_cpu() == "the headers of Python are not there"
    (tmp_path / "Python.h").touch()
    assert toolkit.missing_for_cuda() is None


def test_the_passes_for_cpus_need_gcc(no_toolkit, monkeypatch, capsys, tmp_path):
    clang = tmp_path / "clang++"
    clang.write_text("#!/bin/sh\necho '#define __GNUC__ 4'; echo '#define __x86_64__ 1'; echo '#define __clang__ 1'\n")
    clang.chmod(0o755)
    monkeypatch.setenv("GLORA_BUILD_CUDA", "0")
    monkeypatch.setenv("GLORA_BUILD_CPU", "auto")
    monkeypatch.setenv("CXX", str(clang))
    assert no_toolkit.chosen() == {}
    said = f"the C++ compiler {clang} is not GCC for x86-64"
    assert capsys.readouterr().out == f"glora: the passes for CPUs are not built: {said}\n"
    monkeypatch.setenv("GLORA_BUILD_CPU", "1")
    with pytest.raises(SystemExit, match=re.escape(f"GLORA_BUILD_CPU=1: {said}")):
        no_toolkit.chosen()
    clang.write_text("#!/bin/sh\necho '#define __GNUC__ 12'; echo '#define __x86_64__ 1'\n")
    [module] = no_toolkit.chosen()["ext_modules"]
    assert (module.name, module.sources, module.optional) == ("glora_kernels._cpu", ["csrc/cpu.cpp"], False)


def test_a_module_that_does_not_compile_is_left_out_unless_asked_for(no_toolkit, monkeypatch, capsys):
    from setuptools import Distribution
    from torch.utils.cpp_extension import BuildExtension

    def fail(self, extension):
        raise RuntimeError("Error compiling objects for extension\nand more")

    monkeypatch.setattr(BuildExtension, "build_extension", fail)
    monkeypatch.setitem(no_toolkit.MODULES, "GLORA_BUILD_CPU", ("", lambda: None, no_toolkit.cpu_extension))
    monkeypatch.setenv("GLORA_BUILD_CUDA", "0")
    for choice in ("auto", "1"):
        monkeypatch.setenv("GLORA_BUILD_CPU", choice)
        arguments = no_toolkit.chosen()
        [module], build = arguments["ext_modules"], arguments["cmdclass"]["build_ext"](Distribution())
        if choice == "auto":
            build.build_extension(module)
            said = capsys.readouterr().out
            assert said == "glora: glora_kernels._cpu is not built: Error compiling objects for extension\n"
        else:
            with pytest.raises(RuntimeError, match="Error compiling"):
                build.build_extension(module)


@pytest.mark.parametrize("said", ["release 12.8, V12.8.93", "nonsense"])
def test_an_nvcc_of_another_release_is_told(toolkit, said):
    (toolkit.cuda_home() / "bin/nvcc").write_text(f"#!/bin/sh\necho {said}\n")
    assert re.fullmatch(r"nvcc of .* is of CUDA (12|\?), this PyTorch of 13\.0", toolkit.missing_for_cuda())


def test_an_extension_that_is_not_there_is_said_how_to_build(monkeypatch):
    monkeypatch.setattr(_cuda.extension, "find_spec", lambda name: None)
    _cuda.fault.cache_clear()
    try:
        assert "GLORA_BUILD_CUDA=1 pip install --no-build-isolation -e ." in available_backends()["cuda"]
        with pytest.raises(RuntimeError, match=r"backend 'cuda' is not available \(the extension is not built"):
            use_backend("cuda").__enter__()
    finally:
        _cuda.fault.cache_clear()


def test_an_extension_of_another_pytorch_is_told(monkeypatch):
    def fail():
        raise ImportError("undefined symbol")

    monkeypatch.setattr(_cuda.extension, "find_spec", lambda name: object())
    monkeypatch.setattr(_cuda.extension, "load", fail)
    _cuda.fault.cache_clear()
    try:
        assert "may have been built for another PyTorch (undefined symbol)" in available_backends()["cuda"]
    finally:
        _cuda.fault.cache_clear()


@pytest.fixture(scope="module")
def compiled():
    """The kernels' object file, for every architecture, kept in build/ for these sources."""
    nvcc, objdump = shutil.which("nvcc"), _cuobjdump()
    if nvcc is None or objdump is None:
        pytest.skip(f"no {'nvcc' if nvcc is None else 'cuobjdump'} here: the kernels of csrc/ are not compiled")
    content = b"".join(file.read_bytes() for file in sorted((ROOT / "csrc").iterdir()))
    file = ROOT / "build" / f"kernels-{zlib.crc32(content):08x}-{torch.__version__}.o"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        headers = Path(torch.__file__).parent / "include"
        codes = [f"-gencode=arch={virtual},code={real}" for virtual, real in ARCHITECTURES.items()]
        started = file.with_suffix(".part.o")
        command = [nvcc, "-std=c++17", "-O3", f"-I{headers}", *codes, "-c", ROOT / "csrc/cuda.cu", "-o", started]
        subprocess.run(command, check=True, capture_output=True, text=True)
        started.rename(file)
    return objdump, file


def _cuobjdump():
    """The toolkit's, or the one that Triton comes with."""
    try:
        import triton

        shipped = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    except ImportError:
        shipped = Path("/nowhere")
    return shutil.which("cuobjdump") or (str(shipped) if shipped.is_file() else None)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values())
def test_kernels_compile_without_spills(compiled, architecture):
    objdump, file = compiled
    command = [objdump, "--dump-resource-usage", "--gpu-architecture", architecture, str(file)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    # two widths of assembly, two passes of contraction, for three types
    assert len({name for name, *_ in usage}) == 3 * 4, told
    spilling = [name for name, _, stack, local in usage if int(stack) or int(local)]
    assert not spilling


def test_kernels_take_vectors_of_memory_and_no_atomics(compiled):
    objdump, file = compiled
    code = subprocess.run([objdump, "--dump-sass", str(file)], check=True, capture_output=True, text=True).stdout
    assert "LDG.E.128" in code and "STG.E.128" in code
    assert not re.search(r"\b(RED|ATOM)[.G ]", code)
