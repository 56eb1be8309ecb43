"""The engine that packs each int8 weight: that of the backend, or oneDNN where it computes the same integers faster.

A weight packed for an engine runs that engine's kernels. Two engines are slow for some weights that oneDNN computes
exactly: QNNPACK, which stands in for oneDNN on CPUs where 8-bit weights overflow
(`qat_lightning.settings.engines.engine_here`), and FBGEMM in grouped convolutions without a kernel of their own, which
it computes group by group (a depthwise convolution after a separate padding takes many times as long).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.settings.engines import STAND_IN, engine_here, overflows, quantized_engine

ONEDNN = "onednn"
PACKED = ("Conv2dPackedParamsBase", "Conv3dPackedParamsBase", "LinearPackedParamsBase")
"""Names of torch's classes of packed weights."""


@dataclass(frozen=True)
class Grouping:
    """The numbers of a convolution that decide which kernel FBGEMM has for it.

    Attributes:
        channels: Channels of one group: of the input, and of the output.
        groups: Number of groups.
        kernel: Height and width.
        stride: As of `torch.nn.Conv2d`, like the others.
        padding: Zeros around the input.
        dilation: Distance of the kernel's elements.
    """

    channels: tuple[int, int]
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def direct(self) -> bool:
        """Whether FBGEMM computes it as a whole, and not group by group.

        Source: ``takeDepthWiseFastPath`` and ``fbgemmOptimizedGConv`` of FBGEMM.
        """
        if self.groups == 1:
            return True
        centred = self.padding == tuple(size // 2 for size in self.kernel) and len(set(self.kernel)) == 1
        simple = centred and set(self.stride) in ({1}, {2}) and set(self.dilation) == {1} and self.kernel[0] > 1
        before, after = self.channels
        if before == 1:
            return simple and self.groups % 8 == 0 and after <= 2
        return simple and self.kernel[0] == 3 and before == after and before in (2, 4, 8, 16)

    @property
    def suits_onednn(self) -> bool:
        """Whether oneDNN has a fast kernel: not for groups of two or three channels."""
        return self.groups == 1 or self.channels == (1, 1) or min(self.channels) >= 4


def engine_of(weight: Tensor, engine: str | None, grouping: Grouping | None = None) -> str | None:
    """The engine whose kernel computes a weight on this CPU.

    Args:
        weight: One of torch's quantized tensors, as it is before packing.
        engine: The engine of the backend.
        grouping: Of a convolution; None for another layer.

    Returns:
        `engine_here` of ``engine``, or oneDNN where that is exact and much faster.

    Example:
        >>> weight = torch.quantize_per_tensor(torch.ones(8, 1, 3, 3), 0.1, 0, torch.qint8)
        >>> after_a_pad = Grouping((1, 1), 8, (3, 3), (1, 1), (0, 0), (1, 1))
        >>> engine_of(weight, "fbgemm", after_a_pad)
        'onednn'
    """
    here = engine_here(engine)
    if grouping is not None and not grouping.suits_onednn:
        return here
    indirect = here == "fbgemm" and grouping is not None and not grouping.direct
    slow = indirect or (here == STAND_IN and engine == ONEDNN)
    if not slow or ONEDNN not in torch.backends.quantized.supported_engines:
        return here
    return ONEDNN if _is_centred(weight) and not overflows(weight.int_repr()) else here


def _is_centred(weight: Tensor) -> bool:
    """Whether zero points are 0, as oneDNN requires."""
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return weight.q_zero_point() == 0
    return not bool(weight.q_per_channel_zero_points().any())


def is_packed(value: Any) -> bool:
    """Whether ``value`` is a packed weight, which int8 layers and functional layers hold."""
    return isinstance(value, torch.ScriptObject) and kind_of_packed(value) in PACKED


def kind_of_packed(value: Any) -> str:
    """The name of the class of one of torch's script objects."""
    return str(value._type().qualified_name()).rpartition(".")[2]


def packed_anew(packed: Any, engine: str | None) -> Any:
    """A copy of a packed weight, packed for the engine that computes it on this CPU; see `engine_of`.

    Raises:
        RuntimeError: It does not return its weight, like QNNPACK's 3-d convolutions.
    """
    with quantized_engine(engine_of_packed(packed, engine)):
        return copy.deepcopy(packed)


def choose_kernels(network: nn.Module, engine: str | None) -> dict[str, str]:
    """Pack each weight of an int8 network, which is packed for `engine_here`, for the engine that computes it.

    Args:
        network: The int8 network; changed in place.
        engine: The engine of its backend.

    Returns:
        The engine of each weight that was packed again, by the name of the module and its attribute.
    """
    if engine is None or (engine_here(engine) == engine and engine != "fbgemm"):
        return {}
    chosen: dict[str, str] = {}
    for name, module, attribute, value in packed_weights(network):
        try:
            other = engine_of_packed(value, engine)
        except RuntimeError:  # QNNPACK's 3-d convolutions do not return their weights
            continue
        if other is not None and other != engine_here(engine):
            vars(module)[attribute] = packed_anew(value, engine)
            chosen[f"{name}.{attribute}"] = other
    return chosen


def packed_weights(network: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """The packed weights of a network, each with the name of its module, the module and the attribute."""
    for name, module in network.named_modules():
        for attribute, value in list(vars(module).items()):
            if is_packed(value):
                yield name, module, attribute, value


def engine_of_packed(packed: Any, engine: str | None) -> str | None:
    """The engine that computes a packed weight on this CPU; see `engine_of`.

    Raises:
        RuntimeError: It does not return its weight.
    """
    if kind_of_packed(packed) == "Conv3dPackedParamsBase" or engine is None:
        return engine_here(engine)
    weight = packed.unpack()[0]
    if kind_of_packed(packed) == "LinearPackedParamsBase":
        return engine_of(weight, engine)
    if packed.transpose():
        return engine_here(engine)
    channels = weight.shape[1], weight.shape[0] // packed.groups()
    sizes = (tuple(numbers) for numbers in (packed.stride(), packed.padding(), packed.dilation()))
    return engine_of(weight, engine, Grouping(channels, packed.groups(), tuple(weight.shape[2:]), *sizes))
