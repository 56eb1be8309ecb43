"""What the integer layers have in common."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.numerics.dynamic_fake_quantize import disturbed


class IntegerLayer(nn.Module):
    """A layer for inference that holds its weights as integers, in plain tensors of its ``state_dict``.

    Kernels that want packed weights get them packed on the first call, for the engine of the layer; copies, pickles and
    loads hold the plain tensors only, and pack anew.

    Attributes:
        op: The kernel that runs, for reports.
    """

    op = ""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_packed"] = None
        self.training = False

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer should compute, in float64 from the same integers; None if that is not known."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> IntegerLayer:
        """Stay in evaluation."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is packed."""
        return {**self.__dict__, "_packed": None}

    def _apply(self, fn: Any, recurse: bool = True) -> IntegerLayer:
        """Stay in the given integers and in float32, on the CPU."""
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Before anything is taken over: kernels do not look at types themselves, and a file may hold anything.
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
    """Let an integer layer call the forward hooks that are on the float layer in whose place it comes."""
    for name in _HOOKS:
        integer.__dict__[name] = layer.__dict__[name].copy()


def without_hooks(layer: nn.Module) -> nn.Module:
    """``layer`` itself, without forward hooks."""
    for name in _HOOKS:
        layer.__dict__[name] = type(layer.__dict__[name])()
    return layer


def quantized_rows(integers: Tensor, scales: Tensor) -> Tensor:
    """Torch's quantized tensor of int8 rows, one scale each."""
    zeros = torch.zeros(scales.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():
        # Upstream warns on every use of its quantized tensors: pyproject's range of torch is the answer.
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
        made: Tensor = torch._make_per_channel_quantized_tensor(integers.contiguous(), scales.double(), zeros, 0)
    return made


def round_dynamically(x: Tensor) -> Tensor:
    """Put ``x`` on the uint8 grid of its own range and back, as the dynamic kernels do.

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
