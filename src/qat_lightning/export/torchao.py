"""Integer networks as float networks with torchao's tensors, and as safetensors that torchao's loaders read.

The weight of a linear layer or an embedding becomes an ``IntxUnpackedToInt8Tensor`` with the network's own integers and
scales, so it computes with the trained values. It takes one byte per weight in memory and in files, also at 4 bits: it
is torchao's format for export and for transformers, not for a kernel.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import CombinationError, ExportError, MissingExtraError
from qat_lightning.export.comparison import Comparison, problem
from qat_lightning.graph.example import call_apart
from qat_lightning.layers.integer import IntegerLayer, WeightGrid
from qat_lightning.layers.integer.plain_dynamic import PlainDynamicLinear
from qat_lightning.layers.integer.weight_only import WeightOnly, WeightOnlyEmbedding
from qat_lightning.layers.integer.weights import restore
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.modes import traits_of
from qat_lightning.settings.recipe import Recipe
from qat_lightning.storage import Place, place, require_storage
from qat_lightning.whole_files import move_whole

FILE = "model.safetensors"
"""Name of the weights file in the folder that `save_torchao` writes."""

_BY_TOKEN: Any = "int8_asym_per_token"
"""Value of torchao's enumeration as a str; its safetensors loader does not accept the enumeration."""


def torchao_config(recipe: Recipe) -> Any:
    """Return the config for torchao's ``quantize_`` that corresponds to a recipe.

    Args:
        recipe: Recipe of the network, which need not exist yet.

    Raises:
        CombinationError: There is no such config; the message says what to choose instead.

    Example:
        >>> from qat_lightning.settings.scheme import Scheme
        >>> scheme = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=32)
        >>> type(torchao_config(Recipe("eager", "x86", scheme, kind="weight_only"))).__name__
        'IntxWeightOnlyConfig'
    """
    why = _refusal(recipe)
    if why:
        raise CombinationError(f"No torchao config has the grids of this network: {why}")
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    scheme = recipe.scheme
    grouped = scheme.weight_granularity == "per_group"
    granularity = PerGroup(scheme.weight_group_size) if grouped else PerAxis(0)
    dtype = getattr(torch, f"int{scheme.weight_bits}")
    mapping = MappingType.SYMMETRIC if scheme.weight_symmetric else MappingType.ASYMMETRIC
    if recipe.kind == "weight_only":
        return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, mapping_type=mapping)
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=granularity, weight_mapping_type=mapping
    )


def _refusal(recipe: Recipe) -> str:
    scheme = recipe.scheme
    if recipe.kind not in DIRECT:
        return f"kind={recipe.kind!r} has fixed ranges of activations: use kind='dynamic' or kind='weight_only'."
    if not traits_of(recipe.mode).packs:
        return f"mode={recipe.mode!r} keeps no layers that could hold torchao's tensors: use mode='eager' or mode='fx'."
    if len(recipe.each) > 1:
        return (
            "torchao has one config for the whole network, and layers here have their own bits: use "
            "scheme.overrides=null."
        )
    if recipe.kind == "dynamic" and scheme.activation_granularity != "per_token":
        return "its activations have a range for each token: use a scheme of activation_granularity='per_token'."
    if recipe.kind == "dynamic" and scheme.activation_symmetric:
        return (
            "its symmetric activations (Int8DynamicActivationInt8WeightConfig) have steps of max|x| / 127.5, and these "
            "of max|x| / 127: use a scheme of activation_symmetric=False."
        )
    return ""


def to_torchao(network: QuantizedNetwork) -> nn.Module:
    """Convert an integer network to torchao's tensors in linear layers and embeddings.

    Other integer layers, such as convolutions and LSTMs, get their dequantized float weights.

    Args:
        network: Of ``kind="weight_only"``, or ``"dynamic"`` by token, from ``mode="eager"`` or ``"fx"``; not changed.

    Returns:
        The float network in evaluation mode with these tensors, equal to fake-quant; of your own class in
        ``mode="eager"``.

    Raises:
        CombinationError: No torchao config has these grids.
        ExportError: A layer's size is not a multiple of the group size.

    Example:
        >>> from qat_lightning.graph.example import Example
        >>> from qat_lightning.modes.uncalibrated import quantize
        >>> recipe, call = Recipe("eager", "x86", kind="weight_only"), Example((torch.randn(4, 8),))
        >>> int8 = QuantizedNetwork(quantize(nn.Sequential(nn.Linear(8, 2)), call, recipe), recipe, call)
        >>> type(to_torchao(int8)[0].weight).__name__
        'IntxUnpackedToInt8Tensor'
    """
    torchao_config(network.recipe)  # raises if there is no config
    bits = network.recipe.scheme.weight_bits
    made: nn.Module = copy.deepcopy(network.network)
    for name, module in list(made.named_modules()):
        if isinstance(module, IntegerLayer):
            holder, _, leaf = name.rpartition(".")
            layer = _float_layer(module, name, bits)
            if not name:
                return layer
            setattr(made.get_submodule(holder), leaf, layer)
    return made


