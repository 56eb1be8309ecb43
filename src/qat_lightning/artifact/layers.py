"""Encoding a layer that a graph calls: its class by a listed name, the constructor's arguments, and its tensors."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import OrderedDict
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import intrinsic as nni
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from qat_lightning.artifact.packed import decode_packed_layer, encode_packed_layer, is_packed_layer
from qat_lightning.artifact.progress import Reading, Writing
from qat_lightning.artifact.values import decode, encode
from qat_lightning.errors import ArtifactError
from qat_lightning.layers.integer import IntegerLayer, WeightGrid
from qat_lightning.layers.integer.attention import DynamicAttention
from qat_lightning.layers.integer.dynamic import DynamicCell, DynamicLinear
from qat_lightning.layers.integer.plain_dynamic import PlainDynamicLinear
from qat_lightning.layers.integer.recurrent import DynamicRecurrent
from qat_lightning.layers.integer.weight_only import WeightOnly, WeightOnlyEmbedding


def _words(text: str) -> list[str]:
    return text.split()


_FLOAT = _words(
    """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    AlphaDropout AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear CELU ChannelShuffle
    CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d
    ConvTranspose1d ConvTranspose2d ConvTranspose3d CosineSimilarity Dropout Dropout1d Dropout2d Dropout3d ELU
    Embedding EmbeddingBag FeatureAlphaDropout Flatten Fold GELU GLU GRU GRUCell GroupNorm Hardshrink Hardsigmoid
    Hardswish Hardtanh Identity InstanceNorm1d InstanceNorm2d InstanceNorm3d LPPool1d LPPool2d LPPool3d LSTM LSTMCell
    LayerNorm LeakyReLU Linear LocalResponseNorm LogSigmoid LogSoftmax MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d
    MaxUnpool2d MaxUnpool3d Mish MultiheadAttention PReLU PairwiseDistance PixelShuffle PixelUnshuffle RMSNorm RNN
    RNNCell RReLU ReLU ReLU6 ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d
    ReplicationPad3d SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
    Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d
    """
)
_LOSSES = _words(
    """
    BCELoss BCEWithLogitsLoss CTCLoss CosineEmbeddingLoss CrossEntropyLoss GaussianNLLLoss HingeEmbeddingLoss HuberLoss
    KLDivLoss L1Loss MSELoss MarginRankingLoss MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss
    PoissonNLLLoss SmoothL1Loss SoftMarginLoss TripletMarginLoss
    """
)
_QUANTIZED = _words("BatchNorm2d BatchNorm3d Dropout ELU Hardswish LeakyReLU PReLU ReLU6 Sigmoid Softmax")
_FUSED = _words("BNReLU2d BNReLU3d")
_CLASSES: dict[str, type[nn.Module]] = {
    **{f"torch.nn.{name}": getattr(nn, name) for name in [*_FLOAT, *_LOSSES] if hasattr(nn, name)},
    **{f"torch.ao.nn.quantized.{name}": getattr(nnq, name) for name in _QUANTIZED},
    **{f"torch.ao.nn.intrinsic.quantized.{name}": getattr(nniq, name) for name in _FUSED},
}
_FLOAT_FUSED: dict[str, Any] = {
    name: getattr(nni, name)
    for name in _words(
        """
        BNReLU2d BNReLU3d ConvBn1d ConvBn2d ConvBn3d ConvBnReLU1d ConvBnReLU2d ConvBnReLU3d ConvReLU1d ConvReLU2d
        ConvReLU3d LinearBn1d LinearLeakyReLU LinearReLU LinearTanh
        """
    )
}
"""Sequences of float layers in one module, as left by fusion where they are not quantized."""
_NAMES = {layer: name for name, layer in _CLASSES.items()}
_INTEGER_LAYERS: dict[str, type[IntegerLayer]] = {
    layer.__name__: layer
    for layer in (
        DynamicLinear,
        PlainDynamicLinear,
        DynamicCell,
        DynamicRecurrent,
        DynamicAttention,
        WeightOnlyEmbedding,
    )
}
_OTHER_NAMES = {"output_scale": "scale", "output_zero_point": "zero_point", "_dtype": "dtype"}
_NO_ARGUMENTS = frozenset({"self", "args", "kwargs", "device", "dtype"})
_INTERNALS = frozenset(vars(nn.Module())) | {"training"}


def encode_module(module: nn.Module, path: str, writing: Writing) -> dict[str, Any]:
    """Encode a module; if no file can store its code, only its name, class and tensors are encoded."""
    if not _is_plain(module):
        return _encode_foreign(module, path, writing)
    if is_packed_layer(module):
        return {"packed": encode_packed_layer(module, writing.tensors)}
    if type(module) is nn.Sequential:
        children = module.named_children()
        return {"sequential": [[name, encode_module(child, f"{path}.{name}", writing)] for name, child in children]}
    if type(module) in _FLOAT_FUSED.values():
        parts = [encode_module(child, f"{path}.{name}", writing) for name, child in module.named_children()]
        return {"fused": {"class": type(module).__name__, "parts": parts}}
    if isinstance(module, IntegerLayer):
        return {"integers": _encode_integer_layer(module, writing)}
    if type(module) not in _NAMES or not _rebuilds(module):
        return _encode_foreign(module, path, writing)
    data = {
        "class": _NAMES[type(module)],
        "arguments": {name: encode(value) for name, value in _arguments(module).items()},
        "state": _encode_state(module, writing),
    }
    return {"layer": data}


def decode_module(data: dict[str, Any], reading: Reading) -> nn.Module:
    """Inverse of `encode_module`."""
    ((tag, content),) = data.items()
    if tag == "packed":
        module = decode_packed_layer(content, reading.tensors)
    elif tag == "sequential":
        module = nn.Sequential(OrderedDict((name, decode_module(child, reading)) for name, child in content))
    elif tag == "fused":
        module = _decode_fused(content, reading)
    elif tag == "layer":
        module = _decode_layer(content, reading)
    elif tag == "integers":
        module = _decode_integer_layer(content, reading)
    elif tag == "foreign":
        module = _decode_foreign(content, reading)
    else:
        raise ArtifactError(f"it holds a {str(tag)[:80]!r}, which is not known")
    return module.eval()


def _decode_fused(data: dict[str, Any], reading: Reading) -> nn.Module:
    if data["class"] not in _FLOAT_FUSED:
        raise ArtifactError(f"it holds fused layers of the class {str(data['class'])[:80]!r}, which is not known")
    module: nn.Module = _FLOAT_FUSED[data["class"]](*(decode_module(part, reading) for part in data["parts"]))
    return module


def _encode_integer_layer(layer: IntegerLayer, writing: Writing) -> dict[str, Any]:
    data: dict[str, Any] = {"class": type(layer).__name__}
    if isinstance(layer, WeightOnly):
        inner = layer.layer
        arguments = _arguments(inner)
        with torch.device("meta"):
            rebuilt = _plain_attributes(type(inner)(**arguments))
        if any(_plain_attributes(inner).get(name) != value for name, value in rebuilt.items()):
            raise ArtifactError(f"holds the integers of a {type(inner).__name__} whose attributes were changed")
        data["layer"], data["grid"] = _NAMES[type(inner)], encode(astuple(layer.grid))
        data["arguments"] = {name: encode(value) for name, value in arguments.items()}
    else:
        names = inspect.signature(type(layer).__init__).parameters
        data["arguments"] = {
            name: encode(value if name != "bias" or isinstance(value, bool) else value is not None)
            for name, value in ((name, getattr(layer, name)) for name in names if name != "self")
        }
    return {**data, "state": _encode_state(layer, writing)}


def _decode_integer_layer(data: dict[str, Any], reading: Reading) -> nn.Module:
    arguments = {name: decode(value) for name, value in data["arguments"].items()}
    state = _decode_state(data["state"], reading)
    # Layers inside layers have separate tensors in the file: no more layers are created than there are tensors for.
    if type(arguments.get("num_layers", 1)) is not int or arguments.get("num_layers", 1) > len(state):
        raise ArtifactError("it holds a layer that contains other layers where tensors are expected")
    with torch.device("meta"):
        if data["class"] == WeightOnly.__name__:
            if data["layer"] not in _CLASSES:
                raise ArtifactError(f"it holds integers of the class {str(data['layer'])[:80]!r}, which is not known")
            inner = _CLASSES[data["layer"]]
            unknown = arguments.keys() - set(_argument_names(data["layer"]))
            if unknown:
                raise ArtifactError(f"{inner.__name__} is not made with {', '.join(map(str, unknown))[:80]}")
            layer: nn.Module = WeightOnly.shell(inner(**arguments), WeightGrid(*decode(data["grid"])))
        elif data["class"] in _INTEGER_LAYERS:
            layer = _INTEGER_LAYERS[data["class"]](**arguments)
        else:
            raise ArtifactError(f"it holds a layer of integers {str(data['class'])[:80]!r}, which is not known")
    layer.load_state_dict(state, assign=True)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.requires_grad_(False)
        if tensor.is_meta:
            raise ArtifactError(f"a tensor of a {type(layer).__name__} is not there")
    return layer


def _is_plain(module: nn.Module) -> bool:
    """Whether the class alone determines what the module computes."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


