"""Hugging Face's Trainer on a small LLaMA: through PEFT's GLoRA, accelerated, and through ours."""

import math

import peft
import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import glora
from glora.peft import accelerate, export_peft
from tests.glora.toys import seeded, state

TEXT = "a rose is a rose is a rose is a rose. " * 12
LETTERS = sorted(set(TEXT))
LENGTH, STEPS, RANK = 24, 40, 4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Windows(Dataset):
    """Every window of the text, as letters' numbers."""

    def __init__(self):
        self.letters = torch.tensor([LETTERS.index(letter) for letter in TEXT])

    def __len__(self):
        return len(self.letters) - LENGTH

    def __getitem__(self, index):
        window = self.letters[index : index + LENGTH]
        return {"input_ids": window, "labels": window}


def llama():
    """2 layers, hidden size 32, biases in attention and MLP so that C, D and E have something to do."""
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.2,  # the frozen head has to reach probabilities near 1
        use_cache=False,
    )
    with seeded():
        return LlamaForCausalLM(config)


def through_peft():
    config = peft.GloraConfig(r=RANK, target_modules=LINEARS, config_D_E="vector", task_type="CAUSAL_LM")
    with seeded():
        model = peft.get_peft_model(llama(), config)
    assert len(accelerate(model).served) == 14
    return model


def through_ours():
    model = glora.inject(llama(), RANK, exclude=("lm_head",))
    model.lm_head.requires_grad_(False)
    assert len(glora.glora_layers(model)) == 14
    return model


def train(model, folder, **options):
    """The loss of the first and of the last steps."""
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=0,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Windows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS // 5
    return losses[0], losses[-1]


@pytest.mark.parametrize("make", [through_peft, through_ours], ids=["PEFT", "ours"])
def test_loss_falls_and_the_base_stays(tmp_path, make):
    model = make()
    base = {name: tensor for name, tensor in state(model).items() if not _trained(model, name)}
    first, last = train(model, tmp_path)
    assert last < first - 0.5, (first, last)
    assert last < math.log(len(LETTERS)) / 2
    assert all(torch.equal(tensor, base[name]) for name, tensor in state(model).items() if name in base)


def _trained(model, name):
    return dict(model.named_parameters())[name].requires_grad


def test_with_gradient_checkpointing(tmp_path):
    model = through_peft()
    losses = train(model, tmp_path / "one", gradient_checkpointing=True)
    assert losses == pytest.approx(train(through_peft(), tmp_path / "other"), rel=1e-3)


def test_accelerated_training_is_peft_training(tmp_path):
    model = through_peft()
    accelerate(model).undo()
    assert train(model, tmp_path / "before") == pytest.approx(train(through_peft(), tmp_path / "after"), rel=1e-3)


def test_what_the_trainer_trained_goes_to_peft(tmp_path):
    model = through_ours()
    train(model, tmp_path / "run")
    export_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    tokens = Windows()[3]["input_ids"][None]
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
