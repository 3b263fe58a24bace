"""Which layer adapts which module."""

import subprocess
import sys

import pytest
from torch import nn

from glora import GLoRAConv2d, GLoRALinear
from glora.layers.adapters import adapted, adapters


@pytest.mark.parametrize(
    ("module", "kind", "features"),
    [(nn.Linear(3, 5), GLoRALinear, (5, 3)), (nn.Conv2d(4, 6, (3, 2), groups=2), GLoRAConv2d, (6, 12))],
    ids=["linear", "conv2d"],
)
def test_each_type_has_its_layer(module, kind, features):
    layer = adapted(module, 2, "matmul")
    assert type(layer) is kind
    assert layer.plain_type is type(module)
    assert layer.weight is module.weight
    assert (layer.out_features, layer.in_features) == features == adapters()[type(module)].features(module)
    assert (layer.rank, layer.product) == (2, "matmul")


def test_other_types_are_refused():
    with pytest.raises(
        TypeError, match=r"module: expected exactly torch.nn.Linear or torch.nn.Conv2d.*, got torch.nn.Bilinear"
    ):
        adapted(nn.Bilinear(1, 1, 1), 2, "hadamard")
    out = nn.MultiheadAttention(2, 1).out_proj
    with pytest.raises(TypeError, match=r"module: expected exactly torch.nn.Linear, got .*NonDynamicallyQuantizable"):
        adapted(out, 2, "hadamard")


def test_asking_loads_no_package():
    code = (
        "import sys, glora.layers.adapters as a\n"
        "kinds = a.adapters()\n"
        "assert len(kinds) == 2, kinds\n"
        "assert not {'transformers', 'bitsandbytes', 'torchao'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
