"""A CSV file of one's own texts: read, split, written down, and trained on to a model for from_pretrained."""

import csv
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

import glora
from glora.cli import main
from glora.protocols import OWN_TEXTS, own_protocol, split_texts
from glora.protocols.own import own_data_from_dict
from glora.runs import find_runs, load_own_recipe, plan_own_runs
from glora.runs.models import make_backbone
from glora.runs.samples import in_memory
from glora.runs.spec import spec_from_dict
from tests.glora.runs.own_data import LABELS, TEXT_RECIPE, write_bert, write_recipe, write_texts
from tests.glora.toys import same_bits, state

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "reviews.csv")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), TEXT_RECIPE)


def command(file, bert, recipe, out, *more):
    given = ["--texts", file, "--model", bert, "--recipe", recipe, "--max-length", 16, "--out", out]
    return ["train", *map(str, given), *map(str, more), "--json"]


@pytest.fixture(scope="module")
def finished(file, bert, recipe, tmp_path_factory):
    study = tmp_path_factory.mktemp("studies") / "study"
    assert main(command(file, bert, recipe, study)) == 0
    for arguments in (["search"], ["merge", "--test"], ["report"]):
        assert main([arguments[0], str(study), *arguments[1:], "--json"]) == 0
    return study


def test_a_refit_is_a_model_for_from_pretrained_too(finished, tmp_path, capsys):
    study = shutil.copytree(finished, tmp_path / "study")
    [found] = find_runs(study)
    assert main(["refit", str(study), "--set", "refit.steps=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["samples"] == 28 + 6
    assert main(["merge", str(study), "--test", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (second["refit"], second["paths"]) == (True, first["paths"])
    models = [
        transformers.AutoModelForSequenceClassification.from_pretrained(f / "merged") for f in (found, found.refit)
    ]
    assert models[1].config.id2label == models[0].config.id2label
    assert not same_bits(*map(state, models))
    assert transformers.AutoTokenizer.from_pretrained(found.refit / "merged").pad_token == "[PAD]"


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_csv(file, lines):
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


# -- the rows --------------------------------------------------------------------------------------


def test_every_class_has_its_share_of_every_part(file):
    split = split_texts(file)
    assert split.data.classes == LABELS and split.data.name == "reviews"
    counts = {part: Counter(label for _, label in entries) for part, entries in split.lists.items()}
    assert counts == {"train": {0: 14, 1: 14}, "validation": {0: 3, 1: 3}, "test": {0: 3, 1: 3}}
    rows = rows_of(file)
    for entries in split.lists.values():
        assert all(rows[int(row) - 1]["label"] == LABELS[label] for row, label in entries)


def test_the_parts_hold_the_texts_of_their_rows(file, tmp_path):
    split = split_texts(file)
    split.write(tmp_path / "split")
    opened = own_protocol(split.data).open(tmp_path / "split", "reviews")
    for found, part in ((opened.train, "train"), (opened.validation, "validation"), (opened.test(), "test")):
        expected = [(rows_of(file)[int(row) - 1]["text"], label) for row, label in split.lists[part]]
        assert [found[index] for index in range(len(found))] == expected
    assert own_data_from_dict(json.loads(json.dumps(split.data.to_dict()))) == split.data


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["b", "10", "9"], ("10", "9", "b")),
        (["--1", "10", "9"], ("--1", "10", "9")),
    ],
    ids=["integers", "names", "signs"],
)
def test_classes_are_sorted(tmp_path, labels, classes):
    lines = ["label,text", *(f"{label},words" for label in labels * 3)]
    assert split_texts(write_csv(tmp_path / "some.csv", lines)).data.classes == classes


def test_other_columns(tmp_path):
    lines = ["stars,review", *(f" {label} ,words" for label in "1122" * 3)]
    split = split_texts(write_csv(tmp_path / "some.csv", lines), ("review", "stars"))
    assert (split.data.classes, split.data.columns) == (("1", "2"), ("review", "stars"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id,body,label", "1,a,x"], r"text_column: expected one column 'text', .* \['id', 'body', 'label'\]"),
        (["text,class", "a,x"], r"label_column: expected one column 'label', .* \['text', 'class'\]"),
        (["text,label,text", "a,x,b"], r"text_column: expected one column 'text'"),
        (["text,label", "a,x", ",y"], r"some.csv: line 3: expected a text and a label, got '', 'y'"),
        (["text,label", "a,x", "b"], r"some.csv: line 3: expected a text and a label, got 'b', ''"),
        (["text,label", "a,x", "b,x"], r"texts: expected at least two classes in the column 'label', got \['x'\]"),
        (["text,label", *["a,x"] * 4, "b,y", "c,y"], r"classes: expected at least 3 rows of each, .*; 'y' has 2"),
    ],
)
def test_what_is_no_table_of_texts_is_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        split_texts(write_csv(tmp_path / "some.csv", lines))


def test_no_file_and_no_text_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"texts: expected a CSV file, found none at"):
        split_texts(tmp_path / "none.csv")
    (tmp_path / "some.csv").write_bytes(b"text,label\n\xff\xfe,x\n")
    with pytest.raises(ValueError, match=r"some.csv: .*utf-8"):
        split_texts(tmp_path / "some.csv")


