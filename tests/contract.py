"""``python -m tests.contract [CASES]``: the worst constants err / (u S) over freshly drawn cases, by dtype.

It gives the figures of docs/numerics.md. Shapes are up to 48, or above the size from which the output is reused.
"""

import random
import sys
from collections import defaultdict

import torch

from glora_kernels import glora_linear
from tests.helpers import ALL_PATHS, CONTRACT, TEST_SEED, make_call, oracle, results, worst_constant


def draw(rng: random.Random, dtype: torch.dtype):
    large = rng.random() < 0.1
    low, high = (64, 160) if large else (1, 48)
    shape = (rng.randint(low, high), rng.randint(1, 48), rng.randint(low, high))
    options = {"bias": rng.random() < 0.5, "product": rng.choice(["hadamard", "matmul"]), "dtype": dtype}
    return make_call(rng.choice(ALL_PATHS), shape, seed=rng.randrange(2**30), **options)


def survey(cases: int) -> dict[torch.dtype, dict[str, float]]:
    """The worst constant of y and of each gradient."""
    torch.set_num_threads(1)
    rng = random.Random(TEST_SEED)
    worst: dict[torch.dtype, dict[str, float]] = {dtype: defaultdict(float) for dtype in CONTRACT}
    for index in range(cases):
        dtype = list(CONTRACT)[index % len(CONTRACT)]
        call = draw(rng, dtype)
        dy = torch.randn(call[0].shape[0], call[1].shape[0], generator=torch.Generator().manual_seed(index)).to(dtype)
        for name, value in worst_constant(results(glora_linear, *call, dy), *oracle(*call, dy), dtype).items():
            worst[dtype][name] = max(worst[dtype][name], value)
    return worst


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(f"{cases} cases, GLORA_TEST_SEED={TEST_SEED}, torch {torch.__version__}, {torch.get_num_threads()} thread")
    for dtype, found in survey(cases).items():
        values = "  ".join(f"{name} {found[name]:.2f}" for name in sorted(found))
        print(f"{dtype!s:16} allowed {CONTRACT[dtype]:.0f}, worst {max(found.values()):.2f}:  {values}")


if __name__ == "__main__":
    main()
