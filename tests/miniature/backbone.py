"""The backbone: a small ViT that has learnt bright digits on dark paper."""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from glora import Recipe, train
from glora.runs import load_recipe
from tests.miniature.images import PRETRAINING_DIGITS, digits, place

RECIPE = Path(__file__).with_name("recipe.toml")


class _Digits(Dataset):
    """The pre-training digits, coloured and placed anew whenever they are read."""

    def __init__(self, images):
        pixels, classes = digits()
        self.pixels, self.classes = pixels[:PRETRAINING_DIGITS], classes[:PRETRAINING_DIGITS]
        self.mean, self.std = torch.tensor(images.mean), torch.tensor(images.std)

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        generator = np.random.default_rng(int(torch.randint(2**31, ())))
        image = torch.tensor(place(self.pixels[index], generator), dtype=torch.float32)
        return ((image - self.mean) / self.std).permute(2, 0, 1), int(self.classes[index])


def pretrain(file: Path, steps: int = 800, progress: bool = True) -> None:
    """Train the recipe's model from random numbers, and write its weights as safetensors."""
    import timm
    from safetensors.torch import save_file

    recipe = load_recipe(str(RECIPE))
    torch.manual_seed(0)
    model = timm.create_model(recipe.model.name, num_classes=10, **recipe.model.options)
    how = Recipe(steps, batch_size=64, lr=2e-3, weight_decay=0.05)
    train(model, _Digits(recipe.images), how, progress=progress)
    save_file(model.state_dict(), file)