@functools.cache
def _argument_names(name: str) -> tuple[str, ...]:
    """The constructor arguments of a listed class."""
    layer = _CLASSES[name]
    # The constructors of LSTM and GRU take **kwargs, and pass them on.
    bases: list[Any] = [base for base in layer.__mro__ if issubclass(base, nn.Module)]
    signatures = [inspect.signature(base.__init__) for base in bases]
    found = next((s for s in signatures if not {"args", "kwargs"} <= s.parameters.keys()), signatures[-1])
    names = [name for name in found.parameters if name not in _NO_ARGUMENTS and not name.startswith("_")]
    if issubclass(layer, nn.RNNBase):
        names = [name for name in names if name != "mode" and (name != "proj_size" or layer is nn.LSTM)]
        names += ["nonlinearity"] if layer is nn.RNN else []
    return tuple(names)


def _arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments to construct an equal module, read from its attributes."""
    arguments: dict[str, Any] = {}
    for name in _argument_names(_NAMES[type(module)]):
        attribute = _OTHER_NAMES.get(name, name)
        if name == "add_bias_kv":
            arguments[name] = getattr(module, "bias_k", None) is not None
        elif name == "bias" and isinstance(module, nn.MultiheadAttention):
            arguments[name] = module.in_proj_bias is not None
        elif hasattr(module, attribute) and attribute not in module._buffers:
            value = getattr(module, attribute)
            if name == "bias" and not isinstance(value, bool):
                value = value is not None
            arguments[name] = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return arguments


def _empty_prelu(output_scale: float, output_zero_point: int, num_parameters: int = 1) -> nn.Module:
    """A PReLU made without its constructor, whose random weight torch 2.9 cannot quantize on a meta device."""
    module: Any = nnq.PReLU.__new__(nnq.PReLU)
    nn.Module.__init__(module)
    module.scale, module.zero_point, module.num_parameters = output_scale, output_zero_point, num_parameters
    return module  # type: ignore[no-any-return]


def _construct(layer: type[nn.Module], arguments: dict[str, Any], state: dict[str, Any]) -> nn.Module:
    unknown = arguments.keys() - set(_argument_names(_NAMES[layer]))
    if unknown:
        raise ArtifactError(f"{layer.__name__} is not made with {', '.join(map(str, unknown))[:80]}")
    # On meta, no memory is allocated for tensors that the state replaces, and no random numbers are drawn.
    with torch.device("meta"):
        # Tensors among the arguments, such as weights of classes, are in the state.
        names = (state.keys() - arguments.keys()) & {*_argument_names(_NAMES[layer])}
        arguments = arguments | {name: torch.empty(state[name].shape) for name in names}
        module = _empty_prelu(**arguments) if layer is nnq.PReLU else layer(**arguments)
    if isinstance(module, nnq.PReLU):
        module.set_weight(state.pop("weight"))
    module.load_state_dict(state, assign=True)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.requires_grad_(False)
        if tensor.is_meta:
            raise ArtifactError(f"a tensor of a {layer.__name__} is not there")
    return module


def _decode_layer(data: dict[str, Any], reading: Reading) -> nn.Module:
    name = data["class"]
    if name not in _CLASSES:
        raise ArtifactError(
            f"it holds a layer of the class {str(name)[:80]!r}, which is not among those that a file may hold"
        )
    arguments = {key: decode(value) for key, value in data["arguments"].items()}
    return _construct(_CLASSES[name], arguments, _decode_state(data["state"], reading))


def _state(module: nn.Module) -> dict[str, Any]:
    state = dict(module.state_dict())
    # Upstream stores it as a plain attribute.
    return state | {"weight": module.weight} if isinstance(module, nnq.PReLU) else state


def _encode_state(module: nn.Module, writing: Writing) -> dict[str, Any]:
    return {name: encode(value, writing.tensors.encode) for name, value in _state(module).items()}


def _decode_state(data: dict[str, Any], reading: Reading) -> dict[str, Any]:
    return {name: decode(value, reading.tensors.decode) for name, value in data.items()}


def _rebuilds(module: nn.Module) -> bool:
    """Whether the constructor creates the same module: no attribute that it derives was changed."""
    try:
        rebuilt = _construct(type(module), _arguments(module), _state(module))
        encode(_arguments(module))
    except (ArtifactError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    ours, theirs = _plain_attributes(module), _plain_attributes(rebuilt)
    return all(name in ours and ours[name] == value for name, value in theirs.items())


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _INTERNALS and isinstance(value, (bool, int, float, str, tuple, type(None)))
    }


def _encode_foreign(module: nn.Module, path: str, writing: Writing) -> dict[str, Any]:
    class_name = type(module).__name__
    writing.needs_network[path] = class_name
    try:
        state = _encode_state(module, writing)
    except ArtifactError as error:
        raise ArtifactError(f"calls the module {path!r} ({class_name}), whose state_dict {error}") from error
    return {"foreign": {"path": path, "class": class_name, "state": state}}


def _decode_foreign(data: dict[str, Any], reading: Reading) -> nn.Module:
    path, class_name = data["path"], data["class"]
    if reading.network is None:
        raise ArtifactError(
            f"it calls the module {path!r} of class {class_name}, whose code a file cannot hold: give the float "
            "network, trained or not, as load_quantized(path, network=...)"
        )
    name = type(reading.network).__name__
    try:
        found = reading.network.get_submodule(path)
    except AttributeError:
        found = None
    if found is None or type(found).__name__ != class_name:
        has = "nothing" if found is None else f"a {type(found).__name__}"
        raise ArtifactError(f"it needs a {class_name} at {path!r}, where the network given ({name}) has {has}")
    module = copy.deepcopy(found).cpu().float().eval()
    try:
        module.load_state_dict(_decode_state(data["state"], reading))
    except RuntimeError as error:
        raise ArtifactError(
            f"the {class_name} at {path!r} of the network given ({name}) has another shape: {error}"
        ) from error
    return module.requires_grad_(False)
