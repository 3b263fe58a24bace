"""A pytest plugin that breaks the torch backend a little: ``-p tests.bench.sabotage``."""

from glora_kernels import _torch

right = _torch.forward


def wrong(*arguments):
    made = right(*arguments)
    return made._replace(y=made.y * 1.001)


_torch.forward = wrong
