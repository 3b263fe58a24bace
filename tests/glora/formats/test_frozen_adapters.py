"""Adapter files written once have to load for ever: see ``tests/data/make_adapters.py``."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import glora
from glora.peft import import_peft
from tests.data import make_adapters
from tests.glora.toys import same_bits

FROZEN = Path(__file__).parents[2] / "data" / "adapters"
LOADERS = {
    "own": lambda model, folder, expected: glora.load_adapter(model, folder / "adapter.safetensors"),
    "own_matmul": lambda model, folder, expected: glora.load_adapter(model, folder / "adapter.safetensors"),
    "own_2": lambda model, folder, expected: glora.load_adapter(model, folder / "adapter.safetensors"),
    "lycoris_new": lambda model, folder, expected: glora.load_lycoris(model, folder / "adapter.safetensors"),
    "lycoris_old": lambda model, folder, expected: glora.load_lycoris(model, folder / "adapter.safetensors"),
    "official": lambda model, folder, expected: glora.load_official(
        model, folder / "adapter.pt", expected["configurations"]
    ),
    "peft": lambda model, folder, expected: import_peft(model, folder),
}


def read(folder):
    return json.loads((folder / "expected.json").read_text())


def test_every_frozen_file_has_a_loader_and_a_maker():
    assert {folder.name for folder in FROZEN.iterdir()} == set(LOADERS) == set(make_adapters.MAKERS)


@pytest.mark.parametrize("name", LOADERS)
def test_old_files_keep_loading(name):
    expected = read(FROZEN / name)
    model = LOADERS[name](make_adapters.base_model(name), FROZEN / name, expected)
    assert {layer: path.to_dict() for layer, path in glora.get_paths(model).items()} == expected["paths"]
    with torch.no_grad():
        got, want = model(torch.tensor(expected["input"])), torch.tensor(expected["output"])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert (make_adapters.base_model(name)(torch.tensor(expected["input"])) - want).abs().max() > 0.1


@pytest.mark.parametrize("name", make_adapters.MAKERS)
def test_the_maker_still_makes_the_frozen_file(name, tmp_path):
    """So that it says how the file came about."""
    pytest.importorskip({"lycoris_new": "lycoris", "peft": "peft"}.get(name, "glora"))
    make_adapters.make(tmp_path, [name])
    made, frozen = read(tmp_path / name), read(FROZEN / name)
    assert {**made, "made_with": None, "output": None} == {**frozen, "made_with": None, "output": None}
    torch.testing.assert_close(torch.tensor(made["output"]), torch.tensor(frozen["output"]))
    assert same_bits(tensors(tmp_path / name), tensors(FROZEN / name))


@pytest.mark.parametrize("name", LOADERS)
def test_frozen_files_are_small(name):
    assert sum(file.stat().st_size for file in (FROZEN / name).iterdir()) < 16_000


def tensors(folder):
    """By sorted name: the order in a file is its writer's affair."""
    files = list(folder.glob("*.safetensors"))
    found = load_file(files[0]) if files else torch.load(folder / "adapter.pt", weights_only=True)
    return dict(sorted(found.items()))
