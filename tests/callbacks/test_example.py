"""Recording one call of a network; with a Trainer this is tested in `tests/callbacks/test_insert.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import ENOUGH, MAX_BATCH, Example, examples_from_user, few_of, few_samples, from_user

X = torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, 1, []),
        ((X, X), 2, []),
        ([X, 3], 2, []),
        ({"x": X, "n": 3}, 0, ["x", "n"]),
        (({"x": X},), 1, []),
        ({0: X}, 1, []),
        (Example((X,), {"n": X}), 1, ["n"]),
    ],
)
def test_from_the_user(given: Any, args: int, kwargs: list[str]) -> None:
    example = from_user(given)
    assert (len(example.args), list(example.kwargs)) == (args, kwargs)


def test_an_example_is_a_detached_copy_in_float32_of_2_to_32_samples() -> None:
    leaf = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    (tidy,) = few_of(from_user(leaf)).args
    assert (tidy.shape, tidy.dtype, tidy.requires_grad) == ((2, 3), torch.float32, False)
    (labels,) = few_of(from_user(torch.zeros(50, dtype=torch.int64))).args
    assert (labels.shape, labels.dtype) == ((MAX_BATCH,), torch.int64)


@pytest.mark.parametrize(("side", "kept"), [(32, MAX_BATCH), (160, 13), (224, ENOUGH), (640, ENOUGH)])
def test_fewer_samples_are_kept_of_large_images(side: int, kept: int) -> None:
    images, labels = few_of(from_user((torch.zeros(40, 3, side, side), torch.zeros(40)))).args
    assert len(images) == len(labels) == kept
    small, _ = few_of(from_user((torch.zeros(4, 3, side, side), torch.zeros(4)))).args
    assert len(small) == 4


def test_for_several_networks() -> None:
    examples = examples_from_user({"a": X, "b.c": (X, X)}, ["a", "b.c"])
    assert len(examples["b.c"].args) == 2
    assert list(examples_from_user({"a": X}, ["net"])["net"].kwargs) == ["a"]
    with pytest.raises(NetworkError, match=r"\['a'\].*'a', 'b'"):
        examples_from_user({"a": X}, ["a", "b"])


def test_inputs_that_are_no_batch_stay_whole() -> None:
    prototypes, batch, labels = torch.zeros(100, 8), torch.zeros(64, 8), torch.zeros(64)
    kept = few_of(from_user((batch, labels, prototypes))).args
    assert [len(one) for one in kept] == [MAX_BATCH, MAX_BATCH, 100]
    assert [len(one) for one in few_of(from_user((prototypes, batch, labels))).args] == [100, 64, 64], "nor here"
    assert [len(one) for one in few_of(from_user((prototypes, batch))).args] == [100, 64], (
        "which one is the batch is unknown"
    )


def test_one_of_several_inputs_may_be_empty() -> None:
    cache, x = torch.zeros(2, 0, 4), torch.zeros(2, 3)
    assert [one.shape for one in from_user((cache, x)).args] == [cache.shape, x.shape]
    with pytest.raises(NetworkError, match="on which a network cannot be prepared"):
        from_user((cache, cache))


def test_matrices_beside_a_batch_stay_whole() -> None:
    """More tensors begin with their number of rows than with the number of samples."""
    x, supports = torch.zeros(64, 2), [torch.zeros(50, 50), torch.zeros(50, 50)]
    tidy = few_of(from_user((x, supports))).args
    assert [tuple(part.shape) for part in tidy[1]] == [(50, 50), (50, 50)]
    assert tidy[0].shape == x.shape, "which size is the batch is not known"
    of_batch = few_of(from_user((x, torch.zeros(64), supports[0]))).args
    assert [part.shape[0] for part in of_batch] == [MAX_BATCH, MAX_BATCH, 50]


class Lookup(nn.Module):
    """Reads some of its first input's rows, by the indices that are its second."""

    def forward(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return (rows * weights)[index]


def test_a_call_stays_whole_if_the_network_does_not_run_on_a_part_of_it() -> None:
    index = torch.arange(100)[None]
    call = from_user((torch.ones(100), index, torch.ones(100)))
    assert [part.shape for part in few_of(call).args] == [(MAX_BATCH,), (1, 100), (MAX_BATCH,)]
    assert few_samples(Lookup(), call) is call
    call = from_user((torch.ones(100), index[:, :20], torch.ones(100)))
    assert [part.shape for part in few_samples(Lookup(), call).args] == [(MAX_BATCH,), (1, 20), (MAX_BATCH,)]


def test_a_single_sample_stays_single_if_the_network_takes_one_at_a_time() -> None:
    call = from_user(torch.ones(1, 3))
    assert len(few_samples(nn.Identity(), call).args[0]) == 2
    assert len(few_samples(nn.Unflatten(0, (1, 1)), call).args[0]) == 1
