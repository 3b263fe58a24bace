"""Classifiers of texts and their tokenizers, from Hugging Face's hub or a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..dataset import LABELS
from ..files import replacing_folder
from ..protocols import TextList


class Tokens(Dataset):
    """A map-style data set of a model's arguments, one dictionary per text, from tensors ``(n, ...)`` by name."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(self.tensors[LABELS])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def tokenized(texts: TextList, tokenizer: Any, max_length: int) -> Tokens:
    """The texts as tokens: cut off after ``max_length``, padded to the longest, their classes under ``labels``."""
    longest = min(max_length, tokenizer.model_max_length)
    given = tokenizer(list(texts.texts), truncation=True, max_length=longest, padding="longest", return_tensors="pt")
    return Tokens({**given, LABELS: torch.tensor([label for _, label in texts.entries])})


def load_tokenizer(name: str, tell: Callable[[str], object] | None = None) -> Any:
    """The tokenizer of a model; one without a padding token pads with that of the end of a text, which it tells.

    Raises:
        ValueError: transformers is not installed; no such model here or on the hub; a tokenizer with neither token.
    """
    transformers = _transformers()
    with _loading(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"model: expected a tokenizer with a padding or an end token, {name!r} has neither")
        tokenizer.pad_token = tokenizer.eos_token
        if tell is not None:
            tell(f"tokenizer: no padding token in {name}; {tokenizer.eos_token!r}, its end of a text, is taken for it")
    return tokenizer


def load_text_classifier(
    name: str, classes: Sequence[str], *, pretrained: bool = True, options: Mapping[str, Any] = {}
) -> nn.Module:
    """A classifier of texts in single precision, for :func:`glora.inject`.

    A classifier head that the weights lack, or have for another number of classes, is drawn from torch's generator.

    Args:
        name: a name on Hugging Face's hub, or a folder with a model and its tokenizer.
        classes: the names of the classes, which go into the model's config.
        pretrained: False leaves everything as randomly initialised.
        options: entries of the model's config that are to be others.

    Raises:
        ValueError: as :func:`load_tokenizer`; a model that cannot classify texts.
    """
    transformers, tokenizer = _transformers(), load_tokenizer(name)
    names = dict(enumerate(classes))
    labels = {"num_labels": len(names), "id2label": names, "label2id": {label: index for index, label in names.items()}}
    with _loading(name):
        config = transformers.AutoConfig.from_pretrained(name, **labels, **options)
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        if not pretrained:
            return transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )


def require_length(model: Any, name: str, max_length: int) -> None:
    """Raise ValueError if a model has fewer positions than ``max_length``."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length: expected at most the {positions} positions of {name}, got {max_length}")


def save_text_classifier(model: Any, name: str, folder: Path) -> None:
    """Write a plain model and the tokenizer of the model ``name`` for ``from_pretrained``, in place of ``folder``."""
    with replacing_folder(folder) as new, _quiet():
        model.save_pretrained(new)
        load_tokenizer(name).save_pretrained(new)


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError("texts: expected the package transformers, found none: pip install 'glora[peft]'") from None
    return transformers


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what transformers and the hub raise into a ValueError that says what to place where."""
    try:
        with _quiet():
            yield
    except Exception as error:  # transformers, its hub and anybody's tokenizer may raise anything
        reason = (str(error) or repr(error)).strip().splitlines()[0]
        raise ValueError(
            f"model: expected a name on Hugging Face's hub, or a folder with config.json, model.safetensors and the "
            f"tokenizer's files, of a model that classifies texts; got {name!r}: {reason}\n  Without a network: "
            f"download the files of https://huggingface.co/{name} into a folder elsewhere (hf download {name} "
            "--local-dir FOLDER), copy it here, and give --model FOLDER"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on fresh heads and its bars; downloads keep theirs."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
