"""The parts of a file separately: values, tensors, layers and graphs."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.ao.nn import intrinsic as nni
from torch.ao.nn import quantized as nnq

from qat_lightning.artifact.graph import (
    Reading,
    Writing,
    decode_graph,
    decode_signature,
    decode_structure,
    encode_graph,
    encode_signature,
    encode_structure,
)
from qat_lightning.artifact.layers import decode_module, encode_module
from qat_lightning.artifact.operations import function_of, is_allowed, name_of
from qat_lightning.artifact.packed import decode_packed, encode_packed
from qat_lightning.artifact.tensors import TensorReader, TensorWriter
from qat_lightning.artifact.values import decode, encode
from qat_lightning.errors import ArtifactError
from qat_lightning.layers.kernels import is_packed
from qat_lightning.settings.engines import packing_engine

PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.complex_numbers(),
        st.just(...),
        st.sampled_from(
            [torch.float32, torch.quint8, torch.strided, torch.channels_last, torch.device("cpu"), slice(1, None)]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(st.one_of(st.text(), st.integers()), inner)
    ),
    max_leaves=20,
)


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other) and type(one) is type(other)


@given(PLAIN)
def test_values_come_back(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_structures_of_values_come_back() -> None:
    Point = namedtuple("Point", ["x", "y"])
    found = decode(encode([OrderedDict(a=1), torch.Size([2]), Point(1, math.inf), -math.inf]))
    assert found == [OrderedDict(a=1), (2,), (1, math.inf), -math.inf]
    assert found[2].y == math.inf
    assert type(found[0]) is OrderedDict


@pytest.mark.parametrize("value", [object(), len, int, {1, 2}, b"bytes", nn.ReLU(), torch.zeros(1)])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ArtifactError, match="holds a"):
        encode([value])


def _tensors() -> list[Tensor]:
    image = torch.randn(2, 3, 4, 5)
    return [
        torch.tensor(1.5),
        torch.arange(6).reshape(2, 3),
        torch.empty(0, 3),
        torch.tensor([True, False]),
        torch.randn(3).bfloat16(),
        torch.randn(3, dtype=torch.complex64),
        image,
        image.to(memory_format=torch.channels_last),
        image.permute(3, 1, 0, 2),
        image[:, :, ::2, 1:],
        torch.ones(1).expand(4),
        torch.quantize_per_tensor(image, 0.1, 3, torch.quint8),
        torch.quantize_per_tensor(image.to(memory_format=torch.channels_last), 0.1, 3, torch.qint8),
        torch.quantize_per_channel(image, torch.rand(3).double() + 0.1, torch.tensor([0, 1, 2]), 1, torch.qint8),
    ]


@pytest.mark.parametrize("tensor", _tensors(), ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.stride())}")
def test_tensors_come_back(tensor: Tensor) -> None:
    writer = TensorWriter()
    data = writer.encode(tensor)
    found = TensorReader(writer.table, bytes(writer.data)).decode(*next(iter(data.items())))
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert torch.equal(found, tensor)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=memory_format):
            assert found.is_contiguous(memory_format=memory_format)
    if tensor.is_quantized:
        assert found.qscheme() == tensor.qscheme()


def test_equal_tensors_are_held_once() -> None:
    writer = TensorWriter()
    assert writer.encode(torch.ones(1000)) == writer.encode(torch.ones(1000))
    assert writer.encode(torch.ones(1000)) != writer.encode(torch.ones(10, 100))
    assert len(writer.data) < 9000
    reader = TensorReader(writer.table, bytes(writer.data))
    first, second = reader.decode("tensor", 0), reader.decode("tensor", 0)
    first.zero_()
    assert second.all(), "one may be changed in place without the other"


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(ArtifactError, match="sparse"):
        TensorWriter().encode(torch.eye(2).to_sparse())


LAYERS = [
    nn.BatchNorm1d(4, eps=1e-3, momentum=None),
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm3d(4, track_running_stats=False),
    nn.Conv2d(4, 6, (3, 1), stride=2, padding="valid", dilation=(1, 2), groups=2, bias=False, padding_mode="reflect"),
    nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    nn.Embedding(5, 4, padding_idx=1, max_norm=2.0),
    nn.EmbeddingBag(5, 4, mode="sum"),
    nn.LSTM(4, 6, 2, bias=False, batch_first=True, dropout=0.1, bidirectional=True, proj_size=3),
    nn.GRU(4, 6, batch_first=True),
    nn.RNN(4, 6, nonlinearity="relu"),
    nn.RNNCell(4, 6, nonlinearity="relu"),
    nn.LSTMCell(4, 6, bias=False),
    nn.GRUCell(4, 6),
    nn.MultiheadAttention(4, 2),
    nn.MultiheadAttention(4, 2, dropout=0.1, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=3, vdim=5),
    nn.LayerNorm([3, 4], eps=1e-3, bias=False),
    nn.LayerNorm(4, elementwise_affine=False),
    nn.RMSNorm(4),
    nn.GroupNorm(2, 4, affine=False),
    nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    nn.PReLU(3),
    nn.Bilinear(2, 3, 4),
    nn.Hardtanh(-2, 3, inplace=True),
    nn.ReLU6(),
    nn.Softmax(1),
    nn.Upsample(scale_factor=(2.0, 3.0), mode="bilinear", align_corners=True),
    nn.UpsamplingNearest2d(size=4),
    nn.AdaptiveAvgPool2d((None, 3)),
    nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=2),
    nn.MaxPool2d(3, return_indices=True),
    nn.LPPool2d(2.0, 3),
    nn.Unflatten(1, (2, 2)),
    nn.ConstantPad2d((1, 2, 0, 0), 0.5),
    nn.Dropout2d(0.3),
    nn.Identity(1, two=2),
    nn.CosineSimilarity(dim=2),
    nn.Sequential(OrderedDict(first=nn.Linear(4, 4), second=nn.Sequential(nn.Tanh()))),
    nni.ConvReLU2d(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
    nni.ConvBn1d(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
    nni.ConvBnReLU3d(nn.Conv3d(4, 6, 1), nn.BatchNorm3d(6, affine=False), nn.ReLU()),
    nni.LinearBn1d(nn.Linear(4, 6), nn.BatchNorm1d(6)),
    nni.LinearReLU(nn.Linear(4, 6), nn.ReLU()),
    nni.LinearLeakyReLU(nn.Linear(4, 6), nn.LeakyReLU(0.2)),
    nni.LinearTanh(nn.Linear(4, 6), nn.Tanh()),
    nni.BNReLU2d(nn.BatchNorm2d(4), nn.ReLU()),
    nnq.BatchNorm2d(4),
    nnq.ELU(0.1, 3, alpha=0.5),
    nnq.LeakyReLU(0.1, 3, negative_slope=0.2),
    nnq.Hardswish(0.1, 3),
    nnq.PReLU(0.1, 3, 2),
    nnq.Softmax(1, 0.1, 3),
    nnq.Linear(3, 4),
    nnq.Conv1d(4, 6, 3, stride=2, groups=2, padding_mode="reflect", padding=1),
    nnq.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)),
    nnq.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
]


@pytest.mark.parametrize(
    "layer", LAYERS, ids=lambda layer: f"{type(layer).__module__.split('.')[1]}-{type(layer).__name__}"
)
def test_layers_come_back(layer: nn.Module) -> None:
    with packing_engine("fbgemm"):  # QNNPACK, which may run instead of oneDNN, does not return weights of Conv3d
        writing = Writing()
        data = encode_module(layer.eval(), "layer", writing)
        assert not writing.needs_network
        rng = torch.get_rng_state()
        found = decode_module(data, Reading(TensorReader(writing.tensors.table, bytes(writing.tensors.data))))
        assert torch.equal(torch.get_rng_state(), rng), "no random numbers are drawn"
        assert type(found) is type(layer)
        assert repr(found) == repr(layer)
        assert not found.training
        mine, theirs = layer.state_dict(), found.state_dict()
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, theirs[key])
        assert not any(tensor.requires_grad or tensor.is_meta for tensor in found.parameters())


def test_layers_that_were_changed_are_not_taken_for_plain_ones() -> None:
    changed = nn.ReLU()
    changed.forward = lambda x: x  # type: ignore[method-assign]
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    altered = nn.Conv2d(3, 3, 3)
    altered.stride = (2, 2)
    altered._reversed_padding_repeated_twice = [1, 1, 1, 1]

    class Sub(nn.ReLU):
        pass

    for layer in (changed, hooked, altered, Sub(), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))):
        writing = Writing()
        encode_module(layer, "layer", writing)
        assert writing.needs_network == {"layer": type(layer).__name__}


def test_altered_arguments_are_kept() -> None:
    layer = nn.BatchNorm2d(3)
    layer.eps, layer.momentum = 0.5, 0.25
    writing = Writing()
    data = encode_module(layer, "layer", writing)
    found = decode_module(data, Reading(TensorReader(writing.tensors.table, bytes(writing.tensors.data))))
    assert (found.eps, found.momentum) == (0.5, 0.25)


@pytest.mark.parametrize("engine", ["onednn", "fbgemm", "qnnpack"])
def test_packed_weights_of_functional_layers(engine: str) -> None:
    ops = torch.ops.quantized
    weight = torch.quantize_per_tensor(torch.randn(4, 2, 3, 3), 0.1, 0, torch.qint8)
    x = torch.quantize_per_tensor(torch.randn(2, 4, 8, 8), 0.1, 64, torch.quint8)
    with packing_engine(engine):
        conv = ops.conv2d_prepack(weight, torch.randn(4), [2, 1], [1, 0], [1, 2], 2)
        linear = ops.linear_prepack(weight.reshape(8, 9), None)
        assert is_packed(conv)
        assert is_packed(linear)
        assert not is_packed(weight)
        writer = TensorWriter()
        data = [encode_packed(value, writer) for value in (conv, linear)]
        reader = TensorReader(writer.table, bytes(writer.data))
        other_conv, other_linear = (decode_packed(value, reader) for value in data)
        assert torch.equal(ops.conv2d(x, conv, 0.2, 3), ops.conv2d(x, other_conv, 0.2, 3))
        flat = x.reshape(-1)[:18].reshape(2, 9)
        assert torch.equal(ops.linear(flat, linear, 0.2, 3), ops.linear(flat, other_linear, 0.2, 3))


def rebuilt(module: nn.Module) -> tuple[fx.GraphModule, Any]:
    traced = fx.symbolic_trace(module.eval())
    writing = Writing()
    data = encode_graph(traced, traced.graph, writing)
    assert not writing.needs_trust
    return traced, decode_graph(data, Reading(TensorReader(writing.tensors.table, bytes(writing.tensors.data))))


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor, scale: float = 2.0, *, shift: float = -1.0) -> Any:
        y = self.linear(x) @ self.linear.weight.T + self.inner[0].bias
        y = F.softmax(y * scale + shift, dim=-1, dtype=torch.float64).to(torch.float32)
        y += x.new_full((x.shape[0], 1), float("inf")).clamp(max=3)
        return {'text\'s "key"': (y[..., 1:], [y.sum().item if False else y.numel()]), 2: torch.zeros(2, device="cpu")}


def test_graphs_come_back() -> None:
    traced, found = rebuilt(Arguments())
    x = torch.randn(3, 4)
    for args, kwargs in (((x,), {}), ((x, 0.5), {"shift": 1.0})):
        expected, actual = traced(*args, **kwargs), found(*args, **kwargs)
        assert expected.keys() == actual.keys()
        for one, other in zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True):
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert [node.name for node in found.graph.nodes] == [node.name for node in traced.graph.nodes]


def test_branches_come_back() -> None:
    """``torch.cond`` contains graphs within a graph."""

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = x * 3
            return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: torch.relu(y) - 1, (x,))

    exported = torch.export.export(Branch(), (torch.randn(2, 3),), strict=True).module()
    exported.graph.set_codegen(fx.graph.CodeGen())
    for node in list(exported.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            exported.graph.erase_node(node)
    exported.recompile()
    writing = Writing()
    data = encode_graph(exported, exported.graph, writing)
    assert not writing.needs_trust
    found = decode_graph(data, Reading(TensorReader(writing.tensors.table, bytes(writing.tensors.data))))
    for x in (torch.ones(2, 3), -torch.ones(2, 3)):
        assert torch.equal(found(x)[0], exported.forward(x)[0])


def test_part_inside_a_called_part() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.embedding(x) @ self.embedding.weight.T

    traced, found = rebuilt(Tied())
    x = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(traced(x), found(x))
    assert [name for name, _ in found.named_parameters()] == ["embedding.weight"]


def test_unknown_function_is_named() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(lambda x: x, (graph.placeholder("x"),), {}))
    with pytest.raises(ArtifactError, match=r"lambda.*define it at the top of a module"):
        encode_graph(nn.Module(), graph, Writing())


def test_unknown_constant_is_named() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.add, (graph.placeholder("x"), 1), {})
    node._args = (node.args[0], object())
    graph.output(node)
    with pytest.raises(ArtifactError, match=r"'add' holds a builtins\.object"):
        encode_graph(nn.Module(), graph, Writing())


def test_structures_of_calls_come_back() -> None:
    Point = namedtuple("Point", ["x", "y"])
    for value in ((1, [2, 3], {"a": (4,), "b": None}), 1, [], (Point(1, 2), OrderedDict(b=1, a=2))):
        spec = pytree.tree_structure(value)
        found = decode_structure(encode_structure(spec))
        assert found.num_leaves == spec.num_leaves
        again = pytree.tree_unflatten(pytree.tree_leaves(value), found)
        assert again == value
    with_factory = decode_structure(encode_structure(pytree.tree_structure(defaultdict(list, a=[1]))))
    assert pytree.tree_unflatten([1], with_factory) == defaultdict(None, a=[1]), "a file holds no factory"


NO_PLAIN_VALUE = object()


def test_signatures_come_back() -> None:
    def function(a: int, /, b: Any = None, *rest: Any, c: Any = NO_PLAIN_VALUE, d: str = "d", **more: Any) -> None:
        """One constant of each type."""

    found = decode_signature(encode_signature(inspect.signature(function)))
    assert str(found) == "(a, /, b=None, *rest, c=Ellipsis, d='d', **more)"


@pytest.mark.parametrize(
    "function",
    [
        torch.add,
        F.relu,
        F.max_pool2d,
        F.linear,
        F.scaled_dot_product_attention,
        torch.linalg.vector_norm,
        torch.stft,
        torch.istft,
        torch.special.expit,
        getattr,
        math.sqrt,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.conv2d.default,
        torch.ops.aten.add_.Tensor,
        torch.ops.aten.sym_size.int,
        torch.ops.quantized.add_relu,
        torch.ops.quantized_decomposed.quantize_per_tensor.default,
        torch.ops.higher_order.cond,
    ],
)
def test_functions_come_back(function: Any) -> None:
    name = name_of(function)
    assert is_allowed(name)
    assert function_of(name) is function


def test_a_function_of_torch_that_no_file_may_call_is_found_where_the_file_is_trusted() -> None:
    name = name_of(torch.from_numpy)
    assert not is_allowed(name)
    assert function_of(name, trusted=True) is torch.from_numpy


def test_missing_operator_is_an_error_of_ours() -> None:
    with pytest.raises(ArtifactError, match="does not exist in torch"):
        function_of("torch.ops.aten.add.NoSuchOverload")
    with pytest.raises(ArtifactError, match="does not exist"):
        function_of("no_such_module:function", trusted=True)
