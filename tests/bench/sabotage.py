"""A pytest plugin that breaks a part of the torch backend: ``SABOTAGE=part pytest -p tests.bench.sabotage``."""

import os

from glora_kernels._torch import TorchPlan

forward, backward, assemble = TorchPlan.forward, TorchPlan.backward, TorchPlan.assemble


def wrong_forward(*arguments):
    made = forward(*arguments)
    return made._replace(y=made.y * 1.01)


def wrong_backward(*arguments):
    dx, gradients = backward(*arguments)
    return dx, [None if gradient is None else gradient * 1.01 for gradient in gradients]


def wrong_assemble(*arguments):
    w_eff, b_eff = assemble(*arguments)
    return w_eff * 1.01, b_eff


part = os.environ["SABOTAGE"]
setattr(TorchPlan, part, {"forward": wrong_forward, "backward": wrong_backward, "assemble": wrong_assemble}[part])
