"""What the modes share at the end: running both networks on the example, and comparing each layer on its own input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qat_lightning.backends import Backend, quantized_engine
from qat_lightning.errors import ConversionError, NetworkError
from qat_lightning.flows.base import Example, LayerCheck, LayerCoverage, sqnr_db
from qat_lightning.flows.verify import raise_if_faulty
from qat_lightning.integer_layers import IntegerLayer
from qat_lightning.recipe import Recipe


@dataclass
class Call:
    """One layer and its first call on the example.

    Attributes:
        name: The layer.
        layer: It.
        inputs: Positional and keyword arguments; None if it was not called.
        output: What it gave.
    """

    name: str
    layer: IntegerLayer
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    output: Any = None


def refuse_nothing(network: nn.Module, coverage: list[LayerCoverage], recipe: Recipe) -> None:
    """Raise if no layer becomes integer; the reasons are in the message."""
    if any(row.quantized for row in coverage):
        return
    why = "; ".join(f"{row.name or 'itself'}: {row.reason}" for row in coverage[:12])
    raise NetworkError(
        f"There is nothing to quantize in {type(network).__name__} with kind={recipe.kind!r} and mode={recipe.mode!r}: "
        f"{why or 'it has no layer with a weight'}. Look at include and exclude, or choose another kind= or mode=."
    )


def run_float(network: nn.Module, example: Example) -> Any:
    """The outputs of the float network.

    Raises:
        NetworkError: It does not run on the example.
    """
    try:
        return run(network, example)
    except Exception as error:
        raise NetworkError(
            f"{type(network).__name__} does not run on its example inputs: {type(error).__name__}: {error}. Give "
            "example_inputs= that its forward takes."
        ) from error


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
            "Use exclude= for the part at fault."
        ) from error
    return outputs, calls


@torch.no_grad()
def run(network: nn.Module, example: Example) -> Any:
    """Run on copies of the inputs, which a forward may change in place; random numbers go on as before."""
    args, kwargs = tree_map(_copied, (example.args, example.kwargs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network(*args, **kwargs)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as products of matrices and linear maps, and not as the one op that evaluation has for it."""
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
            handles.append(call.layer.register_forward_hook(keep(call), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_layers(calls: list[Call], target: Backend) -> tuple[list[LayerCheck], list[str]]:
    """Compare the first call of each layer with its reference.

    Returns:
        One row for each layer that was called, and notes on the others.

    Raises:
        VerificationError: A layer is past the tolerance of ``target``.
    """
    checks, unchecked = [], []
    with quantized_engine(target.engine):
        for call in calls:
            wanted = None if call.inputs is None else call.layer.reference(*call.inputs[0], **call.inputs[1])
            if wanted is None:
                unchecked.append(call.name or "itself")
                continue
            ratio = sqnr_of(wanted, call.output)
            checks.append(LayerCheck(call.name, call.layer.op, ratio))
    raise_if_faulty(checks, target, "its integers give in float64")
    notes = []
    if unchecked:
        notes.append(f"Not compared, because the example does not run them with tensors: {', '.join(unchecked)}.")
    return checks, notes


def sqnr_of(wanted: Any, got: Any) -> float:
    """The SQNR in dB of the first floating tensors of two outputs."""
    one, other = _floats(wanted)[0], _floats(got)[0]
    if not one.numel():
        return math.inf
    return sqnr_db(one.double(), other.double())


def end_to_end(expected: Any, actual: Any) -> list[str]:
    """How far the integer network is from the float one; no promise, since rounding is what the kind costs."""
    pairs = list(zip(_floats(expected), _floats(actual), strict=False))
    if any(one.shape != other.shape for one, other in pairs):
        return ["On the example, the integer network takes another branch than the float one."]
    worst = min((sqnr_db(one, other) for one, other in pairs if one.numel()), default=math.inf)
    return [f"On the example, the integer network as a whole is {worst:.1f} dB from the float one."]


def _floats(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
