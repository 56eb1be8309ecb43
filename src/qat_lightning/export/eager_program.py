"""The int8 network of mode eager in plain ops, inside the user's own ``forward``.

In the int8 network, a tensor subclass records which work a kernel has already done. Here, the float tensor itself is
marked as it passes from module to module.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.errors import ExportError
from qat_lightning.export.fx_program import refuse_other
from qat_lightning.export.grids import Grid, QdqLayer, on_grid
from qat_lightning.export.plain_layers import plain_integer_layer
from qat_lightning.export.spelling import Spelling
from qat_lightning.graph.example import Example
from qat_lightning.layers.integer import IntegerLayer
from qat_lightning.layers.subpixel import Subpixel
from qat_lightning.modes.eager.calls import CountsCalls
from qat_lightning.modes.eager.int8 import Int8BatchNorm, Int8Hardtanh, Int8Layer, Int8ReLU, Int8ReLU6, Int8Tensor
from qat_lightning.modes.eager.layers import become
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import packing_engine, quantized_engine

_MARK = "_qat_lightning_pending"


class QdqChain(CountsCalls, nn.Module):
    """`Int8Layer` in plain ops.

    Attributes:
        kernel: The layer, up to its output on its grid.
        grids: For each call within a forward pass: the grid of an input that does not come from another such layer
            (None if there never was one), the grid of the output, and the limit of an activation after it.
        pending: Modules whose work the kernel includes.
        subpixel: For a transposed convolution, the equivalent convolution that the kernel computes.
        calls: While kernels are compared, the outputs of the int8 layer, call by call.
    """

    kernel: QdqLayer
    grids: tuple[tuple[Grid | None, Grid, float], ...]
    pending: tuple[str, ...]
    subpixel: Subpixel | None
    calls: list[Tensor] | None
    where: str
    target: Backend

    def forward(self, input: Tensor) -> Tensor:
        """Map a float tensor to a float tensor on the output's grid."""
        input_grid, self.kernel.output, self.kernel.limit = self.grids[self.next_call(len(self.grids))]
        if hasattr(input, _MARK):
            self._refuse_pending(getattr(input, _MARK))
        elif input_grid is None:
            raise ExportError(f"{self.where!r} has no grid for its float input.")
        else:
            input = on_grid(input.float(), input_grid)
        output: Tensor = self.kernel(input)
        if self.subpixel is not None:
            output = self.subpixel.shuffled(output)
        if self.calls is not None:
            wanted = self.calls.pop(0)
            refuse_other(self.where, wanted, output, self.target)
            output = wanted.dequantize().contiguous()
        setattr(output, _MARK, self.pending)
        return output

    def _refuse_pending(self, pending: tuple[str, ...]) -> None:
        if pending:
            raise ExportError(f"{self.where!r} got a tensor to which {pending[0]!r} has not been applied yet.")

    @property
    def weight(self) -> Tensor:
        """The weight, for a forward that reads its dtype or device."""
        return self.kernel.weight()


class _Passed(nn.Module):
    """Replaces a BatchNorm that is folded into a kernel."""

    link: str

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input``."""
        pending = getattr(input, _MARK, ())
        if pending[:1] != (self.link,):
            raise ExportError(f"The BatchNorm {self.link!r} is folded into one layer but got the output of another.")
        setattr(input, _MARK, pending[1:])
        return input


class _PassedOr(nn.Module):
    """An activation that a kernel may already include."""

    link: str

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input`` if a kernel has already computed this activation, else compute it."""
        pending = getattr(input, _MARK, ())
        if pending[:1] == (self.link,):
            setattr(input, _MARK, pending[1:])
            return input
        output: Tensor = super().forward(input)
        return output


class _ReLU(_PassedOr, nn.ReLU):
    pass


class _ReLU6(_PassedOr, nn.ReLU6):
    pass


class _Hardtanh(_PassedOr, nn.Hardtanh):
    pass


_ACTIVATIONS: dict[type[nn.Module], type[nn.Module]] = {Int8ReLU: _ReLU, Int8ReLU6: _ReLU6, Int8Hardtanh: _Hardtanh}


@torch.no_grad()
def eager_float_network(
    network: nn.Module, example: Example, target: Backend, spell: Spelling | None = None
) -> nn.Module:
    """Convert the int8 layers of a network to plain ops, and compare each with its kernel.

    Args:
        network: The int8 network; not changed.
        example: A real batch.
        target: Its backend.
        spell: See `qat_lightning.export.program.int8_program`.

    Raises:
        ExportError: A layer has no translation, or its translation computes different values.
    """
    with packing_engine(target.engine):
        copied = copy.deepcopy(network)
    with quantized_engine(target.engine):
        recorded = _record(network, example)
    for name, module in list(copied.named_modules()):
        if isinstance(module, Int8Layer):
            _translate(module, name, target)
        elif isinstance(module, Int8BatchNorm):
            become(module, _Passed)
        elif type(module) in _ACTIVATIONS:
            become(module, _ACTIVATIONS[type(module)])
        elif isinstance(module, IntegerLayer):
            holder, _, leaf = name.rpartition(".")
            setattr(copied.get_submodule(holder), leaf, (spell or plain_integer_layer)(module, name))
    chains = {name: module for name, module in copied.named_modules() if isinstance(module, QdqChain)}
    for name, chain in chains.items():
        chain.calls = recorded[name]
    copied(*example.args, **example.kwargs)
    for chain in chains.values():
        chain.calls = None
    return copied


def _record(network: nn.Module, example: Example) -> dict[str, list[Tensor]]:
    calls: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, Int8Layer):
            rows = calls.setdefault(name, [])

            def keep(module: nn.Module, args: Any, output: Int8Tensor, rows: list[Tensor] = rows) -> None:
                rows.append(output.quantized)

            hooks.append(module.register_forward_hook(keep))
    try:
        network(*example.args, **example.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _translate(module: Int8Layer, name: str, target: Backend) -> None:
    kernel = QdqLayer.of(module.op)
    grids = tuple(_grids(module, call, target) for call in range(module.chain.calls))
    kept = {"pending": module.pending, "subpixel": module.subpixel}
    module._buffers.clear()
    module._modules.clear()
    become(module, QdqChain, grids=grids, calls=None, where=name, target=target, **kept)
    module.kernel = kernel


def _grids(module: Int8Layer, call: int, target: Backend) -> tuple[Grid | None, Grid, float]:
    """Return an entry of `QdqChain.grids` for a call."""
    in_scale, in_zero_point, scale, zero_point = module.grids(call)
    limit = math.inf
    if module.chain.limit is not None:
        last = round(module.chain.limit / scale) + zero_point
        if last < torch.iinfo(target.activation_dtype).max:
            limit = (last - zero_point) * scale
    input_grid = Grid(in_scale, in_zero_point, target.activation_dtype) if in_scale > 0 else None
    return input_grid, Grid(scale, zero_point, target.activation_dtype), limit