# -- tokens and models -----------------------------------------------------------------------------


def specs_of(file, bert, tmp_path, changes=(), **options):
    split = split_texts(file)
    split.write(tmp_path / "split")
    recipe = load_own_recipe(OWN_TEXTS, str(bert), changes=changes)
    return plan_own_runs(recipe, split.data, tmp_path / "split", **options)


def test_a_plan_goes_through_json(file, bert, tmp_path):
    [spec] = specs_of(file, bert, tmp_path)
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert (spec.weights, spec.backbone, spec.space.bias_free) == (str(bert), "bert", True)


def test_texts_are_cut_off_and_padded_to_the_longest_of_their_part(file, bert, tmp_path):
    [spec] = specs_of(file, bert, tmp_path, ["texts.max_length=6"])
    [longer] = specs_of(file, bert, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    for each, most in ((spec, 6), (longer, 128)):
        texts = each.protocol.open(each.data, "reviews").train
        tokens = in_memory(texts, each, progress=False)
        alone = [tokenizer(text)["input_ids"][:most] for text, _ in (texts[index] for index in range(len(texts)))]
        for index, ids in enumerate(alone):
            sample = tokens[index]
            assert sample["input_ids"].tolist() == ids + [0] * (max(map(len, alone)) - len(ids))
            assert int(sample["attention_mask"].sum()) == len(ids) and int(sample["labels"]) == texts[index][1]


def test_the_head_depends_on_the_seed_alone_and_knows_the_classes(file, bert, tmp_path):
    one, other = specs_of(file, bert, tmp_path, seeds=[0, 1])
    first, again, second = make_backbone(one), make_backbone(one), make_backbone(other)
    assert same_bits(state(first), state(again))
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    assert first.config.id2label == dict(enumerate(LABELS)) and first.config.num_labels == 2


def test_a_tokenizer_without_padding_pads_with_the_end_and_says_so(file, recipe, tmp_path, capsys):
    bert = write_bert(tmp_path / "bare", pads=False)
    [spec] = specs_of(file, bert, tmp_path)
    assert make_backbone(spec).config.pad_token_id is not None
    arguments = command(file, bert, recipe, tmp_path / "study", "--set", "training.epochs=1")
    assert main(arguments[:-1]) == 0
    assert "tokenizer: no padding token in " in capsys.readouterr().err


def nowhere(*_, **__):
    raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nMore.")


def test_without_a_network_the_message_says_what_to_place_where(file, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", nowhere)
    assert main(command(file, "someone/some-bert", recipe, tmp_path / "study")) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "got 'someone/some-bert': We couldn't connect" in err
    assert "hf download someone/some-bert --local-dir FOLDER" in err and "--model FOLDER" in err
    assert not (tmp_path / "study").exists()


def test_without_transformers_the_message_says_what_to_install(file, bert, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert main(command(file, bert, recipe, tmp_path / "study")) == 2
    assert "pip install 'glora[peft]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-length", 25], "max_length: expected at most the 24 positions"),
        (["--max-length", 0], "max_length: expected an integer from 1"),
        (["--weights", "some.safetensors"], "weights: expected 'hub' or 'none' for texts"),
        (["--set", "model.drop_path=0.1"], "drop_path: expected 0 for a model of texts"),
        (["--label-column", "stars"], "label_column: expected one column 'stars', the file has the columns"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(file, bert, recipe, tmp_path, capsys, more, message):
    assert main(command(file, bert, recipe, tmp_path / "study", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


# -- the runs --------------------------------------------------------------------------------------


def test_every_stage_left_its_files(finished):
    assert {path.name for path in (finished / "reviews-seed0").iterdir()} == {
        *("run.json", "checkpoint.pt", "log.csv", "supernet.safetensors", "train.json"),
        *("search.jsonl", "search.json", "adapter.safetensors"),
        *("merge.json", "merged", "test.json"),
    }
    assert {path.name for path in (finished / "split").iterdir()} == {
        *("data.json", "train.txt", "validation.txt", "test.txt")
    }


def test_the_log_has_the_validation_of_each_epoch(finished):
    rows = np.genfromtxt(finished / "reviews-seed0" / "log.csv", delimiter=",", names=True)
    assert np.isfinite(rows["validation_loss"]).sum() == 4  # epochs
    assert np.isfinite(rows["validation_loss"][-1])


def test_merging_changes_nothing_and_the_head_trained(finished, bert):
    merged = json.loads((finished / "reviews-seed0" / "merge.json").read_text())
    assert merged["model_difference"] < 1e-5 and merged["created_biases"] == [] and merged["same_modules"]
    assert merged["head_parameters"] == 2 * 16 + 2
    [run] = find_runs(finished)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(finished / "reviews-seed0" / "merged")
    assert not torch.equal(model.classifier.weight, make_backbone(run.spec).classifier.weight)


def test_from_pretrained_loads_the_merged_folder_with_equal_logits_and_the_tested_accuracy(finished, file):
    """Nothing but transformers, the CSV file and the written list: what a user of the files does."""
    folder = finished / "reviews-seed0"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "merged")
    rows, right, losses = rows_of(file), [], []
    lines = (finished / "split" / "test.txt").read_text().splitlines()
    [run] = find_runs(finished)
    adapted = glora.load_adapter(make_backbone(run.spec), run / "adapter.safetensors").eval()
    for row, label in (map(int, line.split()) for line in lines):
        given = tokenizer(rows[row - 1]["text"], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            logits = model(**given).logits
            assert torch.allclose(logits, adapted(**given).logits, atol=1e-5)
        right.append(model.config.id2label[int(logits.argmax())] == rows[row - 1]["label"])
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
    tested = json.loads((folder / "test.json").read_text())
    assert (tested["samples"], tested["accuracy"]) == (6, pytest.approx(np.mean(right)))
    assert tested["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_report_does_without_features(finished):
    page = (finished / "report" / "report.md").read_text()
    tested = json.loads((finished / "reviews-seed0" / "test.json").read_text())["accuracy"]
    assert f"| reviews | {100 * tested:.1f} (1 seed) |" in page
    assert "Own data, bert: test accuracy" in page and "t-SNE" not in page


def test_another_search_puts_the_merged_folder_aside(finished, tmp_path):
    study = shutil.copytree(finished, tmp_path / "study")  # a study can be moved
    run = study / "reviews-seed0"
    assert main(["search", str(study), "--again", "--set", "search.seed=5", "--json"]) == 0
    assert (run / "earlier-1" / "merged" / "config.json").is_file() and not (run / "merged").exists()
    assert main(["merge", str(study), "--json"]) == 0
    assert (run / "merged" / "config.json").is_file()


@pytest.mark.parametrize("place", ["training", "test"])
def test_changed_texts_are_refused(finished, recipe, bert, file, tmp_path, capsys, place):
    own = tmp_path / "reviews.csv"
    shutil.copy(file, own)
    assert main(command(own, bert, recipe, tmp_path / "study", "--set", "training.epochs=1")) == 0
    part = "train" if place == "training" else "test"
    row = int((tmp_path / "study" / "split" / f"{part}.txt").read_text().split()[0])
    rows = rows_of(own)
    rows[row - 1]["text"] = "another"
    with open(own, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    capsys.readouterr()
    assert main(command(own, bert, recipe, tmp_path / "study", "--set", "training.epochs=1")) == 2
    assert "the same files with other contents" in capsys.readouterr().err
    if place == "training":
        assert main(["search", str(tmp_path / "study"), "--json"]) == 2
        assert "expected the training texts that it was trained with" in capsys.readouterr().err


def test_changed_weights_are_refused(finished, tmp_path, file, bert, recipe, capsys):
    own = shutil.copytree(bert, tmp_path / "bert")
    assert main(command(file, own, recipe, tmp_path / "study", "--set", "training.epochs=1")) == 0
    write_bert(own, pads=False)  # another tokenizer
    capsys.readouterr()
    assert main(["search", str(tmp_path / "study"), "--json"]) == 2
    assert "expected the weights that it was trained with" in capsys.readouterr().err


def test_a_model_without_biases_gets_none(file, bert, recipe, tmp_path):
    """from_pretrained would drop them."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, max_position_embeddings=24, **sizes)
    llama = shutil.copytree(bert, tmp_path / "llama")
    (llama / "config.json").unlink()
    transformers.LlamaModel(config).save_pretrained(llama)
    study = tmp_path / "study"
    few = ["--set", "training.epochs=1", "--set", "search.generations=1"]
    assert main(command(file, llama, recipe, study, *few)) == 0
    assert main(["search", str(study), "--json"]) == 0 and main(["merge", str(study), "--json"]) == 0
    merged = json.loads((study / "reviews-seed0" / "merge.json").read_text())
    assert merged["created_biases"] == [] and merged["model_difference"] < 1e-4
    transformers.AutoModelForSequenceClassification.from_pretrained(study / "reviews-seed0" / "merged")
