"""Choosing a backend: explicit choices are honoured or raise, automatic ones say why."""

import threading

import pytest
import torch

from glora_kernels import available_backends, explain, glora_linear, use_backend
from glora_kernels.dispatch import decide
from tests.helpers import make_call

CALL = ("vector", "lora_1", "vector", "vector", "vector")


def test_auto_is_torch_on_a_cpu():
    assert decide().backend == "torch"
    assert available_backends()["torch"] is None


def test_innermost_choice_wins(monkeypatch):
    monkeypatch.setenv("GLORA_BACKEND", "reference")
    assert decide() == ("reference", "chosen by GLORA_BACKEND")
    with use_backend("torch"):
        assert decide() == ("torch", "chosen by use_backend")
        with use_backend("reference"):
            assert decide().backend == "reference"
        assert decide().backend == "torch"
        with use_backend("auto"):
            assert decide().backend == "torch"
    assert decide().backend == "reference"


def test_choice_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert decide().backend == "torch"


def test_choice_belongs_to_its_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(decide().backend))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_both_backends_compute_the_same():
    call = make_call(CALL)
    with use_backend("reference"):
        want = glora_linear(*call)
    torch.testing.assert_close(glora_linear(*call), want)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_unavailable_backend_raises(name, monkeypatch):
    with pytest.raises(RuntimeError, match=rf"use_backend: backend '{name}' is not available .* available: \["):
        use_backend(name).__enter__()
    monkeypatch.setenv("GLORA_BACKEND", name)
    with pytest.raises(RuntimeError, match=f"GLORA_BACKEND: backend '{name}' is not available"):
        glora_linear(*make_call(CALL))


def test_unknown_backend_raises(monkeypatch):
    with pytest.raises(ValueError, match=r"use_backend: expected one of .* got 'numpy'"):
        use_backend("numpy").__enter__()
    monkeypatch.setenv("GLORA_BACKEND", "numpy")
    with pytest.raises(ValueError, match="GLORA_BACKEND: expected one of"):
        glora_linear(*make_call(CALL))


def test_choice_that_cannot_be_honoured_raises():
    x, *rest = make_call(CALL)
    with use_backend("torch"), pytest.raises(RuntimeError, match=r"'torch' cannot be used here .*torch.func"):
        torch.func.vmap(lambda row: glora_linear(row, *rest))(x)


def test_compiled_without_a_graph_break():
    call = make_call(("lora_3", "lora_1", "vector", "vector", "vector"), dtype=torch.float32)
    compiled = torch.compile(glora_linear, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*call), glora_linear(*call))


def test_explain_says_which_and_why():
    text = str(explain(*make_call(CALL, (100, 70, 80))))
    assert "backend   torch" in text
    assert "reads da from the output" in text
    with use_backend("reference"):
        assert explain(*make_call(CALL)).reason == "chosen by use_backend"
