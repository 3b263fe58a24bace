"""Data as somebody has them: a folder of images, a CSV file of texts; and tiny models for both."""

import csv
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("bird", "cat", "small dog")  # a name may have a space
LABELS = ("negative", "positive")
WORDS = [
    "the",
    "a",
    "film",
    "movie",
    "was",
    "is",
    "very",
    "good",
    "great",
    "fine",
    "nice",
    "bad",
    "awful",
    "poor",
    "dull",
]

SEARCH = """
[search]
population = 4
top = 2
crossover = 2
mutation = 2
generations = 2
"""

IMAGE_RECIPE = """
[model.options]
img_size = 32
patch_size = 8
embed_dim = 32
depth = 2
num_heads = 2
[training]
epochs = 3
batch_size = 8
lr = 1e-2
workers = 0
"""

TEXT_RECIPE = """
[training]
epochs = 4
batch_size = 8
lr = 1e-2
"""


def write_recipe(folder: Path, own: str) -> Path:
    """A TOML file of ``own`` settings and a short search."""
    file = folder / "tiny.toml"
    file.write_text(own + SEARCH)
    return file


def write_images(folder: Path, each: int = 12, classes: tuple[str, ...] = CLASSES) -> Path:
    """Noise of one colour for each class, ``each`` images of 32 x 32."""
    generator = np.random.default_rng(len(str(folder.name)))
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = generator.normal(60, 30, (32, 32, 3))
            pixels[..., label % 3] += 100
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name / f"{number:03d}.png")
    return folder


def write_texts(file: Path, rows: int = 40, columns: tuple[str, ...] = ("id", "text", "label")) -> Path:
    """Reviews of different lengths, some with commas and line breaks, half of them good."""
    drawn = random.Random(0)
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for number in range(rows):
            label = number % 2
            verdict = drawn.choice(WORDS[7:11] if label else WORDS[11:])
            text = f"the {drawn.choice(WORDS[2:4])} was{' very,' * drawn.randint(0, 3)}\n{verdict}"
            writer.writerow([number, text, LABELS[label]])
    return file


def write_bert(folder: Path, pads: bool = True) -> Path:
    """A BERT of two layers without a head, and a tokenizer of whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"unk_token": "[UNK]", "eos_token": "[SEP]", **({"pad_token": "[PAD]"} if pads else {})}
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=24, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder
