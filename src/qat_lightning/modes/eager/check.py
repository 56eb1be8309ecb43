"""Comparing an eager int8 network with fake-quant: each layer on fake-quant's own input, and then the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.example import Example
from qat_lightning.graph.generators import generators_kept
from qat_lightning.modes.eager.int8 import Int8Layer, Int8Tensor
from qat_lightning.modes.eager.layers import ChainHead, Tap
from qat_lightning.modes.judging import (
    MARGIN_DB,
    MIDDLE,
    Grid,
    Names,
    beyond_rounding,
    bias_rounding,
    compare_integers,
    decibels,
    raise_if_faulty,
)
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.recording import same_random_numbers
from qat_lightning.modes.whole import DRAWS, ENOUGH_DB, Disturbance, check_whole, is_right, raise_if_wrong
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import quantized_engine


@torch.no_grad()
def check_layers(
    prepared: nn.Module,
    network: nn.Module,
    heads: Mapping[str, ChainHead],
    layers: Mapping[str, Int8Layer],
    example: Example,
    target: Backend,
) -> tuple[list[LayerCheck], WholeCheck | None]:
    """Compare each int8 layer with fake-quant, and then the whole network.

    Args:
        prepared: The network with fake-quant, on the CPU, in eval mode, with rounding enabled.
        network: The converted network.
        heads: The layers of ``prepared`` that became int8, by name.
        layers: The int8 layers.
        example: A real batch.
        target: The backend, for its engine and tolerance.

    Returns:
        A row for each layer that the example calls, for its worst call; and the row of the whole network.

    Raises:
        VerificationError: A layer exceeds the tolerance, or all layers are correct and the whole network is not.
    """
    state = prepared_state(prepared)
    names = Names(state.prefix, {name for name, _ in state.float_network.named_modules()})
    comparison = _Comparison(prepared, heads, example, target)
    for layer in layers.values():
        comparison.compare(layer)
    raise_if_faulty(comparison.checks, target, names)
    actual, int8 = _run_int8(network, layers, example, target)
    ways = (comparison.disturbed, comparison.replayed) if comparison.errors else (comparison.disturbed,)
    whole = check_whole(comparison.expected, actual, ways)
    if whole is not None and not is_right(whole):
        suspects = [name for name in [comparison.where_it_begins(int8)] if name]
        raise_if_wrong(whole, suspects, comparison.checks, names)
    return comparison.checks, whole


@torch.no_grad()
def run(network: nn.Module, example: Example, disturb: Callable[[Any], Any] = lambda value: value) -> Any:
    """Run in float32 on copies of the inputs and buffers, which a forward may change in place."""
    args, kwargs = tree_map(lambda value: disturb(_float_copy(value)), (example.args, example.kwargs))
    with same_random_numbers(), generators_kept(network, seed=0), buffers_copied(network):
        return network(*args, **kwargs)


def _float_copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().float() if value.is_floating_point() else value.detach().clone()


class _Comparison:
    """Fake-quant's run on the example, and the results of the int8 layers on its inputs."""

    def __init__(self, prepared: nn.Module, heads: Mapping[str, ChainHead], example: Example, target: Backend) -> None:
        self.prepared, self.heads, self.example, self.target = prepared, heads, example, target
        self.checks: list[LayerCheck] = []
        self.errors: dict[FakeQuantize, list[Tensor]] = {}
        """Difference between the kernel's and fake-quant's output, for each FakeQuantize and call."""
        self.draws: list[dict[str, list[Tap]]] = []
        self.expected, self.taps = self._recorded(run, prepared, example)

    def _recorded(self, function: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, list[Tap]]]:
        for head in self.heads.values():
            head.taps = []
        try:
            result = function(*args)
            taps = {name: head.taps or [] for name, head in self.heads.items()}
            return result, {name: [tap for tap in calls if tap.output is not None] for name, calls in taps.items()}
        finally:
            for head in self.heads.values():
                head.taps = None

    def compare(self, layer: Int8Layer) -> None:
        """Compare all calls of a layer."""
        name = layer.chain.name
        rows = [self._compare_call(layer, self.heads[name], tap) for tap in self.taps[name]]
        if rows:
            self.checks.append(min(rows, key=lambda row: (not row.fault, row.sqnr_db)))

    def _compare_call(self, layer: Int8Layer, head: ChainHead, tap: Tap) -> LayerCheck:
        op = f"{type(layer.op).__module__}.{type(layer.op).__name__} ({self.target.engine})"
        if not tap.grid.seen:
            fault = "no range of its input is known: no training step called it with an input from there"
            return LayerCheck(layer.chain.name, op, -torch.inf, torch.nan, fault)
        scale, zero_point = tap.grid.calculate_qparams()
        quantized = torch.quantize_per_tensor(tap.input.float(), float(scale), int(zero_point), layer.activation_dtype)
        if tap.source is not None and (fault := self._input_fault(head, tap, quantized)):
            return LayerCheck(layer.chain.name, op, -torch.inf, torch.nan, fault)
        assert tap.output is not None
        assert tap.exact is not None
        got = layer.run(quantized, tap.number)
        wanted = torch.quantize_per_tensor(tap.output.float(), got.q_scale(), got.q_zero_point(), got.dtype)
        bias = bias_rounding(layer.op, quantized.q_scale(), got.q_scale(), self.target)
        doubt = lambda: bias + self._doubt(head, tap) / got.q_scale()  # noqa: E731
        check = compare_integers(layer.chain.name, op, tap.exact, wanted, got, allowed=doubt)
        if got.shape == wanted.shape:
            difference = got.dequantize() - wanted.dequantize()
            self.errors.setdefault(head.grids[tap.number].output_fake_quant, []).append(difference)
        return check

    def _input_fault(self, head: ChainHead, tap: Tap, wanted: Tensor) -> str:
        """Describe the fault in the integers that a float input is rounded to; empty if there is none."""
        assert tap.source is not None
        grid = Grid(wanted.q_scale(), wanted.q_zero_point())
        got = torch.quantize_per_tensor(tap.source.float(), grid.scale, grid.zero_point, wanted.dtype)
        difference = got.dequantize() - wanted.dequantize()
        self.errors.setdefault(head.grids[tap.number].input_fake_quant, []).append(difference)
        beyond = beyond_rounding(tap.source, wanted.int_repr().int(), got.int_repr().int(), grid)
        return f"its input is rounded {beyond:.1f} steps beyond the nearest one" if beyond > MIDDLE else ""

    def _doubt(self, head: ChainHead, tap: Tap) -> float:
        """Error of fake-quant's own float arithmetic, for example from cancellation of large numbers."""
        off = 0.0
        assert tap.exact is not None
        for draw in range(DRAWS):
            y = head._apply_layer(Disturbance(draw)(tap.input), head._rounded_weight())
            for link in head.links:
                y = link(y)
            off = max(off, float((y - tap.exact).abs().max()))
        return 2 * off

    def disturbed(self, disturb: Disturbance) -> Any:
        """Fake-quant's result with its inputs, and the tensors that are rounded, disturbed by a millionth."""
        with ExitStack() as hooks:
            for module in self.prepared.modules():
                if isinstance(module, FakeQuantize) and module.observed:
                    handle = module.register_forward_pre_hook(lambda _, args: (disturb(args[0]), *args[1:]))
                    hooks.callback(handle.remove)
            return self._again(disturb)

    def replayed(self, disturb: Disturbance) -> Any:
        """Fake-quant's result with its inputs disturbed by a millionth, and with the rounding of the kernels."""
        with ExitStack() as hooks:
            for fq, errors in self.errors.items():
                left = iter(errors)
                hooks.callback(fq.register_forward_hook(lambda _, __, y, left=left: _plus(y, next(left, None))).remove)
            return self._again(disturb)

    def _again(self, disturb: Disturbance) -> Any:
        result, taps = self._recorded(run, self.prepared, self.example, disturb)
        self.draws.append(taps)
        return result

    def where_it_begins(self, int8: list[tuple[str, Tensor]]) -> str:
        """The first layer, in execution order, that is farther from fake-quant than the draws are."""
        calls = dict.fromkeys(self.heads, 0)
        for name, got in int8:
            index = calls[name]
            calls[name] += 1
            wanted, *draws = (_output(taps[name], index) for taps in (self.taps, *self.draws))
            if wanted is None:
                continue
            least = min((decibels(wanted, draw) for draw in draws if draw is not None), default=ENOUGH_DB)
            if decibels(wanted, got) < min(ENOUGH_DB, least - MARGIN_DB):
                return name
        return ""


def _output(taps: list[Tap], call: int) -> Tensor | None:
    return taps[call].output if call < len(taps) else None


def _plain(y: Tensor) -> Tensor:
    return y.quantized.dequantize() if isinstance(y, Int8Tensor) else y


def _plus(y: Tensor, error: Tensor | None) -> Tensor:
    return y if error is None or error.shape != y.shape else y + error


def _run_int8(
    network: nn.Module, layers: Mapping[str, Int8Layer], example: Example, target: Backend
) -> tuple[Any, list[tuple[str, Tensor]]]:
    """The result of the int8 network, and the outputs of its layers in order."""
    calls: list[tuple[str, Tensor]] = []
    with _watching(layers, calls), quantized_engine(target.engine):
        return run(network, example), calls


@contextmanager
def _watching(layers: Mapping[str, Int8Layer], calls: list[tuple[str, Tensor]]) -> Iterator[None]:
    with ExitStack() as hooks:
        for layer in layers.values():
            name = layer.chain.name
            handle = layer.register_forward_hook(lambda _, __, y, name=name: calls.append((name, _plain(y))))
            hooks.callback(handle.remove)
        yield
