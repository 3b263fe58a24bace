"""Choosing a backend: explicit choices are honoured or raise, automatic ones say why."""

import threading
from types import SimpleNamespace

import pytest
import torch

from glora_kernels import LowRank, Terms, available_backends, dispatch, explain, glora_linear, use_backend
from tests.helpers import make_call

CALL = ("vector", "lora_1", "vector", "vector", "vector")


def decide(device="cpu", dtype=torch.float32, rank=4):
    """The decision for a layer on a device that need not be there."""
    weight = SimpleNamespace(device=torch.device(device), dtype=dtype)
    return dispatch.decide(weight, Terms(B=LowRank(torch.empty(6, 80), torch.empty(80, 5), rank)))


def test_auto_is_torch_on_a_cpu():
    assert decide().backend == "torch"
    assert available_backends()["torch"] is None


def test_innermost_choice_wins(monkeypatch):
    monkeypatch.setenv("GLORA_BACKEND", "reference")
    assert decide() == ("reference", "chosen by GLORA_BACKEND", None)
    with use_backend("torch"):
        assert decide() == ("torch", "chosen by use_backend", None)
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
    monkeypatch.setattr(dispatch, "_extension_fault", lambda: "not built")  # it may be
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


# -- Triton ----------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with a GPU of this architecture."""

    def pretend(name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(dispatch, "architecture_of", lambda device: name)
        monkeypatch.setattr(dispatch, "_triton_fault", lambda: None)

    return pretend


def test_auto_is_triton_on_a_gpu_that_has_settings(gpu):
    gpu("sm_90")
    assert decide("cuda").backend == "triton"
    assert decide("cuda", rank=64).backend == "triton"
    assert decide("cpu").backend == "torch"


@pytest.mark.parametrize(
    ("architecture", "call", "reason"),
    [
        ("sm_90", {"dtype": torch.float64}, "fp64 on a GPU is served by the torch backend"),
        ("sm_90", {"rank": 65}, "rank 65 is above 64"),
        ("sm_75", {}, "no tile settings for sm_75"),
        ("gfx1100", {}, "no tile settings for gfx1100"),
    ],
)
def test_what_triton_does_not_serve(gpu, architecture, call, reason):
    """Automatically the torch backend, and why; an explicit choice raises."""
    gpu(architecture)
    decision = decide("cuda", **call)
    assert decision.backend == "torch"
    assert reason in decision.reason
    with use_backend("triton"), pytest.raises(RuntimeError, match=rf"'triton' cannot be used here .*{reason}"):
        decide("cuda", **call)


def test_auto_does_without_a_triton_that_cannot_launch(gpu, monkeypatch):
    """Not installed, or without the C compiler that its driver needs."""
    gpu("sm_90")
    monkeypatch.setattr(dispatch, "_triton_fault", lambda: "no C compiler")
    assert decide("cuda") == ("torch", "Triton kernels do not serve this call: no C compiler", None)


def test_fake_tensors_go_to_torch():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(6, 5)
    assert dispatch.triton_unfit(weight, Terms()) == "fake tensors have no memory to launch on"


def test_strategy_goes_with_triton(gpu):
    gpu("sm_90")
    with use_backend("triton", strategy="fused"):
        assert decide("cuda") == ("triton", "chosen by use_backend", "fused")
    with pytest.raises(ValueError, match=r"strategy: expected None, or one of .* got 'fused' with 'torch'"):
        use_backend("torch", strategy="fused").__enter__()
    with pytest.raises(ValueError, match=r"strategy: expected None, or one of .* got 'magic' with 'triton'"):
        use_backend("triton", strategy="magic").__enter__()


def test_triton_on_cpu_tensors_raises(gpu):
    gpu("sm_90")
    with use_backend("triton"), pytest.raises(RuntimeError, match="the operands are on cpu, not on a GPU"):
        glora_linear(*make_call(CALL))
