"""The blocks of code of README.md and docs/, as a reader would run them, with tiny models in the place of the named."""

import copy
import re
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import accelerate
import peft
import pytest
import timm
import torch
import transformers
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer

import glora
from glora.trainer import GLoRATrainer
from tests.glora.hugging_face import Rows, llama, texts, vit
from tests.glora.test_trainer import arguments, losses
from tests.glora.toys import generator, same_bits, seeded, state

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/hugging-face.md"
SHORT = glora.SearchSettings(population=6, generations=1, top=2, crossover=3, mutation=3)


def block(page, heading, number=0):
    """A block of Python under a heading."""
    text = (ROOT / page).read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", text, re.S)[number]


def run(code, replaced, **names):
    """Run ``code`` with other texts in it, each of which has to be there; returns its variables, and the seconds."""
    for old, new in replaced.items():
        assert old in code, old
        code = code.replace(old, new)
    began = time.perf_counter()
    exec(compile(code, "page", "exec"), names)
    return SimpleNamespace(**names), time.perf_counter() - began


def lines(code):
    return sum(bool(line.strip()) and not line.startswith(("#", "import ", "from ")) for line in code.splitlines())


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """What from_pretrained and create_model give, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: llama())
    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", lambda name, num_labels: vit())
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, num_classes=10: copy.deepcopy(backbone()))


def digits(start, stop, inverted=True):
    """Real digits as 3 x 32 x 32."""
    found = load_digits()
    pixels = torch.tensor(found.images[start:stop] / 16, dtype=torch.float32)[:, None]
    images = F.interpolate(1 - pixels if inverted else pixels, 32).repeat(1, 3, 1, 1)
    return TensorDataset(images, torch.tensor(found.target[start:stop]))


@cache
def backbone(create=timm.create_model):
    """A small ViT, trained on white digits; the tests adapt it to black ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 4}
        model = create("vit_tiny_patch16_224", num_classes=10, **sizes)
        recipe = glora.Recipe(steps=400, batch_size=64, lr=1e-3, warmup=0.1)
        glora.train(model, digits(1000, 1797, inverted=False), recipe, progress=False)
    return model


def test_the_ten_lines_of_the_readme_on_digits(capsys):
    """They adapt the small ViT from white digits to black ones."""
    code = block("README.md", "In ten lines")
    assert lines(code) <= 10
    small = {
        "steps=10_000, batch_size=64, lr=5e-4": "steps=150, batch_size=64, lr=1e-2",
        "steps=500, batch_size=64, lr=5e-4": "steps=30, batch_size=64, lr=1e-2",
        "limit=860_000, ": "limit=12_000, settings=SHORT, ",
        "num_classes=100": "num_classes=10",
        "224, 224)": "32, 32)",
    }
    found, seconds = run(code, small, train_set=digits(0, 800), validation_set=digits(800, 1000), SHORT=SHORT)
    before = glora.evaluate(backbone(), digits(1000, 1400)).accuracy
    assert glora.evaluate(found.model, digits(1000, 1400)).accuracy > max(0.4, before + 0.3)
    assert not glora.glora_layers(found.model)
    assert found.best.parameters <= 12_000
    assert "merged 8 layers: largest difference" in capsys.readouterr().out
    assert seconds < 100


def language_data():
    """Names that the blocks about language models take as given."""
    return {
        "glora": glora,
        "peft": peft,
        "Trainer": Trainer,
        "GLoRATrainer": GLoRATrainer,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "get_last_checkpoint": transformers.trainer_utils.get_last_checkpoint,
        "name": "meta-llama/Llama-3.2-1B",
        "data": texts(),
        "validation": texts(8, ignored=False),
        "collator": transformers.default_data_collator,
        "arguments": arguments("out"),
        "prompt": torch.tensor([texts()[0]["input_ids"]]),
    }


