"""The base class of the integer layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat_lightning.layers.quantized_tensors import without_deprecation
from qat_lightning.numerics.dynamic_fake_quantize import disturbed


class IntegerLayer(nn.Module):
    """A layer for inference that holds its weights as integers, in plain tensors of its ``state_dict``.

    Kernels that need packed weights get them packed on the first call, for the engine of the layer; copies, pickles and
    loads contain the plain tensors only, and pack again.

    Attributes:
        op: The kernel that runs, for reports.
        dequantizes: Whether each call computes float weights from the integers, for a float kernel.
    """

    op = ""
    dequantizes: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_packed"] = None
        self.training = False

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The exact result, in float64 from the same integers; None if there is no reference."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> IntegerLayer:
        """Stay in evaluation."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Omit packed weights."""
        return {**self.__dict__, "_packed": None}

    def _apply(self, fn: Any, recurse: bool = True) -> IntegerLayer:
        """Keep integers and float32 tensors as they are, on the CPU."""
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Check before anything is loaded: kernels do not check dtypes themselves, and a file may contain anything.
        for name, own in {**self._parameters, **self._buffers}.items():
            given = state_dict.get(prefix + name)
            if own is not None and isinstance(given, Tensor) and given.dtype is not own.dtype:
                raise TypeError(f"{prefix}{name} is {given.dtype}, where {own.dtype} is expected")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.__dict__["_packed"] = None


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def take_over_hooks(integer: nn.Module, layer: nn.Module) -> None:
    """Give an integer layer the forward hooks of the float layer that it replaces."""
    for name in _HOOKS:
        integer.__dict__[name] = layer.__dict__[name].copy()


def without_hooks(layer: nn.Module) -> nn.Module:
    """``layer`` itself, without forward hooks."""
    for name in _HOOKS:
        layer.__dict__[name] = type(layer.__dict__[name])()
    return layer


def quantized_rows(integers: Tensor, scales: Tensor) -> Tensor:
    """Torch's quantized tensor of int8 rows, with one scale per row."""
    zeros = torch.zeros(scales.shape[0], dtype=torch.int64)
    with without_deprecation():
        made: Tensor = torch._make_per_channel_quantized_tensor(integers.contiguous(), scales.double(), zeros, 0)
    return made


def round_dynamically(x: Tensor) -> Tensor:
    """Round ``x`` to the uint8 grid of its own range, as the dynamic kernels do.

    Args:
        x: Float32 of any shape.

    Returns:
        float64.
    """
    if not x.numel():
        return x.double()
    x = disturbed(x)
    scale, zero_point = torch._choose_qparams_per_tensor(x.float(), False)
    integers = (torch.round(x.float() / scale) + zero_point).clamp(0, 255)
    return (integers.double() - zero_point) * scale
