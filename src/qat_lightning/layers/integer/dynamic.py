"""Dynamic quantization: int8 weights, and activations rounded to uint8 with a range computed in each call.

The kernels are PyTorch's (https://docs.pytorch.org/docs/stable/quantization.html, dynamic quantization). Unlike
upstream's layers these use all 8 bits of activations: weights stay within the backend's limit, so no kernel saturates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.layers.integer.integer_layer import IntegerLayer, quantized_rows, round_dynamically
from qat_lightning.layers.integer.weights import WeightGrid, quantize_rows
from qat_lightning.layers.kernels import engine_of
from qat_lightning.settings.engines import quantized_engine


class DynamicLinear(IntegerLayer):
    """``nn.Linear`` with int8 weights and dynamic activations.

    Args:
        in_features: Size of an input.
        out_features: Size of an output.
        bias: Whether there is a bias.
        engine: The quantized engine that packs and runs the weight.

    Attributes:
        integers: int8 buffer of shape ``(out_features, in_features)``.
        scales: float32 buffer of shape ``(out_features,)``.
    """

    op = "quantized::linear_dynamic"
    integers: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, engine: str = "onednn") -> None:
        super().__init__()
        if engine not in torch.backends.quantized.supported_engines:
            raise ValueError(f"{engine!r} is not a quantized engine of this build of PyTorch")
        self.in_features, self.out_features, self.engine = in_features, out_features, engine
        self.register_buffer("integers", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, grid: WeightGrid, engine: str, share: Tensor | None = None
    ) -> DynamicLinear:
        """Quantize a weight of shape ``(out_features, in_features)``; ``share`` is passed to `quantize_rows`."""
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, engine)
        layer.integers, scales, _ = quantize_rows(weight, grid, share)
        layer.scales = scales[:, 0].clone()
        layer.bias = None if bias is None else bias.detach().float().clone()
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight that the integers represent, float32."""
        return self.integers.float() * self.scales[:, None]

    def packed(self) -> Any:
        """The weight packed for the engine's kernels."""
        if self.__dict__["_packed"] is None:
            weight = quantized_rows(self.integers, self.scales)
            with quantized_engine(engine_of(weight, self.engine)):
                self.__dict__["_packed"] = torch.ops.quantized.linear_prepack(weight, self.bias)
        return self.__dict__["_packed"]

    def forward(self, input: Tensor) -> Tensor:
        """Any float input of shape ``(..., in_features)``."""
        if input.dim() == 1:
            return self.forward(input[None])[0]
        with quantized_engine(self.engine):
            result: Tensor = torch.ops.quantized.linear_dynamic(input.float().contiguous(), self.packed(), False)
        return result

    def reference(self, input: Tensor) -> Tensor:
        """The same computation in float64."""
        weight = self.integers.double() * self.scales.double()[:, None]
        return F.linear(round_dynamically(input), weight, None if self.bias is None else self.bias.double())

    def extra_repr(self) -> str:
        """Sizes and engine, for ``print``."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, engine={self.engine}"


class DynamicCell(IntegerLayer):
    """``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell`` with int8 weights and dynamic activations.

    Its two linear maps run as `DynamicLinear`, because upstream's kernels for whole cells use only 7 bits of the
    activations.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        input_size: Size of an input.
        hidden_size: Size of a state.
        bias: Whether there are biases.
        engine: The quantized engine.
    """

    op = "quantized::linear_dynamic"

    def __init__(self, cell: str, input_size: int, hidden_size: int, bias: bool = True, engine: str = "onednn") -> None:
        super().__init__()
        rows = GATES[cell] * hidden_size
        self.cell, self.input_size, self.hidden_size = cell, input_size, hidden_size
        self.bias, self.engine = bias, engine
        self.ih = DynamicLinear(input_size, rows, bias, engine)
        self.hh = DynamicLinear(hidden_size, rows, bias, engine)

    @classmethod
    def of(
        cls, cell: nn.RNNCellBase, grid: WeightGrid, engine: str, shares: Mapping[str, Tensor] | None = None
    ) -> DynamicCell:
        """Quantize the weights of a cell; ``shares`` are passed to `quantize_rows`, by the names of the weights."""
        made = cls(name_of_cell(cell), cell.input_size, cell.hidden_size, cell.bias, engine)
        for name in ("ih", "hh"):
            bias = getattr(cell, f"bias_{name}") if cell.bias else None
            weight, share = getattr(cell, f"weight_{name}"), (shares or {}).get(f"weight_{name}")
            setattr(made, name, DynamicLinear.of(weight, bias, grid, engine, share))
        return made

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Same as the float cell: ``(batch, input_size)`` or ``(input_size,)``, and the state."""
        return step_of_cell(self.cell, self.hidden_size, input, hx, (self.ih, self.hh))

    def reference(self, input: Tensor, hx: Any = None) -> Any:
        """The same computation in float64."""
        return step_of_cell(self.cell, self.hidden_size, input, hx, (self.ih.reference, self.hh.reference))


def name_of_cell(cell: nn.RNNCellBase) -> str:
    """A key of `GATES`."""
    return {nn.LSTMCell: "lstm", nn.GRUCell: "gru"}.get(type(cell)) or f"rnn_{cell.nonlinearity}"


def step_of_cell(cell: str, hidden_size: int, input: Tensor, hx: Any, linear: tuple[Any, Any]) -> Any:
    """One step of a cell, with the given linear maps.

    Args:
        cell: A key of `GATES`.
        hidden_size: Size of a state.
        input: ``(batch, input_size)`` or ``(input_size,)``.
        hx: The state, as the float cell takes it; None for zeros.
        linear: The linear maps of the input and of the state.
    """
    unbatched = input.dim() == 1
    batch = input[None] if unbatched else input
    if hx is None:
        zeros = batch.new_zeros(batch.shape[0], hidden_size)
        state: tuple[Tensor, ...] = (zeros, zeros)
    else:
        parts = tuple(hx) if cell == "lstm" else (hx,)
        state = tuple(part[None] for part in parts) if unbatched else parts
    result = STEPS[cell](linear[0](batch), linear[1](state[0]), state)
    result = tuple(part[0] for part in result) if unbatched else result
    return result if cell == "lstm" else result[0]


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Number of weight rows per unit of the state."""


def _lstm_step(ih: Tensor, hh: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (ih + hh).chunk(4, -1)
    c = f.sigmoid() * state[1].to(ih.dtype) + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(ih: Tensor, hh: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (ir, iz, new), (hr, hz, hn) = ih.chunk(3, -1), hh.chunk(3, -1)
    n = (new + (ir + hr).sigmoid() * hn).tanh()
    return (n + (iz + hz).sigmoid() * (state[0].to(ih.dtype) - n),)


STEPS: dict[str, Any] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": lambda ih, hh, state: ((ih + hh).tanh(),),
    "rnn_relu": lambda ih, hh, state: ((ih + hh).relu(),),
}
"""One step of each cell, from the outputs of its two linear maps."""
