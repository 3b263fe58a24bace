"""Models that return more than a tensor, data that come as dictionaries, losses of a model's own: one rule for all."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import glora
from glora import Recipe, SearchSettings, SearchSpace
from glora.dataset import require_batch
from glora.objective import Objective
from tests.glora.toys import generator

VOCABULARY, TOKENS = 32, 10
RECIPE = Recipe(steps=4, batch_size=4, lr=1e-2, seed=3)
SPACE = SearchSpace(ranks=(2,), bias_free=True)
SHORT = SearchSettings(population=6, generations=1, top=2, crossover=3, mutation=3)


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


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def bert(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        **options,
    )
    return transformers.BertForSequenceClassification(config)


def images(size=12):
    pixels = torch.randn(size, 3, 8, 8, generator=generator(4))
    return pixels, torch.arange(size) % 3


def pictures(size=12):
    """With the label as Hugging Face's image data sets name it."""
    return Rows([{"pixel_values": x, "label": int(y)} for x, y in zip(*images(size))])


def filled(model, std=0.2):
    """GLoRA with support tensors that matter."""
    glora.inject(model, 2)
    with torch.no_grad():
        for index, layer in enumerate(glora.glora_layers(model).values()):
            for parameter in layer.support_parameters():
                parameter.normal_(0, std, generator=generator(index))
    glora.set_paths(model, glora.PathConfig(A="vector", B="lora_2"))
    return model


def true_loss(model, data, shift):
    """Mean loss and accuracy over the targets that count, in fp64, written out."""
    rows = [data[index] for index in range(len(data))]
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        logits = model.eval()(**batch).logits.double()
    target = batch["labels"]
    if shift:
        logits, target = logits[:, :-1], target[:, 1:]
    counts = target != -100
    logits, target = logits[counts], target[counts]
    return float(F.cross_entropy(logits, target)), float((logits.argmax(-1) == target).double().mean())


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize(("make", "shift"), [(llama, True), (gpt2, True), (t5, False)])
def test_the_loss_of_a_language_model_is_a_mean_over_its_tokens(make, shift, batch_size):
    """Also where batches have different numbers of tokens that count."""
    model = make()
    found = glora.evaluate(model, texts(), batch_size)
    loss, accuracy = true_loss(model, texts(), shift)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert found.samples == 12


def test_a_batch_of_one_ignored_token_counts_nothing():
    data = Rows([{"input_ids": [1, 2, 3], "labels": [-100] * 3}, texts(1, ignored=False)[0]])
    data.rows[1] = {name: data.rows[1][name][:3] for name in ("input_ids", "labels")}
    assert glora.evaluate(llama(), data, 1).loss == pytest.approx(glora.evaluate(llama(), Rows(data.rows[1:])).loss)


def test_label_smoothing_is_of_the_targets_of_the_model():
    model, objective = llama(), Objective(llama(), label_smoothing=0.1)
    batch = require_batch(
        "dataset", torch.utils.data.default_collate([dict(zip(r, map(torch.tensor, r.values()))) for r in texts()])
    )
    output = model(**batch.inputs)
    labels = batch.target[:, 1:]
    expected = F.cross_entropy(output.logits[:, :-1].reshape(-1, VOCABULARY), labels.reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(objective.loss(output, batch.target, batch.named), expected)


def test_images_as_dictionaries_are_images_in_pairs():
    """For Transformers' model and its own loss; to the last bit, as its loss is the same cross-entropy."""
    pairs = TensorDataset(*images())
    named, paired = filled(vit()), filled(vit())
    assert tuple(glora.evaluate(named, pictures(), 5)) == pytest.approx(tuple(glora.evaluate(paired, pairs, 5)))
    one = glora.train(named, pictures(), RECIPE, space=SPACE, progress=False)
    other = glora.train(paired, pairs, RECIPE, space=SPACE, progress=False)
    assert one.losses == other.losses
    for (name, a), b in zip(named.named_parameters(), paired.parameters()):
        assert torch.equal(a, b), name
    found = glora.search(named, SPACE, pictures(), metric="loss", settings=SHORT, progress=False)
    expected = glora.search(paired, SPACE, pairs, metric="loss", settings=SHORT, progress=False)
    assert [c.paths for c in found.history] == [c.paths for c in expected.history]
    assert [c.score for c in found.history] == pytest.approx([c.score for c in expected.history], rel=1e-6)


@pytest.mark.parametrize("halving", [(), (0.5, 1)])
@pytest.mark.parametrize("metric", ["loss", "perplexity", "accuracy"])
def test_a_search_over_texts(metric, halving, tmp_path, capfd):
    model = filled(llama())
    settings = SearchSettings(**{**SHORT.to_dict(), "halving": halving})
    options = {"metric": metric, "settings": settings, "journal": tmp_path / "journal"}
    found = glora.search(model, SPACE, texts(), **options)
    truth = glora.evaluate_merged(model, found.best.paths, texts())
    if not halving:
        assert found.best.score == pytest.approx(truth.accuracy if metric == "accuracy" else -truth.loss, rel=1e-6)
        shown = f"perplexity {truth.perplexity:.3f}" if metric == "perplexity" else ""
        assert shown in capfd.readouterr().err
    again = glora.search(model, SPACE, texts(), progress=False, **options)
    assert (again.history, again.evaluated) == (found.history, 0)


def test_a_score_of_ones_own(tmp_path):
    """It is given the merged model, in eval mode, and its journal is its own."""
    model = filled(llama())
    ids = torch.tensor([texts()[0]["input_ids"]])
    seen = []

    def score(merged):
        seen.append((glora.glora_layers(merged), merged.training, torch.is_grad_enabled()))
        return merged(ids).logits.std()

    found = glora.search(model, SPACE, score=score, settings=SHORT, journal=tmp_path / "journal", progress=False)
    assert len(seen) == len(found.history) and all(each == ({}, False, False) for each in seen)
    with glora.using_paths(model, found.best.paths), torch.no_grad():
        assert found.best.score == pytest.approx(float(model.eval()(ids).logits.std()), rel=1e-5)
    assert found.best.score == max(candidate.score for candidate in found.history)
    with pytest.raises(ValueError, match="another search"):
        glora.search(model, SPACE, texts(), metric="loss", settings=SHORT, journal=tmp_path / "journal", progress=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "^validation: expected a data set, or score= in its place, got neither"),
        (
            {"validation": texts(), "score": len},
            ValueError,
            "^score: expected None where validation is scored, got both",
        ),
        ({"score": 3}, TypeError, "^score: expected a function of a model, got int"),
        ({"score": lambda model: None}, TypeError, "^score: expected it to return a number, got NoneType"),
        ({"score": len, "settings": SearchSettings(halving=(0.5, 1))}, ValueError, r"^settings.halving: expected \(\)"),
        ({"validation": Rows([{"pixel_values": torch.ones(3, 8, 8)}])}, TypeError, "^dataset: expected targets, under"),
    ],
)
def test_refusals_of_a_search(options, error, message):
    with pytest.raises(error, match=message):
        glora.search(filled(vit()), SPACE, progress=False, **{"settings": SHORT, **options})


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_targets_that_are_no_classes(kind):
    """The model's own loss, a mean over samples; no accuracy."""
    labels = 1 if kind == "regression" else 3
    model = filled(bert(num_labels=labels, problem_type=kind))
    target = torch.rand(7, labels, generator=generator(8)).round(decimals=2)
    rows = Rows([{"input_ids": row["input_ids"], "labels": y.tolist()} for row, y in zip(texts(7), target)])
    found = glora.evaluate(model, rows, 3)
    batch = {"input_ids": torch.tensor([row["input_ids"] for row in rows]), "labels": target}
    with torch.no_grad():
        assert found.loss == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)
    assert math.isnan(found.accuracy)
    glora.train(model, rows, RECIPE, space=SPACE, progress=False)
    with pytest.raises(ValueError, match=r"^metric: expected 'loss' where targets are no classes"):
        glora.search(model, SPACE, rows, settings=SHORT, progress=False)
    assert math.isfinite(glora.search(model, SPACE, rows, metric="loss", settings=SHORT, progress=False).best.score)


class Returning(nn.Module):
    """A classifier that wraps its logits; its forward takes no labels."""

    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.wrap = nn.Linear(6, 8), nn.Linear(8, 3), wrap

    def forward(self, values):
        return self.wrap(self.head(self.body(values).relu()))


WRAPS = {
    "tensor": (lambda y: y, None),
    "object": (lambda y: SimpleNamespace(logits=y), None),
    "dictionary": (lambda y: {"features": y.exp(), "logits": y}, None),
    "tuple": (lambda y: (y, y.exp()), None),
    "by name": (lambda y: {"out": y}, "out"),
    "by function": (lambda y: [None, {"deep": y}], lambda output: output[1]["deep"]),
}


