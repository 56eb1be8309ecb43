"""Verification for kinds without calibration: each integer layer on its own input, and the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.checks import LayerCheck, WholeCheck
from qat_lightning.errors import ConversionError, NetworkError
from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.example import Example, running_its_example
from qat_lightning.graph.generators import generators_kept
from qat_lightning.layers.integer import IntegerLayer
from qat_lightning.modes.judging import Names, decibels, raise_if_faulty
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.recording import same_random_numbers
from qat_lightning.modes.whole import DRAWS, Disturbance, check_whole, is_right, raise_if_wrong
from qat_lightning.numerics.dynamic_fake_quantize import disturbed_roundings
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import Backend
from qat_lightning.settings.engines import quantized_engine
from qat_lightning.settings.recipe import Recipe

EXACT = "its integers give in float64"
"""The reference of layers, for messages."""


@dataclass
class Call:
    """One layer and its first call on the example.

    Attributes:
        name: The layer.
        layer: The layer.
        inputs: Positional and keyword arguments; None if it was not called.
        output: Its output.
    """

    name: str
    layer: IntegerLayer
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    output: Any = None


def refuse_nothing(network: nn.Module, coverage: list[LayerCoverage], recipe: Recipe) -> None:
    """Raise an error with the reasons if no layer becomes integer."""
    if any(row.quantized for row in coverage):
        return
    why = "; ".join(f"{row.name or 'itself'}: {row.reason}" for row in coverage[:12])
    raise NetworkError(
        f"There is nothing to quantize in {type(network).__name__} with kind={recipe.kind!r} and "
        f"mode={recipe.mode!r}: {why or 'it has no layer with a weight'}. Check include and exclude, or choose "
        "another kind= or mode=."
    )


def run_float(network: nn.Module, example: Example) -> Any:
    """The outputs of the float network.

    Raises:
        NetworkError: It does not run on the example.
    """
    with running_its_example(network):
        return run(network, example)


def run_integer(network: nn.Module, example: Example) -> tuple[Any, list[Call]]:
    """The outputs of the integer network, and the first call of each of its layers.

    Raises:
        ConversionError: It does not run.
    """
    calls = _outermost(network)
    try:
        with _recording(calls):
            outputs = run(network, example)
    except Exception as error:
        raise ConversionError(
            f"{type(network).__name__} does not run once its layers hold integers: {type(error).__name__}: {error}. "
            "Use exclude= for the part that fails."
        ) from error
    return outputs, calls


@torch.no_grad()
def run(network: nn.Module, example: Example) -> Any:
    """Run on copies of the inputs and buffers, which a forward may change in place; the random state is unchanged."""
    args, kwargs = inputs_of(example)
    with same_random_numbers(), generators_kept(network, seed=0), buffers_copied(network):
        return network(*args, **kwargs)


def inputs_of(example: Example) -> tuple[Any, Any]:
    """Copies of the inputs of a call, on the CPU and in float32."""
    copied: tuple[Any, Any] = tree_map(_copied, (example.args, example.kwargs))
    return copied


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within the block, attention runs as matrix products and linear maps, not as the fused op of evaluation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu().clone()
    return value.float() if value.is_floating_point() else value


def _outermost(network: nn.Module) -> list[Call]:
    calls: list[Call] = []
    for name, module in network.named_modules():
        if isinstance(module, IntegerLayer) and not any(
            not call.name or name.startswith(f"{call.name}.") for call in calls
        ):
            calls.append(Call(name, module))
    return calls


@contextmanager
def _recording(calls: list[Call]) -> Iterator[None]:
    handles = []

    def keep(call: Call) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if call.inputs is None:
                call.inputs, call.output = tree_map(_copied, (args, kwargs)), tree_map(_copied, output)

        return hook

    try:
        for call in calls:
            # Before the user's own hooks, which may change the output.
            handles.append(call.layer.register_forward_hook(keep(call), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_layers(calls: list[Call], target: Backend, names: Names) -> tuple[list[LayerCheck], list[str]]:
    """Compare the first call of each layer with its reference.

    Args:
        calls: Calls of the layers.
        target: The backend.
        names: Names of the layers.

    Returns:
        One row for each layer that was called, and notes about the others.

    Raises:
        VerificationError: A layer exceeds the tolerance of ``target``, and is farther from its reference than the
            reference is from itself under disturbances: many time steps can amplify small differences.
    """
    checks, unchecked = [], []
    with quantized_engine(target.engine):
        for call in calls:
            wanted = None if call.inputs is None else call.layer.reference(*call.inputs[0], **call.inputs[1])
            if wanted is None:
                unchecked.append(call.name or "itself")
                continue
            ratio = sqnr_of(wanted, call.output)
            chance = _chance(call, wanted) if ratio < target.tolerance_db else math.inf
            checks.append(LayerCheck(call.name, call.layer.op, ratio, chance_db=chance))
    raise_if_faulty(checks, target, names, EXACT)
    notes = []
    if unchecked:
        notes.append(f"Not compared, because the example does not call them with tensors: {', '.join(unchecked)}.")
    return checks, notes


def _chance(call: Call, wanted: Any) -> float:
    """SQNR of a layer's reference against its own disturbed runs: the worst of a few draws."""
    assert call.inputs is not None
    draws = []
    for seed in range(DRAWS):
        disturb = Disturbance(seed)
        with disturbed_roundings(disturb):
            args, kwargs = tree_map(disturb, call.inputs)
            draws.append(sqnr_of(wanted, call.layer.reference(*args, **kwargs)))
    return min(draws)


