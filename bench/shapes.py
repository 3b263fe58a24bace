"""What is measured: layers and models by name, with fewer tokens on a CPU than on a GPU. Pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        name: what it is in its model.
        tokens: M on a CPU, and on a GPU.
        inputs, outputs: K, N.
        rank: R of every adapter.
    """

    name: str
    tokens: tuple[int, int]
    inputs: int
    outputs: int
    rank: int = 8

    def tokens_on(self, device: str) -> int:
        return self.tokens[device != "cpu"]


@dataclass(frozen=True)
class Model:
    """A timm model.

    Attributes:
        name: in timm's registry.
        batch: images on a CPU, and on a GPU.
        linears: how many linear layers are adapted: all with a bias but the head.
        rank: R of every adapter.
    """

    name: str
    batch: tuple[int, int]
    linears: int
    rank: int = 4

    def batch_on(self, device: str) -> int:
        return self.batch[device != "cpu"]


@dataclass(frozen=True)
class ShapeSet:
    """Layers, and their model if it is one of timm's."""

    layers: tuple[Layer, ...]
    model: Model | None = None


def _llama(hidden: int, wide: int, **others: int) -> ShapeSet:
    sizes = {"q_proj": (hidden, hidden), "up_proj": (hidden, wide), "down_proj": (wide, hidden)}
    sizes |= {name: (hidden, outputs) for name, outputs in others.items()}
    return ShapeSet(tuple(Layer(name, (256, 8192), *size) for name, size in sizes.items()))


VIT_TOKENS = (197 * 8, 197 * 64)

NOT_IN_ALL = ("tiny", "vit_b_small")

SHAPE_SETS = {
    # For the test suite: everything runs, nothing is worth reporting.
    "tiny": ShapeSet((Layer("fc1", (12, 12), 16, 24, rank=2),), Model("test_vit", (1, 1), 24, rank=2)),
    "small": ShapeSet((Layer("ViT-Ti fc1", (394, 12608), 192, 768),), Model("vit_tiny_patch16_224", (2, 64), 48)),
    "square": ShapeSet((Layer("2048", (512, 8192), 2048, 2048),)),
    "vit_b": ShapeSet(
        (
            Layer("qkv", VIT_TOKENS, 768, 2304),
            Layer("proj", VIT_TOKENS, 768, 768),
            Layer("fc1", VIT_TOKENS, 768, 3072),
            Layer("fc2", VIT_TOKENS, 3072, 768),
        ),
        Model("vit_base_patch16_224", (4, 64), 48),
    ),
    # The model of vit_b at a batch that leaves a GPU waiting for launches.
    "vit_b_small": ShapeSet((), Model("vit_base_patch16_224", (1, 4), 48)),
    "swin_b": ShapeSet(
        (
            Layer("stage 1 fc1", (3136, 64 * 3136), 128, 512),
            Layer("stage 3 qkv", (392, 64 * 196), 512, 1536),
            Layer("stage 3 fc1", (392, 64 * 196), 512, 2048),
            Layer("stage 4 fc2", (98, 64 * 49), 4096, 1024),
        ),
        Model("swin_base_patch4_window7_224", (2, 64), 96),
    ),
    "llama7b": _llama(4096, 11008),
    "llama3b": _llama(3072, 8192, k_proj=1024),
}