def points(size=12):
    return torch.randn(size, 6, generator=generator(5)), torch.arange(size) % 3


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("wrap", WRAPS)
def test_every_way_to_return_logits_gives_the_same_bits(wrap, named):
    how, outputs = WRAPS[wrap]
    data = Rows([{"values": x, "labels": int(y)} for x, y in zip(*points())]) if named else TensorDataset(*points())
    model, plain = filled(Returning(how)), filled(Returning(lambda y: y))
    one = glora.train(model, data, RECIPE, space=SPACE, outputs=outputs, progress=False)
    other = glora.train(plain, TensorDataset(*points()), RECIPE, space=SPACE, progress=False)
    assert one.losses == other.losses
    assert glora.evaluate(model, data, outputs=outputs) == glora.evaluate(plain, TensorDataset(*points()))
    found = glora.search(model, SPACE, data, outputs=outputs, settings=SHORT, progress=False)
    assert found.history == glora.search(plain, SPACE, TensorDataset(*points()), settings=SHORT, progress=False).history
    sample = {"values": points()[0]} if named else points()[0]
    assert glora.merge(model, sample, outputs=outputs).model_difference < 1e-5


def test_a_model_may_return_its_loss_in_a_tuple():
    def with_loss(self, values, labels):
        logits = self.head(self.body(values).relu())
        return F.cross_entropy(logits, labels) + 1, logits

    model = filled(type("WithLoss", (Returning,), {"forward": with_loss})(None))
    data = Rows([{"values": x, "labels": int(y)} for x, y in zip(*points())])
    found, expected = glora.evaluate(model, data), glora.evaluate(filled(Returning(lambda y: y)), data)
    assert (found.loss, found.accuracy) == (pytest.approx(expected.loss + 1), expected.accuracy)


def test_a_loss_of_ones_own_gets_the_whole_output_and_labels_the_model_has_not_seen():
    model = filled(bert(num_labels=3))
    rows = Rows([{"input_ids": row["input_ids"], "label": index % 3} for index, row in enumerate(texts())])
    seen = []

    def loss(output, target):
        seen.append((output.loss, target.dtype))
        return F.cross_entropy(output.logits, target)

    own = glora.train(model, rows, RECIPE, space=SPACE, loss_fn=loss, progress=False)
    assert set(seen) == {(None, torch.int64)}
    assert own.losses == pytest.approx(
        glora.train(filled(bert(num_labels=3)), rows, RECIPE, space=SPACE, progress=False).losses
    )
    assert glora.evaluate(model, rows, loss_fn=loss).loss == pytest.approx(glora.evaluate(model, rows).loss)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"values": points()[0][0], "labels": 1, "index": 3},
            r"arguments of the model's forward, \['values'\], got \['index'\] too; remove",
        ),
        (
            {"values": points()[0][0], "labels": 1, "name": "a"},
            r"got str under 'name'; remove such a column .*\['name'\]",
        ),
        ({"values": points()[0][0]}, "expected targets, under 'labels' in samples that are dictionaries, got none"),
    ],
)
def test_dictionaries_that_do_not_fit_the_model(row, message):
    model = filled(Returning(lambda y: y))
    for call in (
        lambda: glora.train(model, Rows([row] * 4), RECIPE, progress=False),
        lambda: glora.evaluate(model, Rows([row])),
    ):
        with pytest.raises(TypeError, match=f"^dataset: .*{message}"):
            call()


def test_samples_of_different_lengths_are_refused_or_padded_by_a_collator():
    rows = [{"input_ids": torch.arange(2, 2 + n), "labels": torch.arange(2, 2 + n)} for n in (3, 5, 4, 5)]
    model = filled(llama())
    with pytest.raises(TypeError, match=r"^dataset: expected samples of one shape .*; pad them by collate="):
        glora.train(model, Rows(rows), RECIPE, progress=False)

    def padded(samples):
        longest = max(len(sample["input_ids"]) for sample in samples)
        pads = {"input_ids": 0, "labels": -100}
        rows = {
            name: [F.pad(row[name], (0, longest - len(row[name])), value=pad) for row in samples]
            for name, pad in pads.items()
        }
        return {name: torch.stack(column) for name, column in rows.items()}

    assert len(glora.train(model, Rows(rows), RECIPE, collate=padded, progress=False).losses) == 4
    by_one = glora.evaluate(model, Rows(rows), 1)
    for found in (
        glora.evaluate(model, Rows(rows), 4, collate=padded),
        glora.evaluate(model, DataLoader(Rows(rows), 2, collate_fn=padded)),
    ):
        assert found.loss == pytest.approx(by_one.loss, rel=1e-5)
    found = glora.search(
        model, SPACE, DataLoader(Rows(rows), 2, collate_fn=padded), metric="loss", settings=SHORT, progress=False
    )
    assert found.best.score == pytest.approx(
        -glora.evaluate_merged(model, found.best.paths, Rows(rows), 1).loss, rel=1e-5
    )


