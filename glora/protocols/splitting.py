"""A seeded split of samples with classes: every class has its share in every part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .lists import Entry

SHARES = {"train": 70.0, "validation": 15.0, "test": 15.0}


def checked_shares(shares: Sequence[float]) -> dict[str, float]:
    """Per cent for training, validation and test by name, without an empty test. Raises ValueError for others."""
    numbers = all(type(share) in (int, float) and share >= 0 for share in shares)
    if len(shares) != 3 or not numbers or abs(sum(shares) - 100) > 1e-6 or not (shares[0] and shares[1]):
        raise ValueError(
            "split: expected per cent for training, validation and test that sum to 100, such as 70 15 15 (the test "
            f"may be 0), got {' '.join(f'{share:g}' for share in shares)}"
        )
    return {name: float(share) for name, share in zip(SHARES, shares) if share}


def split_by_class(
    entries: Sequence[Entry], classes: Sequence[str], shares: Mapping[str, float], seed: int, noun: str
) -> dict[str, tuple[Entry, ...]]:
    """The entries of each part, in their order. Each part gets at least one entry of each class.

    Args:
        classes: the names of the classes.
        shares: relative sizes of the parts by name; what rounding leaves goes to the first.
        noun: what an entry is, for messages.

    Raises:
        ValueError: a class with fewer entries than there are parts; all such classes are named.
    """
    members: list[list[int]] = [[] for _ in classes]
    for index, (_, label) in enumerate(entries):
        members[label].append(index)
    few = [f"{name!r} has {len(each)}" for name, each in zip(classes, members) if len(each) < len(shares)]
    if few:
        raise ValueError(
            f"classes: expected at least {len(shares)} {noun} of each, for {', '.join(shares)}; {', '.join(few)}; add "
            "some, or leave the class out"
        )
    chosen: dict[str, list[int]] = {name: [] for name in shares}
    generator = torch.Generator().manual_seed(seed)
    for each in members:
        order = torch.randperm(len(each), generator=generator).tolist()
        for name, size in _sizes(len(each), shares).items():
            chosen[name] += [each[place] for place in order[:size]]
            order = order[size:]
    return {name: tuple(entries[index] for index in sorted(indices)) for name, indices in chosen.items()}


def _sizes(count: int, shares: Mapping[str, float]) -> dict[str, int]:
    """How many of ``count`` entries each part gets."""
    first, *others = shares
    total = sum(shares.values())
    sizes = {name: max(1, round(count * shares[name] / total)) for name in others}
    while sum(sizes.values()) >= count:
        sizes[max(sizes, key=lambda name: sizes[name])] -= 1
    return {first: count - sum(sizes.values()), **sizes}
