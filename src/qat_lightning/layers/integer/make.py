"""Which layer of ``torch.nn`` becomes which integer layer, in each kind."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from qat_lightning.layers.integer.attention import DynamicAttention
from qat_lightning.layers.integer.dynamic import DynamicCell, DynamicLinear
from qat_lightning.layers.integer.integer_layer import IntegerLayer
from qat_lightning.layers.integer.recurrent import DynamicRecurrent
from qat_lightning.layers.integer.weight_only import WeightOnly, WeightOnlyEmbedding, weights_of
from qat_lightning.layers.integer.weights import WeightGrid
from qat_lightning.layers.operators import WEIGHTED, module_types
from qat_lightning.settings.recipe import Recipe

_DYNAMIC = (*module_types("linear", "attention", "cell"), nn.LSTM, nn.GRU)


def why_not(module: nn.Module, kind: str) -> str:
    """Why a layer stays float in ``kind``; empty if it becomes integer.

    Example:
        >>> why_not(nn.Linear(2, 2), "dynamic")
        ''
        >>> why_not(nn.Conv2d(2, 2, 1), "dynamic")
        "Conv2d has no dynamic kernel: kind='static' quantizes it, kind='weight_only' its weight"
    """
    name = type(module).__name__
    if type(module) not in WEIGHTED:
        return f"{name} is a class of its own, whose forward may do anything with its weight"
    if kind == "dynamic" and type(module) not in _DYNAMIC:
        return f"{name} has no dynamic kernel: {_instead(module)}"
    if _is_reparametrized(module):
        return "its weight is computed from other parameters (a parametrization or a hook)"
    if kind == "dynamic" and _projects(module):
        return "LSTM with proj_size has no dynamic kernel: kind='weight_only' quantizes its weights"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return f"{name} with max_norm rescales its rows in every call"
    if kind == "dynamic" and isinstance(module, nn.MultiheadAttention) and _adds_positions(module):
        return "MultiheadAttention with add_bias_kv or add_zero_attn: kind='weight_only' quantizes its weights"
    return ""


def lacks_kernel(module: nn.Module, kind: str) -> bool:
    """Whether a layer stays float for want of a kernel only: of the ops that it is exported as, some may have one.

    Example:
        >>> lacks_kernel(nn.Bilinear(2, 2, 2), "dynamic"), lacks_kernel(nn.Linear(2, 2), "dynamic")
        (True, False)
    """
    if kind != "dynamic" or type(module) not in WEIGHTED:
        return False
    return type(module) not in _DYNAMIC or (_projects(module) and not _is_reparametrized(module))


def _projects(module: nn.Module) -> bool:
    return isinstance(module, nn.LSTM) and bool(module.proj_size)


def _instead(module: nn.Module) -> str:
    if type(module) in module_types("convolution"):
        return "kind='static' quantizes it, kind='weight_only' its weight"
    if type(module) in module_types("transposed"):
        static = "kind='static' with mode='fx', or with mode='pt2e' and backend='xnnpack'"
        if type(module) is not nn.ConvTranspose3d:
            static += " or 'x86'"
        return f"{static}, quantizes it, kind='weight_only' its weight"
    return "kind='weight_only' quantizes its weight"


def integer_layer(module: nn.Module, recipe: Recipe) -> IntegerLayer:
    """The integer layer of a float one for which `why_not` has no reason; ``module`` stays as it is.

    Args:
        module: The float layer.
        recipe: Its kind, scheme and backend.
    """
    grid, engine = WeightGrid.of(recipe), recipe.target.engine or "onednn"
    if recipe.kind == "weight_only":
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return WeightOnlyEmbedding.of(module, grid)
        return WeightOnly(copy.deepcopy(module).cpu().float(), weights_of(module), grid)
    if isinstance(module, nn.Linear):
        return DynamicLinear.of(module.weight, module.bias, grid, engine)
    if isinstance(module, nn.MultiheadAttention):
        return DynamicAttention.of(module, grid, engine)
    if isinstance(module, nn.RNNCellBase):
        return DynamicCell.of(module, grid, engine)
    assert isinstance(module, nn.RNNBase)
    return DynamicRecurrent.of(module, grid, engine)


def _is_reparametrized(module: nn.Module) -> bool:
    from torch.nn.utils.parametrize import is_parametrized

    hooks: Any = (module._forward_hooks, module._forward_pre_hooks)
    return is_parametrized(module) or any(hooks) or "forward" in vars(module)


def _adds_positions(module: nn.MultiheadAttention) -> bool:
    return module.bias_k is not None or bool(module.add_zero_attn)
