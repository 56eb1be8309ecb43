"""Which layer of ``torch.nn`` becomes which integer layer, for each kind."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from qat_lightning.layers.integer.attention import DynamicAttention
from qat_lightning.layers.integer.dynamic import DynamicCell, DynamicLinear
from qat_lightning.layers.integer.integer_layer import IntegerLayer, take_over_hooks, without_hooks
from qat_lightning.layers.integer.plain_dynamic import PlainDynamicLinear
from qat_lightning.layers.integer.recurrent import DynamicRecurrent
from qat_lightning.layers.integer.weight_only import WeightOnly, WeightOnlyEmbedding, weights_of
from qat_lightning.layers.integer.weights import WeightGrid
from qat_lightning.layers.operators import WEIGHTED, module_types
from qat_lightning.settings.recipe import Recipe

TOO_SLOW = "a training step in single operations takes four times as long as a float step, use kind='weight_only'"

_DYNAMIC = (*module_types("linear", "attention", "cell", "table"), nn.LSTM, nn.GRU)
_TABLES = module_types("table")


def why_not(module: nn.Module, recipe: Recipe) -> str:
    """Why a layer stays float; empty if it becomes integer.

    Args:
        module: The float layer.
        recipe: Its kind and scheme, and whether it is trained.

    Example:
        >>> dynamic = Recipe("eager", "x86", kind="dynamic")
        >>> why_not(nn.Linear(2, 2), dynamic)
        ''
        >>> why_not(nn.Conv2d(2, 2, 1), dynamic)
        "Conv2d has no dynamic kernel: kind='static' quantizes it, kind='weight_only' its weight"
    """
    name, kind = type(module).__name__, recipe.kind
    if type(module) not in WEIGHTED:
        return f"{name} is a custom class, whose forward may use its weight in any way"
    if kind == "dynamic" and type(module) not in _DYNAMIC:
        return f"{name} has no dynamic kernel: {_instead(module)}"
    if _is_reparametrized(module):
        return "its weight is computed from other parameters (a parametrization or a hook)"
    if "forward" in vars(module):
        return "its forward was replaced by another one, which may use its weight in any way"
    if kind == "dynamic" and _projects(module):
        return "LSTM with proj_size has no dynamic kernel: kind='weight_only' quantizes its weights"
    if isinstance(module, _TABLES) and module.max_norm is not None:
        return f"{name} with max_norm rescales its rows in every call"
    if kind == "dynamic" and isinstance(module, nn.MultiheadAttention) and _adds_positions(module):
        return "MultiheadAttention with add_bias_kv or add_zero_attn: kind='weight_only' quantizes its weights"
    return _why_not_these_grids(module, recipe)


def _why_not_these_grids(module: nn.Module, recipe: Recipe) -> str:
    name = type(module).__name__
    if isinstance(module, _TABLES):
        return _why_not_this_table(module, recipe)
    if recipe.by_token_or_group and not isinstance(module, nn.Linear):
        return (
            f"{name} has a dynamic kernel for one range per tensor and one scale per channel only: use "
            "activation_granularity='per_tensor' and weight_granularity='per_channel'"
        )
    if recipe.kind == "dynamic" and recipe.trained and isinstance(module, nn.RNNBase):
        return f"{name} cannot be trained for its dynamic kernel: {TOO_SLOW}"
    return ""


def _why_not_this_table(module: nn.Module, recipe: Recipe) -> str:
    name = type(module).__name__
    if recipe.kind == "dynamic" and (recipe.mode == "pt2e" or "dynamic_tables" not in recipe.families):
        return f"{name} has no dynamic kernel: kind='weight_only' quantizes its weight"
    if recipe.trained and getattr(module, "sparse", False):
        return f"{name} with sparse=True: quantizing its table would make the gradients dense"
    return ""


def lacks_kernel(module: nn.Module, kind: str) -> bool:
    """Whether a layer stays float only because it lacks a kernel: some of the ops it is exported as may have one.

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
        static = "kind='static' with mode='fx' or mode='eager', or with mode='pt2e' and backend='xnnpack'"
        if type(module) is not nn.ConvTranspose3d:
            static += " or 'x86'"
        return f"{static}, quantizes it, kind='weight_only' its weight"
    return "kind='weight_only' quantizes its weight"


def integer_layer(module: nn.Module, recipe: Recipe, shares: Mapping[str, Tensor] | None = None) -> IntegerLayer:
    """The integer layer of a float one; `why_not` has to return no reason for it. ``module`` is not changed.

    Args:
        module: The float layer.
        recipe: Its kind, scheme and backend.
        shares: For clipped grids, the share of each range that training chose, by the names of `rounded_parts`.
    """
    made = _made(module, recipe, shares)
    take_over_hooks(made, module)
    return made


def _made(module: nn.Module, recipe: Recipe, shares: Mapping[str, Tensor] | None) -> IntegerLayer:
    grid, engine, shares = WeightGrid.of(recipe), recipe.target.engine or "onednn", shares or {}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return WeightOnlyEmbedding.of(module, grid, shares.get("weight"))
    if recipe.kind == "weight_only":
        return WeightOnly(without_hooks(copy.deepcopy(module).cpu().float()), weights_of(module), grid, shares)
    if isinstance(module, nn.Linear):
        return _linear(module, recipe, grid, engine, shares.get("weight"))
    if isinstance(module, nn.MultiheadAttention):
        return DynamicAttention.of(module, grid, engine, shares)
    if isinstance(module, nn.RNNCellBase):
        return DynamicCell.of(module, grid, engine, shares)
    assert isinstance(module, nn.RNNBase)
    return DynamicRecurrent.of(module, grid, engine)


def _linear(module: nn.Linear, recipe: Recipe, grid: WeightGrid, engine: str, share: Tensor | None) -> IntegerLayer:
    if recipe.by_token_or_group:
        scheme = recipe.scheme
        return PlainDynamicLinear.of(
            module.weight, module.bias, grid, scheme.activation_granularity, scheme.activation_symmetric, share
        )
    return DynamicLinear.of(module.weight, module.bias, grid, engine, share)


def _is_reparametrized(module: nn.Module) -> bool:
    from torch.nn.utils.parametrize import is_parametrized

    # A hook that computes a weight (weight_norm, spectral_norm, pruning) leaves it as a plain attribute of the layer.
    computed = any(
        inner._forward_pre_hooks and any(isinstance(value, Tensor) for value in vars(inner).values())
        for inner in module.modules()
    )
    return is_parametrized(module) or computed


def _adds_positions(module: nn.MultiheadAttention) -> bool:
    return module.bias_k is not None or bool(module.add_zero_attn)
