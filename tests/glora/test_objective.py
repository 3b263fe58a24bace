"""Models that return more than a tensor, data that come as dictionaries, losses of a model's own: one rule for all."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import glora
from glora import Recipe, SearchSettings, SearchSpace
from glora.dataset import require_batch
from glora.objective import Objective
from tests.glora.hugging_face import VOCABULARY, Rows, bart, bert, gpt2, images, llama, pictures, t5, texts, vit
from tests.glora.toys import generator, on_ranks

RECIPE = Recipe(steps=4, batch_size=4, lr=1e-2, seed=3)
SPACE = SearchSpace(ranks=(2,), bias_free=True)
SHORT = SearchSettings(population=6, generations=1, top=2, crossover=3, mutation=3)


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


# -- what an independent review found ------------------------------------------------------------------


def length_buckets():
    """Two batches of other lengths, which nothing but this loader can join."""
    rows = [{"input_ids": torch.arange(2, 2 + n), "labels": torch.arange(2, 2 + n)} for n in (3, 3, 5, 5)]
    return DataLoader(Rows(rows), batch_sampler=[[0, 1], [2, 3]]), Rows(rows)


def test_a_loader_is_read_as_it_is():
    loader, rows = length_buckets()
    model = filled(llama())
    expected = glora.evaluate(model, rows, 1)
    assert glora.evaluate(model, loader).loss == pytest.approx(expected.loss, rel=1e-6)
    found = glora.search(model, SPACE, loader, metric="loss", settings=SHORT, progress=False)
    truth = glora.evaluate_merged(model, found.best.paths, loader)
    assert found.best.score == pytest.approx(-truth.loss, rel=1e-6)
    x, y = points()
    model = filled(Returning(lambda y: y))
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]  # a data set of batches
    assert tuple(glora.evaluate(model, DataLoader(batches, batch_size=None))) == pytest.approx(
        tuple(glora.evaluate(model, TensorDataset(x, y)))
    )
    dropped = glora.evaluate(model, DataLoader(TensorDataset(x, y), 5, drop_last=True))
    assert dropped == glora.evaluate(model, TensorDataset(x[:10], y[:10]), 5)


def test_a_random_loader_gives_the_same_scores_and_a_journal_that_is_continued(tmp_path):
    data, model = TensorDataset(*points()), filled(Returning(lambda y: y))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for own in (None, torch.Generator().manual_seed(5)):
        loader = DataLoader(data, 3, sampler=SubsetRandomSampler([3, 5, 1, 7, 8], generator=own))
        before = None if own is None else own.get_state()
        journal = tmp_path / f"journal-{own is None}"
        options = {"metric": "loss", "settings": SHORT, "journal": journal, "progress": False}
        found = glora.search(model, SPACE, loader, **options)
        again = glora.search(model, SPACE, loader, **options)
        assert (again.evaluated, again.history) == (0, found.history)
        assert glora.evaluate(model, loader) == glora.evaluate(model, loader)
        assert before is None or torch.equal(own.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"^settings.halving: expected \(\) with a DataLoader"):
        glora.search(model, SPACE, loader, settings=SearchSettings(halving=(0.5, 1)), progress=False)


@pytest.mark.parametrize("shape", [(3,), (4, 4)])
def test_targets_in_pairs_are_as_torch_has_them_where_shapes_leave_a_choice(shape):
    """As many classes as rows: the classes come first, as in cross_entropy."""
    logits = torch.randn(5, shape[0], *shape, generator=generator(3))
    target = torch.randint(0, shape[0], (5, *shape), generator=generator(4))
    objective = Objective(nn.Identity())
    assert objective.loss(logits, target) == pytest.approx(float(F.cross_entropy(logits, target)))
    assert float(objective.accuracy(logits, target)) == pytest.approx(
        float((logits.argmax(1) == target).float().mean())
    )
    if len(shape) == 1:
        named = objective.loss(logits, target, named=True)
        assert named == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), target.flatten())))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("wrap", [lambda y: {"loss": y.sum() * 0 + 7, "logits": y}, lambda y: (y.sum() * 0 + 7, y)])
def test_a_loss_of_a_model_that_was_given_no_labels_is_none_of_its_targets(wrap, named):
    data = Rows([{"values": x, "labels": int(y)} for x, y in zip(*points())]) if named else TensorDataset(*points())
    model, plain = filled(Returning(wrap)), filled(Returning(lambda y: y))
    expected = TensorDataset(*points())
    assert glora.evaluate(model, data) == glora.evaluate(plain, expected)
    one = glora.train(model, data, RECIPE, progress=False)
    assert one.losses == glora.train(plain, expected, RECIPE, progress=False).losses


@pytest.mark.parametrize(("make", "moved"), [(llama, True), (bart, False), (t5, False)])
def test_whether_targets_are_moved_is_what_the_model_says(make, moved):
    """Not what its class is called: BartForCausalLM does not move them."""
    model = make().eval()
    found, (loss, accuracy) = glora.evaluate(model, texts()), true_loss(model, texts(), moved)
    assert (found.loss, found.accuracy) == (pytest.approx(loss, rel=1e-5), pytest.approx(accuracy, abs=1e-12))
    for loss_fn in (F.cross_entropy, nn.CrossEntropyLoss()):
        assert glora.evaluate(model, texts(), 100, loss_fn=loss_fn).loss == pytest.approx(loss, rel=1e-5)
    smoothed = Objective(model, label_smoothing=1e-9)
    batch = require_batch("dataset", {name: torch.tensor([row[name] for row in texts()]) for name in texts()[0]})
    assert float(smoothed.loss(smoothed.output(model, batch), batch.target, True).detach()) == pytest.approx(
        loss, rel=1e-5
    )


def test_a_language_model_within_peft():
    peft = pytest.importorskip("peft")
    expected = glora.evaluate(llama(), texts())
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert tuple(glora.evaluate(model, texts())) == pytest.approx(tuple(expected), rel=1e-6)


def test_processes_weigh_their_shares_by_the_tokens_that_count(tmp_path):
    recipe = Recipe(steps=3, batch_size=4, lr=1e-2)
    one = glora.train(filled(llama().double()), texts(), recipe, space=SPACE, progress=False)
    two = on_ranks(2, tmp_path / "ranks", train_texts, recipe)
    for losses, _ in two:
        assert losses == pytest.approx(one.losses, rel=1e-6)  # the loss of Transformers is fp32
    assert torch.equal(two[0][1], two[1][1])
    alone = train_texts(recipe)
    torch.testing.assert_close(two[0][1], alone[1], rtol=0, atol=1e-5)


def train_texts(recipe):
    model = filled(llama().double())
    losses = glora.train(model, texts(), recipe, space=SPACE, progress=False).losses
    return losses, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def weighted(value):
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, value, 1.0]))


def scaled(value):
    return lambda output, target: value * F.cross_entropy(output, target)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (weighted(1.0), weighted(2.0)),
        (F.cross_entropy, scaled(2.0)),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=1)),
    ],
)
def test_a_journal_knows_the_loss(tmp_path, one, other):
    data, model = TensorDataset(*points()), filled(Returning(lambda y: y))
    options = {"metric": "loss", "settings": SHORT, "journal": tmp_path / "journal", "progress": False}
    found = glora.search(model, SPACE, data, loss_fn=one, **options)
    assert glora.search(model, SPACE, data, loss_fn=one, **options).evaluated == 0 < found.evaluated
    with pytest.raises(ValueError, match="another search"):
        glora.search(model, SPACE, data, loss_fn=other, **options)


def test_targets_that_a_loss_ignores_do_not_count():
    x, y = points()
    y = torch.where(torch.arange(12) < 5, torch.tensor(255), y)
    model = filled(Returning(lambda y: y))
    found = glora.evaluate(model, TensorDataset(x, y), 5, loss_fn=nn.CrossEntropyLoss(ignore_index=255))
    expected = glora.evaluate(model, TensorDataset(x[5:], y[5:]))
    assert (found.loss, found.accuracy) == (pytest.approx(expected.loss, rel=1e-6), expected.accuracy)


class Counted(torch.utils.data.IterableDataset):
    """Says how many samples it has; two processes read each of them twice."""

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(zip(*points(8)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Noisy(), 4, sampler=torch.utils.data.RandomSampler(range(10), generator=torch.Generator())),
        lambda: DataLoader(Noisy(), 4, sampler=torch.utils.data.WeightedRandomSampler([1.0, 2.0] * 5, 10)),
        lambda: DataLoader(Counted(), 3, num_workers=2),
        lambda: DataLoader(
            Noisy(), 2, sampler=torch.utils.data.DistributedSampler(range(10), num_replicas=2, rank=1, seed=3)
        ),
    ],
    ids=["random", "weighted", "iterable", "distributed"],
)
def test_loaders_of_all_kinds_resume(tmp_path, make):
    def run(stop=None):
        def halt(step, _):
            if step == stop:
                raise InterruptedError

        recipe = Recipe(steps=9, lr=1e-2, checkpoint_every=1)
        model = filled(Returning(lambda y: y))
        file = tmp_path / f"{stop is None}.pt" if not list(tmp_path.glob("False.pt")) else tmp_path / "False.pt"
        return glora.train(model, make(), recipe, checkpoint=file, progress=False, on_step=halt).losses

    whole = run()
    with pytest.raises(InterruptedError):
        run(5)
    assert run() == whole


def test_the_epochs_of_a_loader_are_its_passes(tmp_path):
    data = TensorDataset(*points(22))
    validation = TensorDataset(*points())
    log = tmp_path / "log.csv"
    found = glora.train(
        filled(Returning(lambda y: y)),
        DataLoader(data, 5),
        Recipe(steps=11),
        validation=validation,
        log=log,
        progress=False,
    )
    assert sorted(found.validations) == [5, 10, 11]
    assert [line.split(",")[1] for line in log.read_text().splitlines()[1:]][4] == "1.0000"
    assert found.images_per_second * found.seconds == pytest.approx(22 + 22 + 5)


def test_a_traced_model_is_evaluated():
    model, x = Returning(lambda y: y), points()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
    assert glora.evaluate(traced, TensorDataset(*points())) == glora.evaluate(model, TensorDataset(*points()))


def test_the_accuracy_of_a_step_copies_no_logits():
    """Those of a language model are the largest tensor of a step."""
    objective, model = Objective(llama()), llama()
    rows = texts()
    batch = require_batch("dataset", {name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
    output = objective.output(model, batch)
    objective.accuracy(output, batch.target, True)  # the first one looks at the loss
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result._is_view():
                largest.append(result.numel())
            return result

    with Sizes():
        objective.accuracy(output, batch.target, True)
    assert 0 < max(largest) <= batch.target.numel() < output.logits.numel()


RAGGED = [(torch.ones(3), 1), (torch.ones(4), 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"values": points()[0][0], "mask": None, "labels": 1}], "got NoneType under 'mask'; remove such a column"),
        ([{"values": object(), "labels": 1}], "got object under 'values'"),
        ([{"values": points()[0][0], "labels": 1}, {"values": points()[0][0]}], "with the same keys"),
        ([{"values": points()[0][0]}, {"values": points()[0][0], "labels": 1}], "with the same keys"),
        (RAGGED, "expected inputs of one shape and targets of one shape, got others"),
    ],
)
def test_samples_that_cannot_be_joined(rows, message):
    with pytest.raises(TypeError, match=f"^dataset: .*{message}"):
        glora.evaluate(filled(Returning(lambda y: y)), Rows(rows))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(12, 1, dtype=torch.long), r"got torch.int64 \(\d+, 1\)"),
        (torch.zeros(12, 4), r"got torch.float32 \(\d+, 4\)"),
        (torch.full((12,), 3), r"got torch.int64 \(\d+,\) \(Target 3 is out of bounds"),
    ],
)
def test_targets_that_do_not_fit_the_logits(target, message):
    for call in (glora.evaluate, lambda *args: glora.train(*args, RECIPE, progress=False)):
        with pytest.raises(ValueError, match=rf"^dataset: expected targets of the cross-entropy .*{message}"):
            call(filled(Returning(lambda y: y)), TensorDataset(points()[0], target))


def test_classes_of_any_integers_and_one_logit():
    x, y = points()
    model = filled(Returning(lambda y: y))
    expected = glora.evaluate(model, TensorDataset(x, y))
    assert glora.evaluate(model, TensorDataset(x, y.int())) == expected
    binary = glora.evaluate(
        filled(Returning(lambda y: y[:, :1])),
        TensorDataset(x, y > 0),
        loss_fn=lambda output, target: F.binary_cross_entropy_with_logits(output[:, 0], target.float()),
    )
    assert math.isnan(binary.accuracy)


def test_labels_by_the_name_that_the_model_has():
    class Named(Returning):
        def forward(self, values, label):
            logits = super().forward(values)
            return {"loss": F.cross_entropy(logits, label), "logits": logits}

    rows = Rows([{"values": x, "label": int(y)} for x, y in zip(*points())])
    expected = glora.evaluate(filled(Returning(lambda y: y)), TensorDataset(*points()))
    assert tuple(glora.evaluate(filled(Named(lambda y: y)), rows)) == pytest.approx(tuple(expected), rel=1e-6)


def test_losses_of_torch_get_the_logits():
    rows = Rows([{"input_ids": row["input_ids"], "label": index % 3} for index, row in enumerate(texts())])
    model = filled(bert(num_labels=3))
    assert glora.evaluate(model, rows, loss_fn=nn.CrossEntropyLoss()) == pytest.approx(
        tuple(glora.evaluate(model, rows))
    )


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((torch.ones(2, 6),), "expected a tensor, or a dictionary of tensors .*, got tuple"),
        ("abc", "got str"),
        ({"values": [1, 2]}, "got {'values': 'list'}"),
        ({}, "got an empty one"),
        (
            {"values": points()[0], "more": points()[0]},
            r"expected the arguments of the model's forward.*got \['more'\]",
        ),
    ],
)
def test_samples_that_merge_does_not_take(sample, message):
    model = filled(Returning(lambda y: y))
    with pytest.raises(TypeError, match=f"^sample: .*{message}"):
        glora.merge(model, sample)
    assert glora.glora_layers(model)


def test_a_collate_that_is_no_function():
    data, model = TensorDataset(*points()), filled(Returning(lambda y: y))
    for call in (glora.evaluate, lambda *args, **options: glora.search(args[0], SPACE, args[1], **options)):
        with pytest.raises(TypeError, match=r"^collate: expected a function of a list of samples"):
            call(model, data, collate="x")
