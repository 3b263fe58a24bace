"""Small models, data and checks for the tests of the package, and processes that are killed."""

from __future__ import annotations

import datetime
import faulthandler
import itertools
import multiprocessing
import shutil
import sys
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import glora
from glora import PathConfig
from glora.files import parts

IN_FEATURES, CLASSES = 6, 3
# What a killed process imports is loaded once, in the server that its children are forked from.
multiprocessing.set_forkserver_preload(
    ["pytest", "glora", "timm.scheduler", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"]
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_path(rank: int) -> list[PathConfig]:
    """The 432 paths of one rank."""
    weight = (f"lora_{rank}", "vector", "constant", "none")
    prompt = (f"lora_{rank}", "vector", "none")
    bias = ("vector", "constant", "none")
    return [PathConfig(*kinds) for kinds in itertools.product(weight, weight, prompt, bias, bias)]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Makes what the block draws from torch's generator always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def mlp(dropout: float = 0.0, bias: bool = True) -> nn.Sequential:
    """Two linear layers to adapt, ``fc1`` and ``fc2``, and a ``head``: always the same weights."""
    with seeded():
        return nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(IN_FEATURES, 8, bias),
                act=nn.GELU(),
                drop=nn.Dropout(dropout),
                fc2=nn.Linear(8, 5, bias),
                head=nn.Linear(5, CLASSES),
            )
        )


def adapted_mlp(
    rank: int = 2,
    dropout: float = 0.0,
    bias: bool = True,
    product: str = "hadamard",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    with seeded():
        return glora.inject(mlp(dropout, bias).to(dtype), rank, product=product)


def trained_mlp(rank: int = 2, seed: int = 0, **options) -> nn.Module:
    """As after training: no support tensor is zero, every layer has a path of its own, the head has moved."""
    model = adapted_mlp(rank, **options)
    randomize(model, seed)
    glora.set_paths(model, glora.sample_paths(model, glora.SearchSpace((rank,)), generator(seed)))
    return model


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Every parameter that is trained takes random values."""
    gen = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=gen) * 0.3)


def tiny_vit() -> nn.Module:
    """A ViT of two blocks for images of 8 x 8, as timm makes it: 8 linear layers and a head."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    with seeded():
        return VisionTransformer(**sizes, num_classes=CLASSES).eval()


def points(count: int = 12) -> TensorDataset:
    x = torch.randn(count, IN_FEATURES, generator=generator())
    return TensorDataset(x, torch.arange(count) % CLASSES)


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal names and bytes; a NaN equals itself."""
    return list(one) == list(other) and all(torch.equal(_bytes(one[name]), _bytes(other[name])) for name in one)


def _bytes(tensor: Tensor) -> Tensor:
    return torch.cat([part.contiguous().reshape(-1).view(torch.uint8) for part in parts(tensor)])


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Holds the block to leave modules, flags, bits and paths of ``model`` exactly as they were."""

    def description() -> tuple:
        modules = [(name, module, module.training) for name, module in model.named_modules(remove_duplicate=False)]
        parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
        return modules, parameters, glora.get_paths(model)

    before, bits = description(), state(model)
    yield
    assert description() == before
    assert same_bits(state(model), bits)


def exit_code(function: Callable, *arguments) -> int:
    """Run ``function`` in a process of its own; -9 says that it was killed."""
    process = _forked(function, arguments)
    process.join(300)
    return _killed(process)


def at_once(*calls: tuple) -> None:
    """Each ``(function, *arguments)`` in a process of its own, all at the same time; none may fail."""
    processes = [_forked(function, arguments) for function, *arguments in calls]
    for process in processes:
        process.join(300)
    assert [_killed(process) for process in processes] == [0] * len(calls)


def on_ranks(count: int, folder: Path, function: Callable, *arguments) -> list:
    """What ``function`` returns in each of ``count`` processes of a gloo group; an error in any of them raises.

    Where a signal ended a rank (PyTorch's native code, once in some hundred runs) all of them run once more, from the
    same files; the standard error says so and where that rank was.
    """
    kept = {file: file.read_bytes() for files in arguments if isinstance(files, Path) for file in files.glob("*.*")}
    codes, failures = _run_ranks(count, folder, function, arguments)
    if any(code < 0 for code in codes):
        crashes = "\n".join(file.read_text() for file in sorted(folder.glob("*.crash")))
        print(f"on_ranks: {function.__name__} ended with {codes}, runs once more\n{crashes}", file=sys.__stderr__)
        for file in {file for files in arguments if isinstance(files, Path) for file in files.glob("*.*")}:
            file.unlink()
        for file, content in kept.items():
            file.write_bytes(content)
        shutil.rmtree(folder)
        codes, failures = _run_ranks(count, folder, function, arguments)
    assert not any(codes) and not failures, f"{codes}\n" + "\n".join(failures)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run_ranks(count: int, folder: Path, function: Callable, arguments: tuple) -> tuple[list[int], list[str]]:
    """The exit code of each rank, and the traceback of those that raised."""
    folder.mkdir()
    processes = [_forked(_on_rank, (rank, count, folder, function, arguments)) for rank in range(count)]
    for process in processes:
        process.join(300)
    return [_killed(process) for process in processes], [file.read_text() for file in sorted(folder.glob("*.txt"))]


def _on_rank(rank: int, count: int, folder: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*pin_memory.*")
    warnings.filterwarnings("ignore", "lr: expected steps")  # tests take large steps
    options = {"rank": rank, "world_size": count, "timeout": datetime.timedelta(seconds=60)}
    with open(folder / f"{rank}.crash", "w") as crash:
        faulthandler.enable(crash)
        dist.init_process_group("gloo", f"file://{folder}/store", **options)
        try:
            torch.save(function(*arguments), folder / f"{rank}.pt")
            dist.barrier()
        except BaseException:
            (folder / f"{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
            raise
        finally:
            dist.destroy_process_group()
            faulthandler.disable()


def kill_while_writing(file: Path, after: float, function: Callable, *arguments) -> int:
    """As :func:`exit_code`, but kill the process ``after`` seconds from when it first changed ``file``."""
    before = _stamp(file)
    process = _forked(function, arguments)
    while process.is_alive() and _stamp(file) == before:
        time.sleep(1e-3)
    process.join(after)
    return _killed(process)


def _forked(function: Callable, arguments: tuple):
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    return process


def _killed(process) -> int:
    process.kill()
    process.join()
    return process.exitcode


def _stamp(file: Path) -> tuple | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
