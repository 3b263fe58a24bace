"""glora.train in CUDA graphs, over an emulation of them: the run without graphs, step by step and file by file."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

import glora
from glora import Recipe, SearchSpace, glora_layers, inject, set_paths, train
from glora.dataset import joined
from glora.training.results import Results
from tests.glora.hugging_face import llama, texts
from tests.glora.toys import CLASSES, IN_FEATURES, adapted_mlp, generator, points, same_bits, seeded, state, tiny_vit
from tests.graph_emulation import emulate

SPACE = SearchSpace((2, 1))
RECIPE = Recipe(steps=12, batch_size=5, lr=0.02, weight_decay=0.1, warmup=0.25, seed=3, checkpoint_every=4)
MODES = ("piecewise", "whole")


class CutError(Exception):
    """The run ends here."""


def recipe(**changes):
    return Recipe(**{**vars(RECIPE), **changes})


def double(dropout=0.3):
    return adapted_mlp(dropout=dropout, dtype=torch.float64)


def data():
    x, target = points().tensors
    return TensorDataset(x.double(), target)


def run(model, recipe=RECIPE, dataset=None, **options):
    return train(model, dataset or data(), recipe, **{"space": SPACE, "progress": False, **options})


def tolerance(*modes):
    """Of values after some steps. In one graph AdamW's rates and bias corrections are fp32, whatever the parameters."""
    return 1e-5 if "whole" in modes else 1e-10


def assert_same(found, expected, tolerance):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def assert_same_files(found, expected, tolerance):
    """Two checkpoints: numbers within ``tolerance``, everything else exactly."""
    found, expected = (torch.load(file, weights_only=True) for file in (found, expected))
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"tensors", "optimizer", "records", "seconds"}:
        assert str(found[key]) == str(expected[key]), key
    assert_same(found["tensors"], expected["tensors"], tolerance)
    assert found["records"] == [pytest.approx(record, rel=10 * tolerance) for record in expected["records"]]
    for index, moments in found["optimizer"]["state"].items():
        wanted = expected["optimizer"]["state"].get(index)
        if wanted is None:  # never read: a whole step makes it beforehand, and it is zero
            assert not any(tensor.count_nonzero() for tensor in moments.values())
        else:
            assert_same(moments, wanted, tolerance)


@pytest.fixture
def files(tmp_path):
    return tmp_path / "graphed.pt", tmp_path / "eager.pt"


# -- the run without graphs ------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", ["auto", "whole"])
def test_500_steps_of_the_run_without_graphs(graphs, monkeypatch, files):
    """Parameters, losses, accuracies, moments, random generators."""
    long = recipe(steps=500, lr=2e-3, clip_norm=0.5, label_smoothing=0.1, checkpoint_every=100)
    plain, graphed = double(), double()
    expected = run(plain, long, checkpoint=files[1])
    assert expected.graphs == "off"
    emulated = emulate(monkeypatch)
    found = run(graphed, long, checkpoint=files[0], graphs=graphs)
    assert found.graphs == {"auto": "piecewise"}.get(graphs, graphs)
    assert emulated.replays == {"auto": 501 * 4, "whole": 500}[graphs]  # pieces are tried once
    assert all(p.grad is None for p in graphed.parameters())  # nothing holds the memory of graphs
    assert found.losses == pytest.approx(expected.losses, rel=10 * tolerance(graphs))
    assert_same(state(graphed), state(plain), tolerance(graphs))
    assert_same_files(*files, tolerance(graphs))


@pytest.mark.parametrize("then", ["off", *MODES])
@pytest.mark.parametrize("cut", [1, 6, 8])
@pytest.mark.parametrize("graphs", MODES)
def test_a_run_that_was_cut_goes_on_in_any_mode(graphs, then, cut, monkeypatch, files):
    """To the same bits in the same mode, and as far as rounding allows in another one."""
    emulate(monkeypatch)
    uncut = double()
    losses = run(uncut, graphs=then, checkpoint=files[1]).losses

    def stop(step, loss):
        if step == cut:
            raise CutError

    with pytest.raises(CutError):
        run(double(), graphs=graphs, checkpoint=files[0], on_step=stop)
    torch.manual_seed(99)  # whatever happens in between
    model = double()
    resumed = run(model, graphs=then, checkpoint=files[0])
    assert resumed.resumed_from == cut // 4 * 4
    near = tolerance(graphs, then)
    assert resumed.losses == pytest.approx(losses, rel=10 * near)
    assert_same(state(model), state(uncut), near)
    assert_same_files(*files, near)
    if then == graphs:
        assert resumed.losses == losses
        assert same_bits(state(model), state(uncut))


@pytest.mark.parametrize("graphs", MODES)
def test_a_fixed_path(graphs, monkeypatch):
    plain, graphed = double(), double()
    for model in (plain, graphed):
        set_paths(model, glora.PathConfig(A="vector", B="lora_2", E="constant"))
    expected = run(plain, space=None)
    emulated = emulate(monkeypatch)
    found = run(graphed, space=None, graphs=graphs)
    assert emulated.captures == {"piecewise": 4, "whole": 1}[graphs]
    assert found.losses == pytest.approx(expected.losses, rel=10 * tolerance(graphs))
    assert_same(state(graphed), state(plain), tolerance(graphs))


