"""The signature of a captured network."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from qat_lightning.artifact.graph import decode_signature, encode_signature
from qat_lightning.errors import NetworkError
from qat_lightning.graph.signature import CallSpec, Input, as_captured, canonical, given_parameters
from qat_lightning.graph.structures import look_into

X = torch.zeros(2, 3)


def spec_of(signature: inspect.Signature, *args: Any, **kwargs: Any) -> CallSpec:
    leaves, structure = pytree.tree_flatten(canonical(signature, args, kwargs))
    inputs = [Input("x", tuple(leaf.shape)) if isinstance(leaf, Tensor) else Input("y", None, leaf) for leaf in leaves]
    return CallSpec("Net", signature, structure, tuple(inputs), pytree.tree_structure(X), 2)


def forward(x: Any, mask: Any = None, sizes: Any = (1, 2), *, flag: bool = False) -> Any: ...


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((X,), {}),
    ((X, None), {}),
    ((X,), {"flag": False}),
    ((X,), {"sizes": (1, 2)}),
    ((X, None, (1, 2)), {"flag": False}),
]


@pytest.mark.parametrize("captured", CALLS)
@pytest.mark.parametrize("called", CALLS)
def test_an_omitted_argument_is_its_default(captured: Any, called: Any) -> None:
    spec = spec_of(inspect.signature(forward), *captured[0], **captured[1])
    for each in (spec, pickle.loads(pickle.dumps(spec))):
        (tensor,) = each.flatten(*called)
        assert tensor is X


@pytest.mark.parametrize("captured", CALLS)
@pytest.mark.parametrize("other", [{"mask": X}, {"flag": True}, {"sizes": (1, 3)}, {"sizes": None}])
def test_another_value_than_the_default_is_refused(captured: Any, other: dict[str, Any]) -> None:
    spec = spec_of(inspect.signature(forward), *captured[0], **captured[1])
    with pytest.raises(NetworkError):
        spec.flatten((X,), other)


def test_an_argument_that_was_captured_with_another_value_cannot_be_omitted() -> None:
    spec = spec_of(inspect.signature(forward), X, flag=True)
    assert spec.flatten((X,), {"flag": True}) == [X]
    with pytest.raises(NetworkError, match="y = True and is called with False"):
        spec.flatten((X,), {})


def test_a_default_that_a_file_cannot_hold_is_as_captured() -> None:
    default = object()

    def forward(x: Any, other: Any = default, mask: Any = None) -> Any: ...

    signature = inspect.signature(forward)
    for each in (signature, decode_signature(encode_signature(signature))):
        spec = spec_of(each, X)
        assert spec.flatten((X,), {"mask": None}) == [X]
        with pytest.raises(NetworkError):
            spec.flatten((X, 3), {})


def test_a_signature_pickles_whatever_its_annotations_are() -> None:
    class Local: ...

    def forward(x: Local, mask: Local | None = None) -> Local:
        return x

    forward.__annotations__ = {"x": Local, "mask": Local, "return": Local}
    spec = spec_of(inspect.signature(forward), X)
    assert str(pickle.loads(pickle.dumps(spec)).signature) == "(x, mask=None)"


WIDER = [
    (torch.bool, torch.uint8),
    (torch.bool, torch.int64),
    (torch.uint8, torch.int32),
    (torch.int8, torch.int64),
    (torch.int32, torch.int64),
]
FLOATING = [(torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.float16)]
KINDS = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32]
KINDS += [torch.float64, torch.complex64]


@pytest.mark.parametrize(("given", "captured"), WIDER)
def test_integers_become_as_wide_as_the_captured_ones(given: torch.dtype, captured: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1 if given is torch.bool else torch.iinfo(given).max]).to(given)
    taken = as_captured(values, captured)
    assert taken is not None
    assert taken.dtype is captured
    assert taken.tolist() == values.tolist()


@pytest.mark.parametrize(("given", "captured"), [*FLOATING, *((kind, kind) for kind in KINDS)])
def test_floating_dtypes_are_left_to_mixed_precision(given: torch.dtype, captured: torch.dtype) -> None:
    values = torch.zeros(2, dtype=given)
    assert as_captured(values, captured) is values


@pytest.mark.parametrize("captured", KINDS)
@pytest.mark.parametrize("given", KINDS)
def test_a_dtype_that_holds_other_numbers_is_not_taken(given: torch.dtype, captured: torch.dtype) -> None:
    if given is captured or (given, captured) in WIDER or (given.is_floating_point and captured.is_floating_point):
        return
    taken = as_captured(torch.ones(2, dtype=given), captured)
    assert taken is None or torch.promote_types(given, captured) is captured
    assert taken is None or not (captured.is_floating_point or captured.is_complex)


@dataclasses.dataclass
class Checked:
    """A container that checks what it is made of."""

    image: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        assert self.image.shape == self.weight.shape


def test_containers_are_not_made_of_anything_but_tensors() -> None:
    def forward(batch: Any, scale: float = 1.0) -> Any: ...

    look_into((Checked(X, X),))
    structure = pytree.tree_structure(((Checked(X, X),), {"scale": 2.0}))
    assert given_parameters(inspect.signature(forward), structure) == {"batch", "scale"}
