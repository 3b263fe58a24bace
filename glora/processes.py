"""Several processes that do the same work (ranks): what each has to say, and what rank 0 says to all.

Every function is called by every rank, with the default process group of ``torch.distributed``; with
one process, or no group, it only calls what it is given. An error on one rank is raised on all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

if dist.is_available():
    from torch.distributed.nn import functional

    # These functions keep the process group of their import as a default, which stands for None. PyTorch imports them
    # with the first optimiser, usually after init_process_group, and destroy_process_group could not end gloo's
    # threads. Then a thread that still waits for the interpreter's lock may abort the process at its exit.
    for _function in vars(functional).values():
        if _defaults := getattr(_function, "__defaults__", None):
            _function.__defaults__ = tuple(None if isinstance(d, dist.ProcessGroup) else d for d in _defaults)

T = TypeVar("T")


def has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if has_group() else 1


def process_rank() -> int:
    return dist.get_rank() if has_group() else 0


def is_first() -> bool:
    return process_rank() == 0


def require_group() -> None:
    """Raise ValueError in one of several processes of ``torchrun`` that have not met: each would do the whole work."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if launched and int(os.environ["WORLD_SIZE"]) > 1 and not has_group():
        raise ValueError(
            f"process group: expected torch.distributed.init_process_group() in each of the {os.environ['WORLD_SIZE']} "
            "processes of torchrun, got none"
        )


def gather(call: Callable[[], T]) -> list[T]:
    """On every rank, the list of what ``call`` returns on each rank (anything that pickles).

    Raises:
        RuntimeError: another rank raised; its number and message are given.
    """
    if world_size() == 1:
        return [call()]
    error, own = _outcome(call)
    answers: list[Any] = [None] * world_size()
    dist.all_gather_object(answers, (_text(error), own))
    if error is not None:
        raise error
    for other, (failure, _) in enumerate(answers):
        if failure is not None:
            raise RuntimeError(f"rank {other} failed: {failure}")
    return [answer for _, answer in answers]


def together(call: Callable[[], T]) -> T:
    """What ``call`` returns here, once it has returned on every rank. Raises as :func:`gather` does."""
    kept: list[T] = []
    gather(lambda: kept.append(call()))
    return kept[0]


def from_first(call: Callable[[], T]) -> T:
    """What ``call`` returns on rank 0, the only one to call it.

    Raises:
        ValueError, RuntimeError: on the other ranks, if rank 0 raised a ValueError or anything else, respectively.
    """
    if world_size() == 1:
        return call()
    error, own = _outcome(call) if is_first() else (None, None)
    answer = [(isinstance(error, ValueError), _text(error), own)]
    dist.broadcast_object_list(answer, src=0)
    if error is not None:
        raise error
    refused, failure, value = answer[0]
    if failure is not None:
        raise (ValueError if refused else RuntimeError)(f"rank 0 failed: {failure}")
    return own if is_first() else value  # type: ignore[return-value]


def require_agreement(argument: str, own: Mapping[str, Any]) -> None:
    """Raise ValueError on every rank, naming the first that differs from rank 0 and in what, unless all agree."""
    answers = gather(lambda: dict(own))
    for other, answer in enumerate(answers):
        for key in {**answers[0], **answer}:
            expected, got = answers[0].get(key), answer.get(key)
            if expected != got:
                raise ValueError(
                    f"{argument}: expected the same on every rank, got {key!r} {got} on rank {other} and {expected} "
                    "on rank 0"
                )


def _outcome(call: Callable[[], T]) -> tuple[Exception | None, T | None]:
    try:
        return None, call()
    except Exception as error:  # raised again, once the other ranks know
        return error, None


def _text(error: Exception | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"
