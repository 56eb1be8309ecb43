"""The table of operators: one row per form, nothing of torch missing, and no second list elsewhere."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qat_lightning
from qat_lightning.layers.operators import KEEPS_GRID, MOVES, OPERATORS, WEIGHTED, operator_of, rows

PACKAGE = Path(qat_lightning.__file__).parent


def test_each_face_is_in_one_row_and_each_name_is_given_once() -> None:
    faces = [face for row in OPERATORS for face in row.faces]
    assert len(faces) == len(set(faces))
    assert len({row.name for row in OPERATORS}) == len(OPERATORS)
    assert all(operator_of(face) is row for row in OPERATORS for face in row.faces)
    assert operator_of([]) is None  # a target may be anything


def test_every_layer_of_torch_with_a_weight_to_quantize_is_weighted() -> None:
    bases = (
        nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag,
        nn.MultiheadAttention,
    )  # fmt: skip
    abstract = (nn.RNNBase, nn.RNNCellBase)
    public = [kind for name in nn.modules.__all__ if isinstance(kind := getattr(nn, name), type)]
    assert [kind for kind in public if issubclass(kind, bases) and kind not in abstract] == [
        kind for kind in public if issubclass(kind, WEIGHTED)
    ]


def test_traits_agree_with_each_other() -> None:
    for row in OPERATORS:
        assert not row.in_place or len(row.overloads) == 1, row.name
        assert row.channel_axis is None or (row.weighted and row.overloads), row.name
        assert row.batchnorm is None or operator_of(row.batchnorm).family == "batchnorm", row.name  # type: ignore[union-attr]
        assert row.training_flag is None or row.overloads, row.name
        assert not (row.weighted and row.moves), row.name
        for overload in row.in_place:
            assert overload._schema.is_mutable, overload
            assert overload.overloadpacket.__name__ == f"{row.overloads[0].overloadpacket.__name__}_"
        for overload in row.overloads:
            assert not overload._schema.is_mutable, overload


@pytest.mark.parametrize("row", [row for row in OPERATORS if row.training_flag], ids=lambda row: row.name)
def test_a_training_flag_is_where_the_schema_has_it(row: Any) -> None:
    position, _ = row.training_flag
    for overload in row.overloads:
        assert overload._schema.arguments[position].name in ("train", "training", "dropout_p")


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dropouts_of_channels_are_reported_like_any_other(dims: int) -> None:
    names = {"dropout", f"dropout{dims}d"}
    assert names <= MOVES
    assert names <= KEEPS_GRID


def test_a_mean_stays_within_its_range_and_leaves_its_grid() -> None:
    mean = operator_of("mean")
    assert mean is not None
    assert mean.within_range
    assert not mean.keeps_grid


@pytest.mark.parametrize("row", [row for row in rows("relu", "clamp") if row.relu_limit], ids=lambda row: row.name)
def test_a_relu_limit_is_the_largest_value_left(row: Any) -> None:
    values = torch.tensor([-3.0, 0.0, 2.0, 5e30])
    wanted = values.clamp(0, row.relu_limit)
    for face in (*row.functions, *row.overloads, *row.in_place, *(kind() for kind in row.modules)):
        assert torch.equal(face(values.clone()), wanted)


def _is_op(node: ast.expr, names: dict[str, Any]) -> bool:
    """Whether an expression is a type of layer, a function of torch, an overload, or the name of a method."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and operator_of(node.value) is not None
    if not isinstance(node, (ast.Name, ast.Attribute)):
        return False
    try:
        value = eval(ast.unparse(node), dict(names))
    except NameError:
        return False
    is_layer = isinstance(value, type) and value.__module__.startswith("torch.nn.modules")
    return is_layer or (not isinstance(value, (bool, int, float)) and operator_of(value) is not None)


def _lists_of_ops(source: str) -> Iterator[str]:
    """The module-level collections of three or more layer types or ops.

    Except a file's registry of its own implementations, a dict with a class or function for each.
    """
    tree = ast.parse(source)
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "aten": torch.ops.aten, "operator": operator}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.split(".")[0] == "torch":
            exec(ast.unparse(statement), names)
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
            continue
        for node in ast.walk(statement.value):
            if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                members = node.elts
            elif isinstance(node, ast.Dict) and not all(isinstance(v, (ast.Name, ast.Attribute)) for v in node.values):
                members = [key for key in node.keys if key is not None]
            else:
                continue
            if sum(_is_op(member, names) for member in members) >= 3:
                yield ast.unparse(statement)[:100]


@pytest.mark.parametrize(
    "source",
    [
        "_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)",
        "from torch.nn import ReLU, Tanh, GELU\n_KINDS: tuple = frozenset([ReLU, Tanh, GELU])",
        "_MOVES = {'flatten', 'reshape', 'permute'}",
        "_AXIS = {F.conv1d: 0, F.conv2d: 0, aten.linear.default: 0}",
    ],
)
def test_a_second_list_would_be_found(source: str) -> None:
    assert list(_lists_of_ops(source))


def test_there_is_no_second_list() -> None:
    """Modes may have their own lists; the list of what a file may call is a security boundary, and never derived."""
    allowed = ("modes", "artifact")
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in allowed]
    files.remove(PACKAGE / "layers" / "operators.py")
    found = {str(path.relative_to(PACKAGE)): list(_lists_of_ops(path.read_text())) for path in files}
    assert {path: lists for path, lists in found.items() if lists} == {}
