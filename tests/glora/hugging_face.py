"""Tiny models of Transformers, always with the same weights, and data for them."""

import torch
import transformers
from torch.utils.data import Dataset

from tests.glora.toys import generator

VOCABULARY, TOKENS = 32, 10


class Rows(Dataset):
    """Samples as dictionaries: lists, as a tokenizer gives them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def texts(size=12, ignored=True):
    tokens = torch.randint(2, VOCABULARY, (size, TOKENS), generator=generator(1))
    labels = tokens.clone()
    if ignored:
        for row, length in enumerate(torch.randint(2, TOKENS, (size,), generator=generator(2)).tolist()):
            labels[row, length:] = -100
    return Rows(
        [
            {"input_ids": t.tolist(), "attention_mask": [1] * TOKENS, "labels": y.tolist()}
            for t, y in zip(tokens, labels)
        ]
    )


def made(kind, config):
    torch.manual_seed(0)
    return kind(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return made(transformers.LlamaForCausalLM, config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return made(transformers.GPT2LMHeadModel, config)


def t5():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return made(transformers.T5ForConditionalGeneration, config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return made(transformers.ViTForImageClassification, config)


def bert(**options):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        **options,
    )
    return made(transformers.BertForSequenceClassification, config)


def images(size=12):
    pixels = torch.randn(size, 3, 8, 8, generator=generator(4))
    return pixels, torch.arange(size) % 3


def pictures(size=12):
    """With the label as Hugging Face's image data sets name it."""
    return Rows([{"pixel_values": x, "label": int(y)} for x, y in zip(*images(size))])


def bart():
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    return made(transformers.BartForCausalLM, config)
