"""Makes the frozen adapter files: ``python -m tests.data.make_adapters FOLDER [FORMAT ...]``.

``tests/data/adapters`` has a folder for each format, with a file as that format's own code writes it and
``expected.json``: an input, the output of :func:`fixed_model` with that adapter in fp64, computed here by the formula
and without the loader, the paths, and the versions that made it. Files that were written once have to load for ever,
so what is there is never made again. A new format, or a new version of one, gets a maker in ``MAKERS``, a folder, and
a loader in ``tests/glora/formats/test_frozen_adapters.py``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import glora
from glora import PathConfig
from glora_kernels import reference

RANK = 3
PATHS = {
    "fc1": PathConfig("lora_2", "vector", "lora_3", "constant", "vector"),
    "fc2": PathConfig("vector", "lora_3", "vector", "none", "constant"),
}
Weights = dict[str, tuple[Tensor, Tensor]]


def values(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/64 from -30/64 to 30/64, which every dtype holds exactly: no generator, no rounding."""
    numbers = torch.arange(math.prod(shape)) * 37 + seed * 17
    return ((numbers % 61 - 30) / 64).reshape(shape)


def fixed_model() -> nn.Sequential:
    """6 inputs, ``fc1`` (square), ``fc2`` (without bias), a ``head``; 3 outputs."""
    layers = OrderedDict(fc1=nn.Linear(6, 6), act=nn.ReLU(), fc2=nn.Linear(6, 5, bias=False), head=nn.Linear(5, 3))
    model = nn.Sequential(layers)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(values(*parameter.shape, seed=seed))
    return model


def normed_model() -> nn.Sequential:
    """:func:`fixed_model` with a batch norm before the head, in eval mode."""
    layers = OrderedDict(fixed_model().named_children())
    head = layers.pop("head")
    return nn.Sequential(OrderedDict(**layers, norm=nn.BatchNorm1d(5), head=head)).eval()


def base_model(name: str) -> nn.Sequential:
    """What the frozen file of this name was made for."""
    return normed_model() if name == "own_2" else fixed_model()


def fixed_input() -> Tensor:
    return values(4, 6, seed=100) * 4


def make_own(folder: Path, product: str) -> None:
    """glora's format 1, of which the frozen files are; what is made now is format 2 without buffers."""
    _make_own(folder, fixed_model(), product, {})


def make_own_2(folder: Path) -> None:
    """glora's format 2, with statistics of a norm layer that is not trained."""
    model = normed_model()
    model.norm.running_mean.copy_(values(5, seed=40))
    model.norm.running_var.copy_(values(5, seed=41).abs() + 0.5)
    model.norm.num_batches_tracked.fill_(7)
    scale = (model.norm.running_var.double() + model.norm.eps).rsqrt()
    _make_own(folder, model, "hadamard", {"norm": (scale.diag(), -scale * model.norm.running_mean.double())})


def _make_own(folder: Path, base: nn.Sequential, product: str, more: Weights) -> None:
    model = glora.inject(base, RANK, product=product)
    weights = _weights()
    with torch.no_grad():
        for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.copy_(values(*parameter.shape, seed=10 + seed))
    for name, layer in glora.glora_layers(model).items():
        bias = None if layer.bias is None else layer.bias.double()
        layer.path = PATHS[name]
        weights[name] = reference.glora_merge(layer.weight.double(), bias, layer.terms())
    del weights["head"]  # it comes last
    weights |= {**more, "head": (model.head.weight.double(), model.head.bias.double())}
    glora.save_adapter(model, folder / "adapter.safetensors")
    _expect(folder, weights, PATHS, {"glora": glora.__version__})


def make_lycoris_new(folder: Path) -> None:
    """A whole network of the package lycoris-lora (4.1), of rank 3 and alpha 1."""
    from lycoris.wrapper import LycorisNetwork

    network = LycorisNetwork(fixed_model(), 1.0, lora_dim=RANK, alpha=1, network_module="glora")
    network.apply_to()
    weights = _weights()
    for i, lora in enumerate(network.loras):
        a1, a2, b1, b2 = (getattr(lora, factor).weight for factor in ("a1", "a2", "b1", "b2"))
        for seed, factor in enumerate((a1, a2, b1, b2)):
            factor.data = values(*factor.shape, seed=10 + 4 * i + seed)
        name = lora.lora_name.removeprefix("lycoris_")
        weight, bias = weights[name]
        weights[name] = (weight + (weight @ a1.double() @ a2.double() + b1.double() @ b2.double()) / RANK, bias)
    network.save_weights(str(folder / "adapter.safetensors"), None, {})
    paths = dict.fromkeys(weights, PathConfig(f"lora_{RANK}", f"lora_{RANK}"))
    _expect(folder, weights, paths, {"lycoris-lora": importlib.metadata.version("lycoris-lora")})


def make_lycoris_old(folder: Path) -> None:
    """The names and shapes of LyCORIS before 3.0 for an image generator, in fp16, of rank 3 and alpha 2."""
    from safetensors.torch import save_file

    weights, tensors = _weights(), {}
    for i, name in enumerate(PATHS):
        weight, bias = weights[name]
        rows, columns = weight.shape
        shapes = ((RANK, columns), (columns, RANK), (RANK, columns), (rows, RANK))
        a1, a2, b1, b2 = factors = [values(*shape, seed=10 + 4 * i + seed) for seed, shape in enumerate(shapes)]
        tensors |= {f"lora_unet_{name}.{key}.weight": f.half() for key, f in zip(("a1", "a2", "b1", "b2"), factors)}
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0).half()
        weights[name] = (weight + 2 / RANK * (weight @ a2.double() @ a1.double() + b2.double() @ b1.double()), bias)
    save_file(tensors, folder / "adapter.safetensors")
    paths = dict.fromkeys(PATHS, PathConfig(f"lora_{RANK}", f"lora_{RANK}"))
    _expect(folder, weights, paths, {"torch": torch.__version__})


def make_official(folder: Path) -> None:
    """The dict that the official ``save`` writes, and a candidate of the official search."""
    tensors, weights = {}, _weights()
    for i, (name, path) in enumerate(PATHS.items()):
        weight, bias = weights[name]
        rows, columns = weight.shape
        shapes = {
            "Ad": (rows, RANK),
            "Au": (RANK, columns),
            "Bd": (rows, RANK),
            "Bu": (RANK, columns),
            "Cd": (columns, RANK),
            "Cu": (RANK, 1),
            "D": (rows,),
            "E": (rows,),
        }
        support = {key: values(*shape, seed=10 + 8 * i + j) for j, (key, shape) in enumerate(shapes.items())}
        tensors |= {f"{name}.{key}": tensor for key, tensor in support.items()}
        weights[name] = _official_weights(weight, bias, support, path)
    weights["head"] = (values(3, 5, seed=30).double(), values(3, seed=31).double())
    tensors |= {"head.weight": weights["head"][0].float(), "head.bias": weights["head"][1].float()}
    torch.save(tensors, folder / "adapter.pt")
    configurations = [
        {slot: text.replace("lora", "LoRA") for slot, text in path.to_dict().items()} for path in PATHS.values()
    ]
    _expect(folder, weights, PATHS, {"torch": torch.__version__}, configurations=configurations)


def _official_weights(weight: Tensor, bias: Tensor, support: dict[str, Tensor], path: PathConfig):
    """``W0 + W0 * A + B`` and ``b0 + b0 D + E + W0 c`` for the two paths above."""
    Ad, Au, Bd, Bu, Cd, Cu, D, E = (tensor.double() for tensor in support.values())
    if path == PATHS["fc1"]:
        A, B, c, d, e = Ad[:, :2] @ Au[:2], Bd[:, :1], (Cd @ Cu)[:, 0], D[0], E
    else:
        A, B, c, d, e = Ad[:, :1], Bd @ Bu, Cd[:, 0], torch.zeros(()), E[0]
    return weight + weight * A + B, bias + bias * d + e + weight @ c


def make_peft(folder: Path) -> None:
    """GLoRA of the package peft (0.21.2), of rank 3, with a head that it saved whole."""
    import peft

    kinds = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "vector"}
    config = peft.GloraConfig(r=RANK, target_modules=list(PATHS), modules_to_save=["head"], **kinds)
    model, weights = peft.get_peft_model(fixed_model(), config), _weights()
    for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.copy_(values(*parameter.shape, seed=10 + seed))
    for name in PATHS:
        layer, (weight, bias) = model.get_base_model().get_submodule(name), weights[name]
        A, B, C, D, E = (getattr(layer, f"glora_{slot}")["default"]().double() for slot in "ABCDE")
        weights[name] = weight + weight * A + B, bias + bias * D + E + (weight @ C)[:, 0]
    head = model.get_base_model().head.modules_to_save["default"]
    weights["head"] = head.weight.double(), head.bias.double()
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    low = f"lora_{RANK}"
    paths = {"fc1": PathConfig(low, low, low, "vector", "vector"), "fc2": PathConfig(low, low)}
    _expect(folder, weights, paths, {"peft": importlib.metadata.version("peft")})


def _weights() -> Weights:
    """Those of the fixed model in fp64, a zero where it has no bias."""
    model = fixed_model().double()
    return {
        name: (
            module.weight.data,
            torch.zeros(module.out_features).double() if module.bias is None else module.bias.data,
        )
        for name, module in model.named_children()
        if isinstance(module, nn.Linear)
    }


def _expect(folder: Path, weights: Weights, paths: dict[str, PathConfig], versions: dict[str, str], **more) -> None:
    x = fixed_input().double()
    y = x
    for name, (weight, bias) in weights.items():
        y = y @ weight.T + bias
        if name == "fc1":
            y = y.relu()
    expected = {
        "made_with": versions,
        "paths": {name: path.to_dict() for name, path in paths.items()},
        **more,
        "input": x.tolist(),
        "output": y.tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


MAKERS: dict[str, Callable[[Path], None]] = {
    "own": lambda folder: make_own(folder, "hadamard"),
    "own_matmul": lambda folder: make_own(folder, "matmul"),
    "own_2": make_own_2,
    "lycoris_new": make_lycoris_new,
    "lycoris_old": make_lycoris_old,
    "official": make_official,
    "peft": make_peft,
}


def make(folder: Path, formats: list[str]) -> None:
    for name in formats:
        (folder / name).mkdir(parents=True)
        with torch.no_grad():
            MAKERS[name](folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("formats", nargs="*", metavar="format", help=f"default: {', '.join(MAKERS)}")
    options = parser.parse_args()
    make(options.folder, options.formats or list(MAKERS))
