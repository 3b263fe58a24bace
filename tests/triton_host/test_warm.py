"""The command that compiles ahead of time: which builds it takes, what it says, and that a second run finds them."""

import re
import warnings
from collections import Counter

import pytest
import timm
import torch

import glora
from glora_kernels import warm
from glora_kernels._aot.models import calls_of
from glora_kernels._aot.targets import gpu_named
from glora_kernels._aot.work import Job, stored
from glora_kernels.planning.cases import Layer

LINE = re.compile(r"(\d+) builds for (.*): (\d+) compiled, (\d+) were there(?:, (\d+) failed)?, in \d+ s; (.*)\n")
SMALL = ["--shapes", "64x64-", "--ranks", "8", "--inference", "--strategy", "assemble", "--architecture", "cuda:90"]


@pytest.fixture
def planted(monkeypatch):
    """Runs the command with results that are given; returns its status and the jobs it had."""

    def run(arguments, result):
        jobs = []
        monkeypatch.setattr(warm, "stored", lambda todo, _: jobs.extend(todo) or map(result, todo))
        return warm.main(arguments), jobs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return run


def told(capsys):
    return LINE.fullmatch(capsys.readouterr().out.splitlines(keepends=True)[-1]).groups()


def test_what_it_tells(planted, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    status, jobs = planted([*SMALL, "hip:gfx942"], lambda job: job.gpu.backend == "cuda")
    half = str(len(jobs) // 2)
    assert (status, told(capsys)) == (0, (str(len(jobs)), "cuda:90, hip:gfx942", half, half, None, str(tmp_path)))
    assert {job.build.kernel for job in jobs} == {"assemble"}


def test_what_cannot_be_compiled_fails_it(planted, capsys):
    first = []
    status, jobs = planted(SMALL, lambda job: first.append(job) or (len(first) > 1 or "no such thing"))
    assert status == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"FAILED cuda:90 {jobs[0].build.label}: no such thing"
    assert f"0 compiled, {len(jobs) - 1} were there, 1 failed" in printed[-1]


def test_each_option_adds_builds(planted):
    def count(*options):
        return len(planted([*SMALL, *options], lambda job: True)[1])

    least = count()
    assert count("--shapes", "64x64-", "64x64") > least
    assert count("--ranks", "8", "64") > least
    assert count("--product", "hadamard", "matmul") > least
    assert count("--strategy", "assemble", "fused") > least
    training = [option for option in SMALL if option != "--inference"]
    whole = len(planted(training, lambda job: True)[1])
    assert len(planted([*training, "--checkpoints"], lambda job: True)[1]) > whole > least


def test_a_model_is_its_layers_with_their_tokens(planted):
    options = ["--ranks", "8", "--inference", "--architecture", "cuda:90", "--strategy", "assemble"]
    _, jobs = planted(["--model", "vit_tiny_patch16_224", "--batch", "2", *options], lambda job: True)
    _, others = planted(["--shapes", "576x192", "--tokens", "394", *options], lambda job: True)
    assert [job.build._replace(label="") for job in jobs] == [job.build._replace(label="") for job in others]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "8"], "one of the arguments --model --shapes is required"),
        ([*SMALL, "--shapes", "64"], "expected OUTxIN, or OUTxIN- without a bias, got '64'"),
        ([*SMALL, "--ranks", "65"], "ranks: expected integers from 1 to 64, got 65"),
        ([*SMALL, "--ranks", "0"], "expected an integer from 1, got '0'"),
        ([*SMALL, "--architecture", "sm_90"], "architecture: expected a name like cuda:90 or hip:gfx942, got 'sm_90'"),
        ([*SMALL, "--architecture", "cuda:10"], "architecture: expected one of sm_80"),
        ([*SMALL, "--jobs", "0"], "jobs: expected at least 1, got 0"),
        (["--model", "vitt", "--ranks", "8", "--architecture", "cuda:90"], "expected the name of one of timm's models"),
        (["--model", "resnet18", "--ranks", "8", "--architecture", "cuda:90"], "resnet18 has none"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        warm.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_must_be_named(capsys):
    with pytest.raises(SystemExit):
        warm.main(["--shapes", "64x64", "--ranks", "8"])
    assert "architecture: expected a name like cuda:90, since there is no GPU here" in capsys.readouterr().err


def test_what_is_compiled_is_found_again(planted, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    _, jobs = planted(SMALL, lambda job: True)
    refused = jobs[0].build._replace(constexprs={})
    few = [*jobs[:2], Job(refused, gpu_named("cuda:90"))]
    first, second = list(stored(few, 2)), list(stored(few, 1))
    assert first[:2] == [False, False] and second[:2] == [True, True]
    assert "ValueError: signature and constexprs: expected" in first[2]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"]
)
def test_layers_of_a_model_are_those_that_are_adapted(name):
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = glora.inject(timm.create_model(name), rank=4)
    layers = [layer for layer in model.modules() if isinstance(layer, glora.GLoRALinear)]
    wanted = Counter(Layer(layer.out_features, layer.in_features, layer.bias is not None) for layer in layers)
    found = Counter()
    for (layer, _), number in calls_of(name, 2).items():
        found[layer] += number
    assert found == wanted


def test_tokens_are_those_of_a_call():
    assert {tokens for _, tokens in calls_of("vit_tiny_patch16_224", 3)} == {3 * 197}
    swin = calls_of("swin_tiny_patch4_window7_224", 1)
    assert {tokens for _, tokens in swin} == {56**2, 28**2, 14**2, 7**2}
    assert swin[Layer(288, 96), 56**2] == 2 and swin[Layer(192, 384, False), 28**2] == 1
