"""How many of our files a call of a layer passes before anything is computed: each is something to read and to run."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import glora
from bench.stubbed import does_nothing, fault, stubbed
from glora import GLoRALinear
from glora_kernels._torch import passes
from tests.test_layering import ROOT

MOST = 6
OURS = tuple(f"{ROOT / package}/" for package in ("glora", "glora_kernels"))
ASKING = {"dim", "size", "stride", "numel", "data_ptr", "element_size", "is_contiguous", "is_neg", "is_conj"}


def launches(function: Callable) -> bool:
    return function == does_nothing


def computes(function: Callable) -> bool:
    """Whether it is an operation on tensors. Operators such as ``*`` are no calls and are not seen."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, Tensor):
        return function.__name__ not in ASKING
    return owner is torch.mm.__self__ or owner is F.linear.__self__


def files_entered(module: nn.Module, x: Tensor, stop: Callable[[Callable], bool]) -> list[str]:
    """The files of ours that calls enter from another one, from ``GLoRALinear.forward`` to the first call of ``stop``.

    What lies between two functions of ours, such as ``autograd.Function.apply``, does not count.
    """
    entered: list[str] = []
    found = False

    def caller(frame: FrameType | None) -> str | None:
        while frame is not None and not frame.f_code.co_filename.startswith(OURS):
            frame = frame.f_back
        return None if frame is None else frame.f_code.co_filename

    def follow(frame: FrameType, event: str, argument: object) -> None:
        nonlocal found
        file = frame.f_code.co_filename
        if event == "c_call" and entered:
            found = found or stop(argument)
        elif event == "call" and not found and file.startswith(OURS) and caller(frame.f_back) != file:
            assert entered or frame.f_code is GLoRALinear.forward.__code__
            entered.append(file)

    sys.setprofile(follow)
    try:
        module(x)
    finally:
        sys.setprofile(None)
    assert found
    return [str(Path(file).relative_to(ROOT)) for file in entered]


def test_files_are_counted_as_they_are_entered(monkeypatch):
    """As often as they are, whatever function of others lies between, and only until something is computed."""
    layer = GLoRALinear(3, 3)

    def forward_anew(x, path):
        assert layer.path is layer.path is path
        y = F.linear(x, layer.weight)
        assert layer.path is path
        return y

    monkeypatch.setattr(layer, "_forward_anew", forward_anew)
    base = "glora/layers/base.py"
    entered = ["glora/layers/linear.py", "glora/layers/path_history.py", base, base]
    assert files_entered(layer, torch.ones(2, 3), computes) == entered


@pytest.mark.parametrize("route", ["triton", "torch"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "without-grad"])
def test_a_call_enters_few_files_and_none_twice(route, training, monkeypatch):
    monkeypatch.setattr(passes, "fault", lambda: "a call that takes the C++ passes asks for them before")
    reason = fault() if route == "triton" else None
    if reason is not None:
        pytest.skip(reason)
    with stubbed() if route == "triton" else nullcontext(), torch.set_grad_enabled(training):
        model = glora.inject(nn.Sequential(nn.Linear(32, 32)), 8, exclude=())
        x = torch.randn(8, 32, requires_grad=True)
        for _ in range(3):  # the first calls check and plan
            model(x)
        entered = files_entered(model, x, launches if route == "triton" else computes)
    assert len(entered) <= MOST, entered
    assert len(set(entered)) == len(entered), entered
