"""Finding one call of a network; with a Trainer this is tested in `tests/callbacks/test_insert.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from qat_lightning.errors import NetworkError
from qat_lightning.example import MAX_BATCH, _peek, _peek_all, examples_from_user, from_user

X = torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, 1, []),
        ((X, X), 2, []),
        ([X, 3], 2, []),
        ({"x": X, "n": 3}, 0, ["x", "n"]),
        (({"x": X},), 1, []),
    ],
)
def test_from_the_user(given: Any, args: int, kwargs: list[str]) -> None:
    example = from_user(given)
    assert (len(example.args), list(example.kwargs)) == (args, kwargs)


def test_an_example_is_a_detached_copy_in_float32_of_2_to_32_samples() -> None:
    leaf = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    (tidy,) = from_user(leaf).args
    assert (tidy.shape, tidy.dtype, tidy.requires_grad) == ((2, 3), torch.float32, False)
    (labels,) = from_user(torch.zeros(50, dtype=torch.int64)).args
    assert (labels.shape, labels.dtype) == ((MAX_BATCH,), torch.int64)


def test_for_several_networks() -> None:
    examples = examples_from_user({"a": X, "b.c": (X, X)}, ["a", "b.c"])
    assert len(examples["b.c"].args) == 2
    assert list(examples_from_user({"a": X}, ["net"])["net"].kwargs) == ["a"]
    with pytest.raises(NetworkError, match=r"\['a'\].*'a', 'b'"):
        examples_from_user({"a": X}, ["a", "b"])


class Keyed(TensorDataset):
    """Takes only the keys that its sampler gives."""

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            raise KeyError(key)
        return self.tensors[0][int(key)]


def loaders() -> list[DataLoader[Any]]:
    data = TensorDataset(torch.arange(64.0))
    generator = torch.Generator().manual_seed(0)
    return [
        DataLoader(data, batch_size=8, shuffle=True, generator=generator),
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator), 8, True)),
        DataLoader(data, batch_size=None, shuffle=True, generator=generator),
        DataLoader(Keyed(torch.arange(64.0)), batch_size=8, sampler=[str(n) for n in range(64)]),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("kind", range(4))
def test_a_peek_does_not_move_a_loader(kind: int) -> None:
    peeked, plain = loaders()[kind], loaders()[kind]
    assert _peek(peeked) is not None
    torch.manual_seed(0)
    after = list(peeked)
    torch.manual_seed(0)
    expected = list(plain)
    for left, right in zip(after, expected, strict=True):
        left, right = (left, right) if isinstance(left, Tensor) else (left[0], right[0])
        assert torch.equal(left, right)


def test_a_peek_is_spread_over_sorted_data() -> None:
    (batch,) = _peek(DataLoader(TensorDataset(torch.arange(64.0)), batch_size=4))
    assert batch.tolist() == [0.0, 16.0, 32.0, 48.0]


def test_an_iterator_is_not_used_up() -> None:
    with pytest.raises(NetworkError, match="without taking a batch from the training"):
        _peek(iter([X]))


def test_a_collection_of_loaders_gives_a_collection_of_batches() -> None:
    def make() -> DataLoader[Any]:
        return DataLoader(TensorDataset(X), batch_size=2)

    assert [len(batch[0]) for batch in _peek_all([make(), make()])] == [2, 2]
    assert set(_peek_all(CombinedLoader({"a": make(), "b": make()}, "min_size"))) == {"a", "b"}
    assert len(_peek_all(CombinedLoader([make(), make()], "sequential"))) == 1
    assert _peek_all(None) is None