def sqnr_of(wanted: Any, got: Any) -> float:
    """The worst SQNR in dB over the float tensors of two outputs; a reference may have only the first ones."""
    return min(
        (decibels(one, other) for one, other in zip(_floats(wanted), _floats(got), strict=False)), default=math.inf
    )


@torch.no_grad()
def check_whole_of(
    network: nn.Module, actual: Any, calls: list[Call], example: Example, checks: list[LayerCheck], names: Names
) -> WholeCheck | None:
    """Compare the whole integer network with itself when each layer computes its reference.

    Raises:
        VerificationError: The difference is larger than rounding explains.
    """

    def exact(disturb: Callable[[Any], Any] = lambda value: value) -> Any:
        args, kwargs = tree_map(disturb, (example.args, example.kwargs))
        with _computing_references(calls), disturbed_roundings(disturb):
            return run(network, Example(args, kwargs))

    whole = check_whole(exact(), actual, (exact,))
    if whole is not None and not is_right(whole):
        suspects = sorted(checks, key=lambda check: check.sqnr_db)[:1]
        raise_if_wrong(whole, [check.name for check in suspects], checks, names, EXACT)
    return whole


@contextmanager
def _computing_references(calls: list[Call]) -> Iterator[None]:
    """Within the block, layers return the results of their references, as far as these are known."""

    def replace(layer: IntegerLayer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            wanted = layer.reference(*args, **kwargs)
            if wanted is None:
                return output
            known = iter(_floats(wanted))
            return tree_map(lambda leaf: next(known, leaf).to(leaf) if _is_float(leaf) else leaf, output)

        return hook

    handles = [call.layer.register_forward_hook(replace(call.layer), prepend=True, with_kwargs=True) for call in calls]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def end_to_end(expected: Any, actual: Any) -> list[str]:
    """SQNR of the integer network against the float one; for information, since rounding is the cost of the kind."""
    pairs = list(zip(_floats(expected), _floats(actual), strict=False))
    if any(one.shape != other.shape for one, other in pairs):
        return ["On the example, the integer network takes another branch than the float one."]
    worst = min((sqnr_db(one, other) for one, other in pairs if one.numel()), default=math.inf)
    return [f"On the example, the integer network as a whole is {worst:.1f} dB from the float one."]


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if _is_float(leaf)]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
