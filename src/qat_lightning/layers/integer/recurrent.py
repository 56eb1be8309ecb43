"""LSTM and GRU with int8 weights and dynamic activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from qat_lightning.layers.integer.dynamic import GATES, STEPS, DynamicLinear
from qat_lightning.layers.integer.integer_layer import IntegerLayer
from qat_lightning.layers.integer.weights import WeightGrid
from qat_lightning.settings.engines import packing_engine


class DynamicRecurrent(IntegerLayer):
    """``nn.LSTM`` or ``nn.GRU`` with int8 weights and dynamic activations; for inference, so without dropout.

    Args:
        cell: ``"lstm"`` or ``"gru"``.
        input_size: Size of an input.
        hidden_size: Size of a state.
        num_layers: Number of stacked layers.
        bias: Whether there are biases.
        batch_first: Whether the batch is the first dimension of inputs and outputs.
        bidirectional: Whether each layer also runs in the other direction.
        engine: The quantized engine.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        engine: str = "onednn",
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"{num_layers} is not a number of layers")
        self.cell, self.input_size, self.hidden_size, self.num_layers = cell, input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional, self.engine = bias, batch_first, bidirectional, engine
        rows = GATES[cell] * hidden_size
        for layer in range(num_layers):
            for end in self._directions:
                size = input_size if layer == 0 else hidden_size * len(self._directions)
                self.add_module(f"ih_l{layer}{end}", DynamicLinear(size, rows, True, engine))
                self.add_module(f"hh_l{layer}{end}", DynamicLinear(hidden_size, rows, True, engine))

    @classmethod
    def of(cls, layer: nn.RNNBase, grid: WeightGrid, engine: str) -> DynamicRecurrent:
        """Quantize the weights of a layer."""
        made = cls(
            "lstm" if isinstance(layer, nn.LSTM) else "gru",
            layer.input_size,
            layer.hidden_size,
            layer.num_layers,
            layer.bias,
            layer.batch_first,
            layer.bidirectional,
            engine,
        )
        for name, _ in list(made.named_children()):
            weight = getattr(layer, f"weight_{name}")
            bias = getattr(layer, f"bias_{name}") if layer.bias else weight.new_zeros(weight.shape[0])
            made.add_module(name, DynamicLinear.of(weight, bias, grid, engine))
        return made

    @property
    def op(self) -> str:  # type: ignore[override]
        """The kernel that runs."""
        return f"aten::quantized_{self.cell}"

    @property
    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def _cells(self) -> list[tuple[DynamicLinear, DynamicLinear]]:
        names = [f"l{layer}{end}" for layer in range(self.num_layers) for end in self._directions]
        return [(self.get_submodule(f"ih_{name}"), self.get_submodule(f"hh_{name}")) for name in names]  # type: ignore[misc]

    def _parameters_of_kernel(self) -> list[Any]:
        if self.__dict__["_packed"] is None:
            self.__dict__["_packed"] = [
                torch.ops.quantized.make_quantized_cell_params_dynamic(
                    ih.packed(), hh.packed(), ih.bias, hh.bias, False
                )
                for ih, hh in self._cells()
            ]
        return list(self.__dict__["_packed"])

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Same as the float layer: a tensor, batched or not, or a `PackedSequence`, and the state."""
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() == 2:
            axis = 0 if self.batch_first else 1
            outer = None if hx is None else self._map(hx, lambda h: h[:, None])
            output, state = self.forward(input.unsqueeze(axis), outer)
            return output.squeeze(axis), self._map(state, lambda h: h[:, 0])
        batch = input.shape[0 if self.batch_first else 1]
        result = self._run(input.float().contiguous(), self._initial(input, batch, hx), batch_sizes=None)
        return result[0], (result[1], result[2]) if self.cell == "lstm" else result[1]

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> Any:
        state = self._initial(packed.data, int(packed.batch_sizes[0]), hx)
        if hx is not None and packed.sorted_indices is not None:
            state = [h.index_select(1, packed.sorted_indices) for h in state]
        result = self._run(packed.data.float().contiguous(), state, packed.batch_sizes)
        ends = result[1:]
        if packed.unsorted_indices is not None:
            ends = tuple(h.index_select(1, packed.unsorted_indices) for h in ends)
        output = PackedSequence(result[0], packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return output, (ends[0], ends[1]) if self.cell == "lstm" else ends[0]

    def _run(self, data: Tensor, state: list[Tensor], batch_sizes: Tensor | None) -> Any:
        with packing_engine(self.engine):
            weights = self._parameters_of_kernel()
            settings: list[Any] = [weights, True, self.num_layers, 0.0, False, self.bidirectional]
            inputs: list[Any] = [data] if batch_sizes is None else [data, batch_sizes]
            if batch_sizes is None:
                settings.append(self.batch_first)
            if self.cell == "lstm":
                return torch.quantized_lstm(*inputs, state, *settings, dtype=torch.qint8, use_dynamic=True)
            return torch.quantized_gru(*inputs, state[0], *settings)

    def _initial(self, data: Tensor, batch: int, hx: Any) -> list[Tensor]:
        if hx is not None:
            return [h.float().contiguous() for h in (hx if self.cell == "lstm" else (hx,))]
        shape = (self.num_layers * len(self._directions), batch, self.hidden_size)
        return [torch.zeros(shape) for _ in range(2 if self.cell == "lstm" else 1)]

    def _map(self, hx: Any, function: Any) -> Any:
        return tuple(map(function, hx)) if self.cell == "lstm" else function(hx)

    def reference(self, input: Any, hx: Any = None) -> Any:
        """The same computation in float64; None for a `PackedSequence`."""
        if isinstance(input, PackedSequence):
            return None
        time_first = input if input.dim() == 3 else input.unsqueeze(0 if self.batch_first else 1)
        time_first = time_first.transpose(0, 1) if self.batch_first else time_first
        state = self._initial(time_first, time_first.shape[1], hx)
        state = [h if h.dim() == 3 else h[:, None] for h in state]
        outputs, cells = time_first, self._cells()
        ends: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            sides = []
            for side in range(len(self._directions)):
                index = layer * len(self._directions) + side
                start = tuple(h[index] for h in state)
                steps, end = self._one_way(outputs, *cells[index], start, backwards=side == 1)
                sides.append(steps)
                ends.append(end)
            outputs = torch.cat(sides, -1)
        outputs = outputs.transpose(0, 1) if self.batch_first else outputs
        last = tuple(torch.stack(part) for part in zip(*ends, strict=True))
        if input.dim() == 2:
            outputs, last = outputs.squeeze(0 if self.batch_first else 1), tuple(h[:, 0] for h in last)
        return outputs, last if self.cell == "lstm" else last[0]

    def _one_way(
        self, data: Tensor, ih: DynamicLinear, hh: DynamicLinear, state: tuple[Tensor, ...], *, backwards: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        steps = ih.reference(data.float())
        outputs = []
        for step in reversed(steps) if backwards else steps:
            state = STEPS[self.cell](step, hh.reference(state[0].float()), state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def extra_repr(self) -> str:
        """Sizes and engine, for ``print``."""
        return f"{self.cell}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, engine={self.engine}"
