"""The table of operators: all names by which each is called, and its properties in every mode.

Properties of one mode, such as a kernel or a pattern of its upstream, are in that mode. To add an operator, add a row
here and a function in each mode that has a kernel for it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

aten = torch.ops.aten

_FLAG = (2, False)

Family = Literal[
    "convolution", "transposed", "linear", "bilinear", "attention", "recurrent", "cell", "table", "batchnorm",
    "dropout", "clamp", "relu",
]  # fmt: skip
"""Groups of operators that are treated alike: ``"table"`` is an embedding, ``"clamp"`` has a limit other than 0."""


@dataclass(frozen=True)
class Operator:
    """One row: the forms in which networks and graphs call the operator, and its traits.

    Attributes:
        name: Name of the row.
        family: Group of operators that it is treated like; None if no code depends on it.
        modules: Types of layers; subclasses may compute something else.
        functions: Functions of ``torch``, ``torch.nn.functional`` and ``operator``.
        methods: Names of methods and attributes of tensors.
        overloads: Overloads of ``torch.ops.aten`` that return a new tensor.
        in_place: Overloads of ``torch.ops.aten`` that write into their input; ``overloads[0]`` computes the same.
        weighted: Whether it is a layer with a weight worth quantizing; every report then has a row for it.
        channel_axis: The output channel dimension of its weight, if any backend has a static int8 kernel for it.
        batchnorm: The BatchNorm that folds into it.
        moves: Whether it computes nothing in evaluation: it only moves values, or reads a property of them.
        keeps_grid: Whether its output consists of values of its inputs, and zeros, so that they stay on their grid.
        within_range: Whether its output is within the range of its inputs and 0, on their grid or not, such as a mean.
        channelwise: Whether it may act on each channel separately and commute with a positive factor.
        relu_limit: Upper limit of its output, if it maps everything below 0 to 0, whatever its arguments.
        training_flag: The argument that says whether it trains, and its value in evaluation.
    """

    name: str
    family: Family | None = None
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    overloads: tuple[Any, ...] = ()
    in_place: tuple[Any, ...] = ()
    weighted: bool = False
    channel_axis: int | None = None
    batchnorm: type[nn.Module] | None = None
    moves: bool = False
    keeps_grid: bool = False
    within_range: bool = False
    channelwise: bool = False
    relu_limit: float | None = None
    training_flag: tuple[int, Any] | None = None

    @property
    def faces(self) -> tuple[Any, ...]:
        """All targets, or types of targets, that a call of it may have."""
        return (*self.modules, *self.functions, *self.methods, *self.overloads, *self.in_place)

    @property
    def names(self) -> frozenset[str]:
        """Names of its calls in a run or a graph: ``add`` for ``operator.add`` and for ``aten.add.Tensor``."""
        operations = {overload.overloadpacket.__name__ for overload in (*self.overloads, *self.in_place)}
        return frozenset({*self.methods, *operations, *(function.__name__ for function in self.functions)})


_WEIGHTED = (
    Operator(
        "conv1d", "convolution", (nn.Conv1d,), (F.conv1d,), overloads=(aten.conv1d.default,),
        weighted=True, channel_axis=0, batchnorm=nn.BatchNorm1d,
    ),
    Operator(
        "conv2d", "convolution", (nn.Conv2d,), (F.conv2d,), overloads=(aten.conv2d.default,),
        weighted=True, channel_axis=0, batchnorm=nn.BatchNorm2d,
    ),
    Operator(
        "conv3d", "convolution", (nn.Conv3d,), (F.conv3d,), overloads=(aten.conv3d.default,),
        weighted=True, channel_axis=0, batchnorm=nn.BatchNorm3d,
    ),
    Operator(
        "linear", "linear", (nn.Linear,), (F.linear,), overloads=(aten.linear.default,),
        weighted=True, channel_axis=0, batchnorm=nn.BatchNorm1d,
    ),
    Operator(
        "conv_transpose1d", "transposed", (nn.ConvTranspose1d,), (F.conv_transpose1d,),
        overloads=(aten.conv_transpose1d.default,), weighted=True, channel_axis=1,
    ),
    Operator(
        "conv_transpose2d", "transposed", (nn.ConvTranspose2d,), (F.conv_transpose2d,),
        overloads=(aten.conv_transpose2d.input,), weighted=True, channel_axis=1,
    ),
    Operator(
        "conv_transpose3d", "transposed", (nn.ConvTranspose3d,), (F.conv_transpose3d,),
        overloads=(aten.conv_transpose3d.input,), weighted=True, channel_axis=1,
    ),
    Operator("bilinear", "bilinear", (nn.Bilinear,), (F.bilinear,), weighted=True),
    Operator("attention", "attention", (nn.MultiheadAttention,), weighted=True),
    Operator("lstm", "recurrent", (nn.LSTM,), weighted=True),
    Operator("gru", "recurrent", (nn.GRU,), weighted=True),
    Operator("rnn", "recurrent", (nn.RNN,), weighted=True),
    Operator("lstm_cell", "cell", (nn.LSTMCell,), weighted=True),
    Operator("gru_cell", "cell", (nn.GRUCell,), weighted=True),
    Operator("rnn_cell", "cell", (nn.RNNCell,), weighted=True),
    Operator("embedding", "table", (nn.Embedding,), weighted=True),
    Operator("embedding_bag", "table", (nn.EmbeddingBag,), weighted=True),
)  # fmt: skip

_NORMALIZING = (
    Operator("batch_norm1d", "batchnorm", (nn.BatchNorm1d,)),
    Operator("batch_norm2d", "batchnorm", (nn.BatchNorm2d,)),
    Operator("batch_norm3d", "batchnorm", (nn.BatchNorm3d,)),
    Operator("layer_norm", None, (nn.LayerNorm,), (F.layer_norm,)),
    Operator("group_norm", None, (nn.GroupNorm,), (F.group_norm,)),
    Operator("instance_norm", None, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), (F.instance_norm,)),
    Operator("softmax", None, (nn.Softmax,), (F.softmax,), ("softmax",)),
)

_ACTIVATIONS = (
    Operator(
        "relu", "relu", (nn.ReLU,), (F.relu, torch.relu, torch.relu_), ("relu", "relu_"), (aten.relu.default,),
        (aten.relu_.default,), keeps_grid=True, within_range=True, channelwise=True, relu_limit=math.inf,
    ),
    # The limit of a clamp need not be on the grid.
    Operator(
        "relu6", "clamp", (nn.ReLU6,), (F.relu6,), (), (aten.relu6.default,), (aten.relu6_.default,), relu_limit=6.0,
    ),
    Operator(
        "hardtanh", "clamp", (nn.Hardtanh,), (F.hardtanh, F.hardtanh_), (), (aten.hardtanh.default,),
        (aten.hardtanh_.default,),
    ),
    Operator(
        "clamp", "clamp", (), (torch.clamp, torch.clamp_min), ("clamp", "clamp_", "clamp_min"), (aten.clamp.default,),
    ),
    Operator(
        "leaky_relu", None, (nn.LeakyReLU,), (F.leaky_relu, F.leaky_relu_), (), (aten.leaky_relu.default,),
        (aten.leaky_relu_.default,), channelwise=True,
    ),
    Operator(
        "rrelu", None, (nn.RReLU,), (F.rrelu,), overloads=(aten.rrelu.default,), training_flag=(3, False),
    ),
    Operator(
        "hardswish", None, (nn.Hardswish,), (F.hardswish,), (), (aten.hardswish.default,), (aten.hardswish_.default,),
    ),
    Operator(
        "hardsigmoid", None, (nn.Hardsigmoid,), (F.hardsigmoid,), ("hardsigmoid", "hardsigmoid_"),
        (aten.hardsigmoid.default,), (aten.hardsigmoid_.default,),
    ),
    Operator("silu", None, (nn.SiLU,), (F.silu,), (), (aten.silu.default,), (aten.silu_.default,)),
    Operator("elu", None, (nn.ELU,), (F.elu, F.elu_), (), (aten.elu.default,), (aten.elu_.default,)),
    Operator(
        "sigmoid", None, (nn.Sigmoid,), (torch.sigmoid,), ("sigmoid", "sigmoid_"), (aten.sigmoid.default,),
        (aten.sigmoid_.default,),
    ),
    Operator("prelu", None, (nn.PReLU,), (F.prelu,)),
    Operator("tanh", None, (nn.Tanh,), (torch.tanh,), ("tanh", "tanh_"), (aten.tanh.default,), (aten.tanh_.default,)),
)  # fmt: skip

_COMPUTING = (
    Operator("add", None, (), (torch.add, operator.add), ("add",), (aten.add.Tensor,), (aten.add_.Tensor,)),
    Operator(
        "mul", None, (), (torch.mul, torch.multiply, operator.mul), ("mul", "multiply"), (aten.mul.Tensor,),
        (aten.mul_.Tensor,),
    ),
    Operator(
        "scaled_dot_product_attention", None, (), (F.scaled_dot_product_attention,),
        overloads=(aten.scaled_dot_product_attention.default,), training_flag=(4, 0.0),
    ),
    Operator("interpolate", None, (), (F.interpolate,)),
    Operator("mean", None, (), (torch.mean,), ("mean",), (aten.mean.default, aten.mean.dim),
             within_range=True, channelwise=True),
    *(
        Operator(f"{name}{dims}d", None, (getattr(nn, f"{kind}{dims}d"),), (getattr(F, f"{name}{dims}d"),),
                 within_range=True, channelwise=True,
                 overloads=(getattr(aten, f"{name}{dims}d").default,) if dims == 2 else ())
        for name, kind in (("avg_pool", "AvgPool"), ("adaptive_avg_pool", "AdaptiveAvgPool"))
        for dims in (1, 2, 3)
    ),
)  # fmt: skip


def _chooses(name: str, **faces: Any) -> Operator:
    """An operator that returns some of its input values, so they keep their grid, but computes which ones."""
    return Operator(name, keeps_grid=True, within_range=True, **faces)


_CHOOSING = (
    _chooses("max_pool1d", modules=(nn.MaxPool1d,), functions=(F.max_pool1d, torch.max_pool1d), channelwise=True),
    _chooses(
        "max_pool2d", modules=(nn.MaxPool2d,), functions=(F.max_pool2d, torch.max_pool2d),
        overloads=(aten.max_pool2d.default,), channelwise=True,
    ),
    _chooses("max_pool3d", modules=(nn.MaxPool3d,), functions=(F.max_pool3d, torch.max_pool3d), channelwise=True),
    *(
        _chooses(f"adaptive_max_pool{dims}d", modules=(getattr(nn, f"AdaptiveMaxPool{dims}d"),),
                 functions=(getattr(F, f"adaptive_max_pool{dims}d"),), channelwise=True)
        for dims in (1, 2, 3)
    ),
    _chooses("amax", functions=(torch.amax,), methods=("amax",), channelwise=True),
    _chooses("cat", functions=(torch.cat, torch.concat, torch.concatenate), overloads=(aten.cat.default,)),
    _chooses("stack", functions=(torch.stack,)),
    Operator("pad", None, (), (F.pad,), channelwise=True),
)  # fmt: skip


def _moves(name: str, **faces: Any) -> Operator:
    """An operator that returns its input values in another order or shape."""
    return Operator(name, moves=True, keeps_grid=True, within_range=True, **faces)


def _drops(name: str, modules: tuple[type[nn.Module], ...], *overloads: Any, **faces: Any) -> Operator:
    """A dropout: the identity in evaluation; in training its output may exceed the range of its input."""
    given = {"overloads": overloads, "training_flag": _FLAG if overloads else None} | faces
    functions = (getattr(F, name),) if hasattr(F, name) else ()
    return Operator(name, "dropout", modules, functions, moves=True, keeps_grid=True, **given)


_MOVING = (
    _moves("identity", modules=(nn.Identity,)),
    _moves(
        "flatten", modules=(nn.Flatten,), functions=(torch.flatten,), methods=("flatten",),
        overloads=(aten.flatten.using_ints,), channelwise=True,
    ),
    _moves("unflatten", modules=(nn.Unflatten,), functions=(torch.unflatten,), methods=("unflatten",)),
    _moves(
        "reshape", functions=(torch.reshape,), methods=("reshape",), overloads=(aten.reshape.default,),
        channelwise=True,
    ),
    _moves("reshape_as", methods=("reshape_as",)),
    _moves("view", methods=("view",), overloads=(aten.view.default,), channelwise=True),
    _moves("view_as", methods=("view_as",)),
    _moves("permute", functions=(torch.permute,), methods=("permute",), overloads=(aten.permute.default,)),
    _moves(
        "transpose", functions=(torch.transpose, torch.swapaxes, torch.t),
        methods=("transpose", "swapaxes", "t", "T", "mT"),
        overloads=(aten.transpose.int,),
    ),
    _moves("movedim", functions=(torch.movedim,), methods=("movedim",)),
    _moves(
        "squeeze", functions=(torch.squeeze,), methods=("squeeze",), overloads=(aten.squeeze.dim,), channelwise=True,
    ),
    _moves("unsqueeze", functions=(torch.unsqueeze,), methods=("unsqueeze",), overloads=(aten.unsqueeze.default,)),
    _moves("contiguous", methods=("contiguous",), overloads=(aten.contiguous.default,), channelwise=True),
    _moves("clone", functions=(torch.clone,), methods=("clone",)),
    _moves("detach", functions=(torch.detach,), methods=("detach",)),
    _moves("expand", methods=("expand", "expand_as")),
    _moves("repeat", methods=("repeat",)),
    _moves("repeat_interleave", functions=(torch.repeat_interleave,), methods=("repeat_interleave",)),
    _moves(
        "split", functions=(torch.split, torch.chunk, torch.unbind), methods=("split", "chunk", "unbind"),
        overloads=(aten.split_with_sizes.default, aten.unsafe_split.Tensor, aten.unsafe_chunk.default),
    ),
    _moves(
        "select", functions=(torch.select, torch.narrow, operator.getitem),
        methods=("select", "narrow", "__getitem__"), overloads=(aten.slice.Tensor,),
    ),
    _moves("flip", functions=(torch.flip,), methods=("flip",)),
    _moves("roll", functions=(torch.roll,), methods=("roll",)),
    _moves("alias", overloads=(aten.alias.default, aten.lift_fresh_copy.default)),
    _moves("pixel_shuffle", modules=(nn.PixelShuffle,), functions=(F.pixel_shuffle,)),
    _moves("pixel_unshuffle", modules=(nn.PixelUnshuffle,), functions=(F.pixel_unshuffle,)),
    _moves("channel_shuffle", modules=(nn.ChannelShuffle,), functions=(F.channel_shuffle,)),
    _drops("dropout", (nn.Dropout,), aten.dropout.default, in_place=(aten.dropout_.default,), channelwise=True),
    _drops("dropout1d", (nn.Dropout1d,), channelwise=True),
    _drops("dropout2d", (nn.Dropout2d,), channelwise=True),
    _drops("dropout3d", (nn.Dropout3d,), channelwise=True),
    _drops("alpha_dropout", (nn.AlphaDropout,), aten.alpha_dropout.default),
    _drops("feature_alpha_dropout", (nn.FeatureAlphaDropout,), aten.feature_alpha_dropout.default),
    # Called by dropouts of whole channels, and the form of dropout that returns its mask as well.
    _drops("feature_dropout", (), aten.feature_dropout.default),
    _drops("native_dropout", (), aten.native_dropout.default),
    # Casts, whose type may not fit on a grid, and ways around autograd.
    Operator("to", methods=("to", "float", "type_as", "data"), overloads=(aten._to_copy.default,), moves=True),
    Operator("look", functions=(getattr,), methods=("size",), moves=True),
    Operator("like", functions=(torch.zeros_like, torch.ones_like), methods=("new_zeros",), moves=True),
)  # fmt: skip

OPERATORS: tuple[Operator, ...] = (*_WEIGHTED, *_NORMALIZING, *_ACTIVATIONS, *_COMPUTING, *_CHOOSING, *_MOVING)
"""All rows; no form is in two of them."""


@functools.cache
def _by_face() -> dict[Any, Operator]:
    return {face: row for row in OPERATORS for face in row.faces}


def operator_of(face: Any) -> Operator | None:
    """The row of a layer type, function, method name or overload; None if there is none.

    Example:
        >>> operator_of(nn.Conv2d).name, operator_of(torch.ops.aten.relu_.default).name, operator_of("relu").name
        ('conv2d', 'relu', 'relu')
    """
    return _by_face().get(face) if isinstance(face, Hashable) else None


def rows(*families: Family) -> tuple[Operator, ...]:
    """The rows of some families."""
    return tuple(row for row in OPERATORS if row.family in families)


def module_types(*families: Family) -> tuple[type[nn.Module], ...]:
    """The types of layers of some families, for ``isinstance``.

    Example:
        >>> [kind.__name__ for kind in module_types("cell")]
        ['LSTMCell', 'GRUCell', 'RNNCell']
    """
    return tuple(kind for row in rows(*families) for kind in row.modules)


def faces_of(*names: str) -> tuple[Any, ...]:
    """All forms of the rows with these names.

    Example:
        >>> faces_of("batch_norm2d")
        (<class 'torch.nn.modules.batchnorm.BatchNorm2d'>,)
    """
    by_name = {row.name: row for row in OPERATORS}
    return tuple(face for name in names for face in by_name[name].faces)


def names_of(trait: Callable[[Operator], Any]) -> frozenset[str]:
    """The names of functions, methods and aten ops whose rows have a trait.

    Example:
        >>> "transpose" in names_of(lambda row: row.moves), "mean" in names_of(lambda row: row.keeps_grid)
        (True, False)
    """
    return frozenset(name for row in OPERATORS if trait(row) for name in row.names)


WEIGHTED: tuple[type[nn.Module], ...] = tuple(kind for row in OPERATORS if row.weighted for kind in row.modules)
"""Types of layers with weights worth quantizing; every report has a row for each of them."""

MOVES = names_of(lambda row: row.moves)
"""Names of operators that compute nothing in evaluation, and are omitted from reports."""

MOVING_MODULES: tuple[type[nn.Module], ...] = tuple(kind for row in OPERATORS if row.moves for kind in row.modules)
"""Types of layers that compute nothing in evaluation."""

KEEPS_GRID = names_of(lambda row: row.keeps_grid)
"""Names of operators that only move or select values, or insert zeros, so that values stay on their grid."""