def test_five_lines_of_lora_beside_ours():
    """From the same start, with the same losses; the adapter loads into PEFT."""
    theirs, ours = (block(PAGE, "A language model in Trainer", number) for number in (0, 1))
    assert lines(theirs) == lines(ours) == 5
    names = language_data()
    first, _ = run(theirs, {}, **names)
    start = peft.get_peft_model(llama(), first.model.peft_config["default"])
    torch.manual_seed(3)
    for name, parameter in start.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def from_start(model):
        values = {name.removeprefix("base_model.model."): p.detach() for name, p in start.named_parameters()}
        own = (
            values
            if hasattr(model, "peft_config")
            else {
                name.replace(".lora_A.default.weight", ".Bu").replace(".lora_B.default.weight", ".Bd"): value
                for name, value in values.items()
            }
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                name = name.removeprefix("base_model.model.")
                if name in own and parameter.requires_grad:
                    parameter.copy_(own[name])
        return model

    before = {"trainer.train()": "from_start(model)\ntrainer.train()"}
    theirs, _ = run(theirs, before, from_start=from_start, **names)
    ours, seconds = run(ours, before, from_start=from_start, **names)
    assert losses(ours.trainer) == pytest.approx(losses(theirs.trainer), abs=1e-5)
    glora.export_lora(glora.load_adapter(llama(), "adapter.safetensors"), "exported")
    loaded = peft.PeftModel.from_pretrained(llama(), "exported")
    torch.testing.assert_close(loaded(names["prompt"]).logits, theirs.model(names["prompt"]).logits, rtol=0, atol=1e-4)
    assert seconds < 60


def test_a_search_for_a_language_model():
    names = language_data()
    names["arguments"] = arguments("out", save_strategy="steps", save_steps=3)
    small = {"limit=100_000": "limit=2_000, settings=SHORT, progress=False"}
    found, _ = run(block(PAGE, "A language model in Trainer", 2), small, SHORT=SHORT, **names)
    served = llama().__class__.from_pretrained("merged")
    assert torch.equal(served(names["prompt"]).logits, found.model(names["prompt"]).logits)
    assert found.found.best.parameters <= 2_000
    again, _ = run(block(PAGE, "A language model in Trainer", 2), small, SHORT=SHORT, **names)
    assert again.found.evaluated == 0 and again.found.best == found.found.best


def pictures(start, stop):
    pixels, target = digits(start, stop).tensors
    return Rows([{"pixel_values": F.interpolate(x[None], 8)[0], "label": int(y) % 3} for x, y in zip(pixels, target)])


def test_an_image_classifier(capsys):
    names = {**language_data(), "AutoModelForImageClassification": transformers.AutoModelForImageClassification}
    small = {"limit=100_000": "limit=1_500, settings=SHORT, progress=False"}
    found, _ = run(
        block(PAGE, "An image classifier in Trainer"),
        small,
        SHORT=SHORT,
        images=pictures(0, 60),
        **{**names, "validation": pictures(60, 90)},
    )
    assert "trainable params: " in capsys.readouterr().out
    assert not glora.glora_layers(found.model)


def test_without_trainer(capsys):
    names = language_data()
    names["model"] = glora.inject(llama(), 8, targets=("q_proj", "v_proj"), heads=())
    names["space"] = glora.SearchSpace(ranks=(8, 4), bias_free=True)
    found, _ = run(block(PAGE, "Without Trainer"), {"steps=60": "steps=5"}, settings=SHORT, **names)
    assert float(capsys.readouterr().out.split()[-1]) > 1
    assert found.best.score > 0


def test_accelerated():
    found, seconds = run(block(PAGE, "PEFT's GLoRA, faster"), {}, **language_data())
    assert any("Accelerated" in type(module).__name__ for module in found.model.modules())
    assert Path("adapter/adapter_model.safetensors").is_file()
    assert seconds < 60


def test_a_loop_of_your_own():
    data = digits(0, 256).tensors

    def batches(step):
        for part in range(2):
            rows = slice((step * 2 + part) * 16, (step * 2 + part + 1) * 16)
            yield tuple(tensor[rows] for tensor in data)

    code = block(PAGE, "A loop of your own")
    assert lines(code) <= 14
    names = {"glora": glora, "timm": timm, "torch": torch, "F": F, "STEPS": 6, "ACCUMULATED": 2, "batches": batches}
    compiled = {"torch.compile(model)": 'torch.compile(model, backend="aot_eager")'}
    _, seconds = run(code, compiled, **names)
    # to compare: AdamW makes steps of gradients that are rounding, and bf16 rounds more
    exact = {"AdamW": "SGD", "torch.bfloat16)": "torch.bfloat16, enabled=False)"}
    with seeded():
        found, _ = run(code, compiled | exact, **names)
    with seeded():
        plain, _ = run(code, {"torch.compile(model)": "model"} | exact, **names)
    with seeded():
        start = glora.inject(copy.deepcopy(backbone()), 8)
    for name, tensor in state(plain.model).items():
        torch.testing.assert_close(state(found.model)[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert not same_bits(state(plain.model), state(start))
    assert seconds < 100


def test_with_accelerate():
    torch.manual_seed(0)
    names = {"accelerate": accelerate, "glora": glora, "torch": torch, "F": F}
    model = glora.inject(timm.create_model("tiny"), rank=8)
    names |= {"model": model, "space": glora.SearchSpace(ranks=(8, 4)), "loader": DataLoader(digits(0, 64), 16)}
    names["optimizer"] = torch.optim.AdamW(glora.trainable_parameters(model), lr=1e-3)
    before = {name: tensor.clone() for name, tensor in state(model).items()}
    code = block(PAGE, "A loop of your own", 1)
    run(code, {"accelerate.Accelerator()": "accelerate.Accelerator(cpu=True)"}, **names)
    assert not same_bits(state(model), before)


def test_several_adapters(tmp_path):
    for index, name in enumerate(("poems", "letters")):
        model = glora.inject(llama(), 8 - 4 * index, targets=("q_proj", "v_proj"), heads=(), preset="lora")
        with torch.no_grad():
            for layer in glora.glora_layers(model).values():
                layer.Bd.normal_(generator=generator(index))
        glora.save_adapter(model, f"{name}.safetensors", compact=True)
    names = language_data()
    found, _ = run(block(PAGE, "Several adapters on one base"), {}, **names)
    assert torch.equal(found.reference, llama()(names["prompt"]).logits)
    paths = glora.get_paths(found.model)
    assert set(paths.values()) == {glora.PathConfig(B="lora_4")}
