"""All domains of the demonstration; a task has one name in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .digits import DIGITS
from .domain import Domain
from .mnist import MNIST
from .text import TEXT

DOMAINS: Mapping[str, Domain] = {domain.name: domain for domain in (DIGITS, MNIST, TEXT)}
_OF_TASK = {task: domain for domain in DOMAINS.values() for task in domain.tasks}


def named_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The tasks of those names, where a domain's name stands for its first task.

    Raises:
        ValueError: none, an unknown name or one twice, or tasks of several domains.
    """
    tasks = tuple(DOMAINS[name].tasks[0] if name in DOMAINS else name for name in names)
    if not tasks or not set(tasks) <= set(_OF_TASK) or len(set(tasks)) != len(tasks):
        known = "; ".join(f"{domain.name}: {', '.join(domain.tasks)}" for domain in DOMAINS.values())
        raise ValueError(f"tasks: expected distinct names out of {known}; got {list(names)}")
    domains = sorted({_OF_TASK[task].name for task in tasks})
    if len(domains) > 1:
        raise ValueError(f"tasks: expected tasks of one domain, got {list(names)} of {' and '.join(domains)}")
    return tasks


def domain_of(tasks: Sequence[str]) -> Domain:
    """The domain of :func:`named_tasks`."""
    return _OF_TASK[tasks[0]]
