"""Terms: which part of a storage each kind reads, and taking them apart and together."""

import torch

from glora_kernels import Constant, LowRank, Terms, Vector
from tests.helpers import ALL_PATHS, make_call


def test_flatten_and_unflatten_are_inverse():
    for path in ALL_PATHS:
        terms = make_call(path, product="matmul")[3]
        storages, structure = terms.flatten()
        again = Terms.unflatten(storages, structure)
        assert again.product == "matmul"
        assert [slot for slot, _ in again.active] == [s for s, choice in zip("ABCDE", path) if choice != "none"]
        assert all(a is b for a, b in zip(again.flatten()[0], storages))
        assert hash(structure) == hash(again.flatten()[1])


def test_what_is_read():
    storage = torch.arange(12.0).reshape(4, 3)
    down, up = LowRank(storage, storage.t(), 2).factors
    assert (down.shape, up.shape) == ((4, 2), (2, 4))
    assert torch.equal(Vector(storage).entries, storage[:, 0])
    assert torch.equal(Vector(storage[:, 1]).entries, storage[:, 1])
    assert Constant(storage + 5).entry == 5


def test_views_share_memory_with_the_storage():
    storage = torch.zeros(4, 3)
    for view in (*LowRank(storage, storage.t(), 2).factors, Vector(storage).entries, Constant(storage).entry):
        assert view.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
