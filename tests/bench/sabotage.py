"""A pytest plugin that breaks a part of the torch backend: ``SABOTAGE=part pytest -p tests.bench.sabotage``."""

import os

from glora_kernels import _torch

forward, backward, assemble = _torch.forward, _torch.backward, _torch.assemble


def wrong_forward(*arguments):
    made = forward(*arguments)
    return made._replace(y=made.y * 1.01)


def wrong_backward(step):
    dx, gradients = backward(step)
    return dx, {slot: tuple(None if g is None else g * 1.01 for g in found) for slot, found in gradients.items()}


def wrong_assemble(*arguments):
    w_eff, b_eff = assemble(*arguments)
    return w_eff * 1.01, b_eff


part = os.environ["SABOTAGE"]
setattr(_torch, part, {"forward": wrong_forward, "backward": wrong_backward, "assemble": wrong_assemble}[part])