def _float_layer(module: IntegerLayer, name: str, bits: int) -> nn.Module:
    layer: Any
    parts: tuple[Tensor | None, ...]
    if isinstance(module, PlainDynamicLinear):
        layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        layer.bias = None if module.bias is None else nn.Parameter(module.bias, requires_grad=False)
        parts = (module.integers, module.scales, None)
        _set(layer, "weight", _tensor(parts, WeightGrid(*module.grid), module.in_features, bits, name, dynamic=True))
    elif isinstance(module, WeightOnlyEmbedding) and not module.mode:
        layer = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
        parts = (module.integers, module.scales, module.zero_points)
        _set(layer, "weight", _tensor(parts, WeightGrid(*module.grid), module.embedding_dim, bits, name))
    elif isinstance(module, WeightOnly) and isinstance(module.layer, nn.Linear):
        layer = module.layer
        parts = tuple(module._buffers[f"weight_{part}"] for part in ("integers", "scales", "zero_points"))
        _set(layer, "weight", _tensor(parts, module.grid, layer.in_features, bits, name))
    elif isinstance(module, WeightOnly):
        layer = module.layer
        for weight in module.shapes:
            holder, _, leaf = weight.rpartition(".")
            _set(layer.get_submodule(holder), leaf, module.dequantized(weight))
        if isinstance(layer, nn.RNNBase):
            layer._init_flat_weights()
    else:
        raise ExportError(
            f"{name!r} is a {type(module).__name__}, for which torchao has no tensor: keep it float with exclude=."
        )
    made: nn.Module = layer.eval()
    return made


def _set(layer: nn.Module, name: str, weight: Tensor) -> None:
    setattr(layer, name, nn.Parameter(weight, requires_grad=False))


def _tensor(parts: Any, grid: WeightGrid, values: int, bits: int, name: str, *, dynamic: bool = False) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    stored, scales, zero_points = parts
    if grid.group > 0 and values % grid.group:
        raise ExportError(
            f"{name!r} has rows of {values} weights, which do not divide into groups of {grid.group}, as torchao "
            "needs: use a weight_group_size that divides it, or keep the layer float with exclude=."
        )
    block = (1, grid.group if grid.group > 0 else values)
    made: Tensor = IntxUnpackedToInt8Tensor(
        qdata=restore(stored, values, grid)[:, :values].contiguous(),
        scale=scales.clone(),
        zero_point=torch.zeros_like(scales, dtype=torch.int8) if zero_points is None else zero_points.clone(),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=block,
        dtype=torch.float32,
        activation_quantization=_BY_TOKEN if dynamic else None,
    )
    return made


def save_torchao(network: QuantizedNetwork, folder: str | Path) -> Place:
    """Write a network as safetensors in torchao's layout, load it again, and compare outputs.

    A ``PreTrainedModel`` of ``mode="eager"`` becomes a folder that transformers' ``from_pretrained`` reads, with a
    ``TorchAoConfig`` in its ``config.json``; embeddings that are tied to a head are stored separately. For any other
    network, the entries of the ``state_dict`` are written under ``network.``; load them into its float network with::

        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        with safe_open(folder / "model.safetensors", "pt") as file:
            entries, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
        state, _ = unflatten_tensor_state_dict(entries, metadata)
        nn.ModuleDict({"network": network}).load_state_dict(state, assign=True)

    Args:
        network: See `to_torchao`.
        folder: Where the files are moved when they are complete; created if needed. A path, or a URL that fsspec
            supports (``s3://bucket/run``).

    Returns:
        The folder.

    Raises:
        CombinationError: No torchao config has these grids.
        ExportError: Torchao's tensors do not support a layer, or the loaded network computes different values.
        MissingExtraError: safetensors, or the package for the protocol of a URL, is not installed.
    """
    require_storage(folder)
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("save_torchao needs safetensors: pip install 'qat-lightning[hf]'.") from error
    made, where = to_torchao(network), place(folder)
    if isinstance(where, Path):
        where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where if isinstance(where, Path) else None, prefix=".") as apart:
        here = Path(apart)
        loaded = _save_pretrained(made, network.recipe, here) if _is_pretrained(made) else _save_plain(made, here)
        found, call = Comparison(), network.example
        with torch.no_grad():
            found.update(call_apart(network, call), call_apart(loaded, call))
        wrong = problem(found, network, [call], min_sqnr_db=20.0, min_equal=0.995)
        if wrong:
            raise ExportError(f"The network written to {folder} computes different values after loading: {wrong}.")
        move_whole(sorted(here.iterdir()), where)
    return where


def _is_pretrained(network: nn.Module) -> bool:
    import sys

    transformers: Any = sys.modules.get("transformers")  # a network of its classes has imported it
    return transformers is not None and isinstance(network, transformers.PreTrainedModel)


def _save_plain(network: nn.Module, folder: Path) -> nn.Module:
    from safetensors import safe_open
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import (
        flatten_tensor_state_dict,
        unflatten_tensor_state_dict,
    )

    # Under a name of its own: torchao takes no entry without a dot in its name. Shared tensors are written apart.
    whole = nn.ModuleDict({"network": network})
    entries, metadata = flatten_tensor_state_dict(whole.state_dict())
    save_file({name: tensor.clone() for name, tensor in entries.items()}, str(folder / FILE), metadata)
    with safe_open(str(folder / FILE), "pt") as file:
        entries, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    state, _ = unflatten_tensor_state_dict(entries, metadata)
    whole.load_state_dict(state, assign=True)
    return whole["network"]


def _save_pretrained(network: Any, recipe: Recipe, folder: Path) -> nn.Module:
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    embedding = network.get_input_embeddings()
    config = TorchAoConfig(
        torchao_config(recipe),
        modules_to_not_convert=[name for name, module in network.named_modules() if _is_float(module)],
        include_input_output_embeddings=embedding is not None and not _is_float(embedding),
    )
    network.config = copy.deepcopy(network.config)
    for part in (network.config, network.config.get_text_config()):
        part.tie_word_embeddings = False
    network.config.quantization_config = config
    network.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    network.save_pretrained(folder)
    return type(network).from_pretrained(folder, local_files_only=True)  # type: ignore[no-any-return]


def _is_float(module: nn.Module) -> bool:
    """Whether a layer that could hold torchao's tensor holds a plain one."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return False
    return not isinstance(module.weight.data, IntxUnpackedToInt8Tensor)