def test_a_vit(monkeypatch):
    """The exact gradient of its biases of keys is zero: what AdamW makes of that is rounding, times its rate / eps."""

    def start(graphs):
        with seeded():
            model = inject(tiny_vit(), 2).double()
        images = torch.randn(8, 1, 8, 8, generator=generator(), dtype=torch.float64)
        return run(model, dataset=TensorDataset(images, torch.arange(8) % 3), graphs=graphs), state(model)

    expected, tensors = start("off")
    emulate(monkeypatch)
    found, others = start("auto")
    assert found.graphs == "piecewise"
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert_same(others, tensors, 1e-5)


def test_layers_that_on_step_replaces(monkeypatch, capfd):
    """They are captured anew if the optimiser has their tensors; otherwise the run goes on without graphs."""
    emulated = emulate(monkeypatch)
    model, other = double(), double()

    def replace(step, loss):
        if step == 4:  # a layer around the very same tensors
            model.fc1 = copy.copy(model.fc1)

    found = run(model, on_step=replace)
    assert (found.graphs, emulated.captures) == ("piecewise", 16)
    assert found.losses == pytest.approx(run(other, graphs="off").losses, rel=1e-9)

    def move(step, loss):
        if step == 4:
            for parameter in model.fc1.support_parameters():
                parameter.data = parameter.data.clone()

    model = double()
    assert run(model, on_step=move).losses == found.losses
    assert emulated.captures == 32

    def replace_by_copies(step, loss):
        model.fc1 = copy.deepcopy(model.fc1)

    summary = train(model, data(), RECIPE, space=SPACE, on_step=replace_by_copies)
    assert summary.graphs.startswith("off: optimizer: expected every parameter")
    assert capfd.readouterr().err.count("without CUDA graphs") == 1


# -- when it is left alone --------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_said(capfd):
    assert train(double(), data(), RECIPE, space=SPACE).graphs == "off"
    assert "CUDA graphs" not in capfd.readouterr().err


def test_a_plain_model_has_nothing_to_capture(monkeypatch, capfd):
    emulate(monkeypatch)
    assert train(nn.Linear(IN_FEATURES, CLASSES).double(), data(), RECIPE).graphs == "off"
    assert "CUDA graphs" not in capfd.readouterr().err


def twice():
    with seeded():
        layer = nn.Linear(IN_FEATURES, IN_FEATURES)
        return inject(nn.Sequential(layer, nn.GELU(), layer, nn.Linear(IN_FEATURES, CLASSES)).double(), 2)


def patched():
    model = double()
    model.fc1.forward = type(model.fc1).forward.__get__(model.fc1)
    return model


class Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def checkpointed():
    return Checkpointed(double())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.compile(double(), backend="eager"), "expected one that is not compiled"),
        (twice, "expected every adapted layer to run once a step, got by name {'0': 2}"),
        (patched, "expected layers that run the forward of their class"),
        (checkpointed, "expected no activation checkpointing around adapted layers"),
    ],
    ids=["compiled", "twice", "patched", "checkpointed"],
)
def test_one_line_says_why_steps_run_without_graphs(make, reason, monkeypatch, capfd):
    plain, model = make(), make()
    expected = run(plain)
    emulate(monkeypatch)
    found = train(model, data(), RECIPE, space=SPACE)
    assert found.graphs == f"off: model: {reason}" + found.graphs.partition(reason)[2]
    assert found.losses == expected.losses
    assert same_bits(state(model), state(plain))
    lines = [line for line in capfd.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert len(lines) == 1
    assert lines[0].endswith(f"train: steps run without CUDA graphs: {found.graphs[5:]}")
    with pytest.raises(ValueError, match=r"^model: expected"):
        run(make(), graphs="piecewise")


@pytest.mark.parametrize("late", [False, True], ids=["capture", "step"])
def test_too_little_memory(late, monkeypatch, capfd):
    """To capture, or for a step with what was captured. Buffers and random numbers are as if nothing had been tried."""
    plain, model = double(), double()
    expected = run(plain)
    emulated = emulate(monkeypatch)
    capture = emulated.capture_pieces

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore about it.")

    def capture_then_fail(pieces, inputs):
        capture(pieces, inputs)
        pieces[0].forward = out_of_memory

    monkeypatch.setattr(emulated, "capture_pieces", capture_then_fail if late else out_of_memory)
    found = train(model, data(), RECIPE, space=SPACE)
    assert found.graphs == "off: CUDA out of memory."
    assert "steps run without CUDA graphs: CUDA out of memory.\n" in capfd.readouterr().err.replace("\r", "\n")
    assert found.losses == expected.losses
    assert same_bits(state(model), state(plain))
    with pytest.raises(torch.OutOfMemoryError):
        run(double(), graphs="piecewise")


class Ragged(Dataset):
    """Inputs of 3 or of 4 tokens: those of a batch have one length."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.randn(4, IN_FEATURES, generator=generator(index), dtype=torch.float64), index % CLASSES


class Mean(nn.Module):
    """The mean of tokens; of the first three alone in every other call."""

    def __init__(self, body):
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, x):
        return self.body(x).mean(1)


def collated_to(lengths):
    turns = itertools.cycle(lengths)

    def shorten(samples):
        x, target = joined(samples)
        return x[:, : next(turns)], target

    return shorten


def test_batches_of_changing_shapes(monkeypatch, capfd):
    """Those of the first shape run in graphs, the others as ever."""
    plain, graphed = Mean(double()), Mean(double())
    expected = run(plain, dataset=Ragged(), collate=collated_to((4, 4, 3)))
    emulated = emulate(monkeypatch)
    found = train(graphed, Ragged(), RECIPE, space=SPACE, collate=collated_to((4, 4, 3)))
    assert (found.graphs, emulated.replays) == ("piecewise", (8 + 1) * 4)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert_same(state(graphed), state(plain), 1e-10)
    lines = [line for line in capfd.readouterr().err.splitlines() if "CUDA graphs" in line]
    assert len(lines) == 1
    assert lines[0].endswith(
        "train: steps of batches such as (5, 3, 6) run without CUDA graphs, which were captured for those of the first "
        "step"
    )


def test_a_language_model_and_its_own_loss(monkeypatch):
    """Batches as dictionaries: the labels are moved by one token, for the accuracy too."""
    plain, graphed = inject(llama().double(), 2), inject(llama().double(), 2)
    graphed.load_state_dict(plain.state_dict())
    expected = run(plain, dataset=texts())
    emulated = emulate(monkeypatch)
    found, layers = run(graphed, dataset=texts()), len(glora_layers(graphed))
    assert (found.graphs, emulated.replays) == ("piecewise", (RECIPE.steps + 1) * 2 * layers)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert_same(state(graphed), state(plain), 1e-9)


def test_samples_without_labels_run_without_graphs(monkeypatch, capfd):
    class WithLoss(Mean):
        def forward(self, x):
            return {"loss": super().forward(x).square().mean()}

    rows = [{"x": x} for x, _ in (Ragged()[index] for index in range(8))]
    plain, graphed = WithLoss(double()), WithLoss(double())
    expected = run(plain, dataset=rows)
    emulate(monkeypatch)
    found = train(graphed, rows, RECIPE, space=SPACE)
    assert found.graphs == "off: the samples have no 'labels', and graphs need a target"
    assert found.losses == expected.losses
    with pytest.raises(ValueError, match="the samples have no 'labels'"):
        run(graphed, dataset=rows, graphs="piecewise")
    with pytest.raises(ValueError, match=r"^x: expected a tensor in the mode 'whole', got a mapping"):
        run(double(), dataset=[{"input": row["x"][0], "labels": 1} for row in rows], graphs="whole")


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ("half", "graphs: expected one of .*'auto', 'piecewise', 'whole', 'off'.*, got 'half'"),
        ("whole", "graphs: expected 'auto' or 'off' on the device cpu, which has no CUDA graphs; got 'whole'"),
    ],
)
def test_refuses_a_choice(graphs, message):
    with pytest.raises(ValueError, match=message):
        run(double(), graphs=graphs)


def test_an_error_without_a_message(monkeypatch):
    emulate(monkeypatch)
    looked = []

    def loss_fn(output, target):
        looked.append(1)
        if len(looked) == 1:
            raise ValueError
        return nn.functional.cross_entropy(output, target)

    assert run(double(), loss_fn=loss_fn).graphs == "off: ValueError()"


# -- results that are read late ---------------------------------------------------------------------


def test_results_come_a_step_late():
    records = []
    results = Results(records, late=True)
    for step in range(3):
        results.add(0.1, torch.tensor(step + 0.5), None)
        assert [record.loss for record in results.read()] == ([] if step == 0 else [step - 0.5])
    assert [record.loss for record in results.read(every=True)] == [2.5]
    assert [record.loss for record in records] == [0.5, 1.5, 2.5]
    assert all(math.isnan(record.accuracy) for record in records)
    results.add(0.1, math.inf, 0.5)
    results.add(0.1, 1.0, 0.5)
    with pytest.raises(ValueError, match="loss: expected a finite value, got inf at step 3"):
        results.read()


@pytest.mark.parametrize("graphs", ["off", *MODES])
def test_a_run_that_reads_late_has_the_same_files(graphs, monkeypatch, files, capfd):
    """As on a GPU: every checkpoint and the summary have all steps, and so has the bar."""
    emulate(monkeypatch)
    expected = run(double(), graphs=graphs, checkpoint=files[1])
    monkeypatch.setattr("glora.training.loop.Results", lambda records, late: Results(records, True))
    cut = []

    def save(state, checkpoint, log):
        cut.append(len(state.records))
        state.save(checkpoint)

    monkeypatch.setattr("glora.training.loop._save", save)
    found = run(double(), graphs=graphs, checkpoint=files[0], progress=True)
    assert cut == [4, 8, 12]
    assert found.losses == expected.losses
    assert_same_files(*files, 0)
    assert "12/12" in capfd.readouterr().err