def test_a_loader_trains_with_its_own_batches():
    """Pass after pass, of its own size; a loader that shuffles is seeded by the recipe."""
    data, seen = TensorDataset(*points(10)), []
    model = filled(Returning(lambda y: y))
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    glora.train(model, DataLoader(data, 4), Recipe(steps=5, batch_size=99), progress=False)
    x = points(10)[0]
    for found, expected in zip(seen, [x[:4], x[4:8], x[8:], x[:4], x[4:8]]):
        assert torch.equal(found, expected)
    runs = [
        glora.train(filled(Returning(lambda y: y)), DataLoader(data, 4, shuffle=True), RECIPE, progress=False)
        for _ in "ab"
    ]
    assert runs[0].losses == runs[1].losses
    other = glora.train(
        filled(Returning(lambda y: y)),
        DataLoader(data, 4, shuffle=True),
        Recipe(**{**vars(RECIPE), "seed": 4}),
        progress=False,
    )
    assert other.losses != runs[0].losses


class Noisy(Dataset):
    """Draws at random when it is read."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        x, y = points(10)
        return x[index] + torch.randn(6), y[index]


@pytest.mark.parametrize("stop", [2, 3, 4, 6])
@pytest.mark.parametrize("seeded", [False, True])
def test_a_loader_resumes_to_the_same_bits(tmp_path, stop, seeded):
    """In the middle of a pass and at its end; augmentation and dropout too."""

    def run(checkpoint, stop=None, steps=7):
        model = filled(Returning(lambda y: F.dropout(y, 0.3)))
        own = torch.Generator().manual_seed(1) if seeded else None
        loader = DataLoader(Noisy(), 4, shuffle=True, generator=own)
        recipe = Recipe(steps=steps, batch_size=4, lr=1e-2, checkpoint_every=1)

        def halt(step, _):
            if step == stop:
                raise InterruptedError

        return glora.train(
            model, loader, recipe, space=SPACE, checkpoint=checkpoint, progress=False, on_step=halt
        ), model

    whole, expected = run(tmp_path / "whole.pt")
    with pytest.raises(InterruptedError):
        run(tmp_path / "cut.pt", stop)
    resumed, found = run(tmp_path / "cut.pt")
    assert resumed.resumed_from == stop and resumed.losses == whole.losses
    for a, b in zip(found.parameters(), expected.parameters()):
        assert torch.equal(a, b)


def test_a_loader_is_evaluated_on_the_samples_of_its_sampler():
    data, model = TensorDataset(*points()), filled(Returning(lambda y: y))
    chosen = [3, 5, 1]
    expected = glora.evaluate(model, torch.utils.data.Subset(data, chosen))
    loader = DataLoader(data, 2, sampler=SubsetRandomSampler(chosen))
    assert tuple(glora.evaluate(model, loader)) == pytest.approx(tuple(expected))
    found = glora.search(model, SPACE, loader, metric="loss", settings=SHORT, progress=False)
    assert found.best.score == pytest.approx(-glora.evaluate_merged(model, found.best.paths, loader).loss)
    batches = torch.utils.data.BatchSampler(chosen, 2, drop_last=False)
    assert tuple(glora.evaluate(model, DataLoader(data, batch_sampler=batches))) == pytest.approx(tuple(expected))
    shuffled = DataLoader(data, 5, shuffle=True)
    assert tuple(glora.evaluate(model, shuffled)) == pytest.approx(tuple(glora.evaluate(model, data)), rel=1e-6)


def test_pixels_and_tokens_have_a_target_each():
    torch.manual_seed(0)
    pixels = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1))
    x, y = torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5, 4, 4))
    found = glora.evaluate(pixels, TensorDataset(x, y), 2)
    assert found.loss == pytest.approx(float(F.cross_entropy(pixels(x), y).detach()), rel=1e-5)
    assert found.accuracy == pytest.approx(float((pixels(x).argmax(1) == y).double().mean()))
    tokens = nn.Sequential(nn.Linear(2, 3))
    x, y = torch.randn(5, 7, 2), torch.randint(0, 3, (5, 7))
    y[1, 2:] = -100
    found = glora.evaluate(tokens, TensorDataset(x, y), 2)
    assert found.loss == pytest.approx(float(F.cross_entropy(tokens(x).flatten(0, 1), y.flatten()).detach()), rel=1e-5)


def test_data_sets_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    rows = texts().rows
    data = datasets.Dataset.from_list(rows)
    model = filled(llama())
    expected = glora.evaluate(model, Rows(rows))
    assert glora.evaluate(model, data) == glora.evaluate(model, data.with_format("torch")) == expected
    one = glora.train(filled(llama()), data, RECIPE, space=SPACE, progress=False)
    assert one.losses == glora.train(filled(llama()), Rows(rows), RECIPE, space=SPACE, progress=False).losses
