"""Runs whose kinds are balanced and drawn by shares: written down, searched, refit and merged like others."""

import json

import pytest
import torch

import glora
from glora.cli import main
from glora.runs import find_runs, load_recipe
from glora.runs.models import make_model
from tests.glora.runs.test_runs import QUICK, run, train_command
from tests.miniature.images import write_datasets

CHANGES = [*QUICK, "training.shares={lora = 0.5}", "refit.steps=3"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("balanced") / "study"
    write_datasets(data, train=24, validation=16, test=20)
    assert main(train_command(data, out, "--balance", changes=CHANGES)) == 0
    return out


def test_they_are_written_down(study):
    (run,) = find_runs(study)
    assert (run.spec.recipe.training.balance, dict(run.spec.space.shares)) == (0.02, {"lora": 0.5})
    trained = json.loads((run / "train.json").read_text())
    assert trained["recipe"]["balance"] == 0.02
    assert json.loads((run / "run.json").read_text())["space"]["shares"] == {"lora": 0.5}


def test_the_supernet_has_scales_and_the_merged_winner_its_outputs(study, capsys):
    (folder,) = find_runs(study)
    supernet = glora.load_adapter(make_model(folder.spec), folder / "supernet.safetensors")
    scales = {name: layer.scales for name, layer in glora.glora_layers(supernet).items()}
    assert all(scale.factors for scale in scales.values())
    run(capsys, "search", study)
    run(capsys, "refit", study)
    searched, refitted = run(capsys, "merge", study, "--test")
    assert refitted["refit"] and searched["same_modules"] and refitted["same_modules"]
    images = torch.randn(3, 3, *2 * [folder.spec.recipe.images.size])
    for place in (folder, folder.refit):
        model = glora.load_adapter(make_model(folder.spec), place / "adapter.safetensors").eval()
        assert {name: layer.scales for name, layer in glora.glora_layers(model).items()} == scales
        expected = model(images)
        assert glora.merge(model, images).model_difference < 1e-5
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_a_preset_has_the_scales_of_its_method(study, tmp_path, capsys):
    (supernet,) = find_runs(study)
    command = train_command(supernet.spec.data, tmp_path / "preset", "--preset", "lora", changes=CHANGES)
    assert main([*command, "--balance"]) == 2
    assert "balance: expected a supernet, got the preset 'lora'" in capsys.readouterr().err
    assert main([*command, "--set", "training.balance=0.02"]) == 0
    (preset,) = find_runs(tmp_path / "preset")
    model = glora.load_adapter(make_model(preset.spec), preset / "adapter.safetensors")
    assert not any(layer.scales.factors for layer in glora.glora_layers(model).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.balance=0", "balance: expected a number above 0 or None, got 0"),
        ("training.shares={lora = 2}", "shares: expected numbers above 0 and together below 1"),
        ("training.shares={other = 0.2}", "shares: expected numbers by kinds out of"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("vtab1k", [change])
