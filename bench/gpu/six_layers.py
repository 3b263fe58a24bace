"""Six layer calls, forward and backward, that launch every kernel: for compute-sanitizer, which makes them slow.

compute-sanitizer --tool memcheck python -m bench.gpu.six_layers
"""

from __future__ import annotations

import sys

import torch

from glora_kernels import Constant, LowRank, Terms, Vector, glora_linear, reference, use_backend
from glora_kernels.error_bound import PROMISED, largest_constant

from .running import TOLD

TOKENS, OUTPUTS, INPUTS, RANK = 200, 136, 152, 8
CALLS = (  # kinds of A and B, product, strategy
    ("lora", "lora", "hadamard", "assemble"),
    ("lora", "lora", "hadamard", "fused"),
    ("lora", "lora", "matmul", "assemble"),
    ("lora", "lora", "matmul", "fused"),
    ("vector", "lora", "hadamard", "assemble"),
    ("vector", "constant", "hadamard", "fused"),
)


def main() -> int:
    wrong = 0
    for kinds in CALLS:
        error = _largest_error(*kinds)
        wrong += not error <= PROMISED[torch.bfloat16]
        print(f"{' '.join(kinds)}: {error:.3g} u S", flush=True)
    print(f"{TOLD}{len(CALLS)} calls, {wrong} wrong")
    return int(wrong > 0)


def _largest_error(a: str, b: str, product: str, strategy: str) -> float:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def term(kind: str, rows: int) -> LowRank | Vector | Constant:
        down = random(rows, RANK)
        return {"lora": LowRank(down, random(RANK, INPUTS)), "vector": Vector(down), "constant": Constant(down)}[kind]

    a_term = term(a, OUTPUTS if product == "hadamard" else INPUTS)
    terms = Terms(a_term, term(b, OUTPUTS), Vector(random(INPUTS)), Vector(random(OUTPUTS)), None, product=product)
    sizes = (TOKENS, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,), (TOKENS, OUTPUTS)
    x, weight, bias, dy = (random(*size).bfloat16() for size in sizes)
    with use_backend("triton", strategy=strategy):
        on_gpu = [one.cuda() for one in (x, weight, bias)]
        got = [one.cpu() for one in _results(glora_linear, *on_gpu, terms.map(torch.Tensor.cuda), dy.cuda())]
    want, scale = (
        _results(reference.glora_linear, *map(in_fp64, (x, weight, bias)), terms.map(in_fp64), in_fp64(dy))
        for in_fp64 in (torch.Tensor.double, lambda tensor: tensor.double().abs())
    )
    return max(largest_constant(*three, torch.bfloat16) for three in zip(got, want, scale))


def _results(function, x, weight, bias, terms, dy) -> list[torch.Tensor]:
    """y and every gradient."""
    x, terms = x.detach().requires_grad_(), terms.map(lambda t: t.detach().requires_grad_())
    y = function(x, weight, bias, terms)
    return [y.detach(), *torch.autograd.grad(y, [x, *terms.flatten()[0]], dy)]


if __name__ == "__main__":
    sys.exit(main())
