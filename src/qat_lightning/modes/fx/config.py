"""What FX mode quantizes: upstream's table of patterns with our folded layers, without the ops that stay float."""

from __future__ import annotations

import functools
from typing import Any

import torch.ao.nn.intrinsic as nni
import torch.ao.nn.quantized.reference as nnqr
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    ObservationType,
    get_native_backend_config,
)

from qat_lightning.layers.operators import faces_of
from qat_lightning.layers.padding import pad
from qat_lightning.layers.qat_modules import FOLDED_OF_FLOAT, FOLDED_OF_FUSED
from qat_lightning.modes.qconfig import make_qconfig
from qat_lightning.settings.recipe import Recipe

LEFT_FLOAT = faces_of(
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "layer_norm", "group_norm", "instance_norm",
    "embedding", "embedding_bag", "lstm", "gru", "lstm_cell", "gru_cell", "rnn_cell", "sigmoid", "tanh", "softmax",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean", "interpolate", "prelu",
)  # fmt: skip
"""Ops left float: native kernels lack them for static quantization, run them on a predefined grid, or (means) round
them to their input's grid, which is coarser than the result and has ties that kernels break differently.
"""


_KEEP_GRID: tuple[Any, ...] = (pad,)
"""Ops that upstream's table lacks, with kernels that keep the grid of their input."""

_BATCHNORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
"""Not fused with a following ReLU, which would rename the parameters; the ReLU is still folded into the range."""

_REFERENCE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nnqr.Conv1d,
    nn.Conv2d: nnqr.Conv2d,
    nn.Conv3d: nnqr.Conv3d,
    nn.Linear: nnqr.Linear,
}


@functools.cache
def backend_config() -> BackendConfig:
    """Upstream's native config, with our folded layers in place of its own and without the ops that stay float."""
    config = BackendConfig("qat-lightning")
    weighted = moving = None
    for pattern in get_native_backend_config().configs:
        parts = pattern.pattern if isinstance(pattern.pattern, tuple) else (pattern.pattern,)
        batchnorm_relu = parts[0] in (nni.BNReLU2d, nni.BNReLU3d) or (parts[0] in _BATCHNORMS and len(parts) > 1)
        if batchnorm_relu or any(part in LEFT_FLOAT for part in parts):
            continue
        if pattern.pattern in FOLDED_OF_FUSED:
            pattern.set_qat_module(FOLDED_OF_FUSED[pattern.pattern])
        if pattern._num_tensor_args_to_observation_type:
            # With a number, upstream gives the output the range of the input, which the addition exceeds.
            every = dict.fromkeys((0, 1, 2), ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
            pattern._set_num_tensor_args_to_observation_type(every)
        if pattern.pattern is nn.Conv2d:
            weighted = pattern
        if pattern.pattern is F.max_pool2d:
            moving = pattern
        config.set_backend_pattern_config(pattern)
    assert weighted is not None
    assert moving is not None
    for face in _KEEP_GRID:
        config.set_backend_pattern_config(
            BackendPatternConfig(face)
            .set_observation_type(ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT)
            .set_dtype_configs(moving.dtype_configs)
        )
    for layer, folded in FOLDED_OF_FLOAT.items():
        config.set_backend_pattern_config(
            BackendPatternConfig(folded)
            .set_observation_type(ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
            .set_dtype_configs(weighted.dtype_configs)
            .set_root_module(layer)
            .set_reference_quantized_module(_REFERENCE[layer])
        )
    return config


def shares_range(face: Any) -> bool:
    """Whether a function, method or module class returns values on the grid of its inputs."""
    return face in _sharing()


@functools.cache
def _sharing() -> frozenset[Any]:
    shared = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    return frozenset(config.pattern for config in backend_config().configs if config.observation_type is shared)


def qconfig_mapping(recipe: Recipe, selected: dict[str, bool]) -> QConfigMapping:
    """The recipe's QConfig for the selected modules, and none for the others."""
    qconfig = make_qconfig(recipe)
    mapping = QConfigMapping().set_global(None if recipe.include else qconfig)
    for name, chosen in selected.items():
        mapping.set_module_name(name, qconfig if chosen else None)
    return mapping
