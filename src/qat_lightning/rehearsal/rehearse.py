"""A rehearsal: all steps of a network up to its int8 file, on a copy, before training starts."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qat_lightning.artifact import artifact_bytes, quantized_from_bytes
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ArtifactError, ConversionError, NetworkError, QuantizationError, in_brief
from qat_lightning.graph.buffers import buffers_copied
from qat_lightning.graph.example import Example, in_float32
from qat_lightning.graph.generators import generators_kept, python_and_numpy_kept
from qat_lightning.graph.lazy import refuse_lazy
from qat_lightning.graph.scopes import join
from qat_lightning.graph.training_flags import plain_train
from qat_lightning.modes.compile_switch import without_compiling
from qat_lightning.modes.coverage import int8_share
from qat_lightning.modes.left_float import leaving_float
from qat_lightning.modes.precision import refuse_mixed
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.modes.recording import same_random_numbers
from qat_lightning.modes.registry import mode_for
from qat_lightning.modes.upstream_memory import memory_given_back
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.rehearsal.faults import (
    Conversion,
    convert_what_can_be,
    quantize_what_can_be,
)
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe

OnFault = Literal["leave_float", "error"]
"""What happens to a layer that cannot be int8: it stays float, or the training is refused."""

Inspect = Callable[[QuantizedNetwork, nn.Module], None]
"""Called with the rehearsed int8 network and its reference, before both are freed."""


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal.

    Attributes:
        recipe: Mode, backend, scheme and choice of layers that were rehearsed.
        left_float: Layers that cannot be int8, by name, with the reason; the rest was converted and verified.
        coverage: What became int8, and why the rest did not: layers, then the ops between them.
        int8_macs: The share of multiply-accumulates in int8, from 0 to 1; the share of layers if none were counted.
        unsaved: Why the int8 network cannot be saved; empty if it can.
        parts: The submodules that are int8, in mode parts.
    """

    recipe: Recipe
    left_float: dict[str, str] = field(default_factory=dict)
    coverage: tuple[LayerCoverage, ...] = ()
    int8_macs: float = 0.0
    unsaved: str = ""
    parts: tuple[str, ...] = ()


def rehearse(
    network: nn.Module,
    example: Example,
    recipe: Recipe,
    *,
    prefix: str = "",
    on_fault: OnFault = "leave_float",
    inspect: Inspect | None = None,
) -> Rehearsal:
    """Prepare, calibrate, convert, verify, save and load a copy of a network, and report what cannot be int8.

    Nothing is compiled: in mode pt2e the decomposed graph runs, or oneDNN's kernels where they will run in the end.
    Random states are not changed.

    Args:
        network: The float network with its initial weights; not changed.
        example: One call of it, which also calibrates the copy.
        recipe: Mode, backend, scheme, kind and choice of layers.
        prefix: The network's dotted name in the LightningModule, to which the recipe's globs are relative.
        on_fault: ``"leave_float"`` leaves faulty layers float; ``"error"`` raises an error.
        inspect: Called at the end with the int8 network and the prepared one (the float one for kinds without
            calibration).

    Returns:
        The result; the copy's memory is released.

    Raises:
        TraceError: The network cannot be captured in this mode.
        NetworkError: It cannot be prepared, or nothing of it can be int8.
        ConversionError: It cannot be converted even with layers left float; or there is a fault and
            ``on_fault="error"``.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> found = rehearse(network, Example((torch.randn(4, 3, 8, 8),)), Recipe("fx", "x86"))
        >>> found.left_float, found.int8_macs, found.unsaved
        ({}, 1.0, '')
    """
    refuse_lazy(network)
    with memory_given_back():
        return _rehearse(network, example, recipe, prefix, on_fault, inspect)


def _rehearse(
    network: nn.Module, example: Example, recipe: Recipe, prefix: str, on_fault: OnFault, inspect: Inspect | None
) -> Rehearsal:
    with nothing_moves(), without_compiling():
        refuse_mixed(network, example)
        copied, example = copy.deepcopy(network).cpu().float(), in_float32(example)
        for parameter in copied.parameters():
            parameter.grad = None
        if recipe.kind in DIRECT and not recipe.trained:
            conversion = quantize_what_can_be(copied, example, recipe, prefix=prefix)
            prepared = copied
        else:
            prepared = _prepared(copied, example, recipe, prefix)
            if recipe.simulated:
                return Rehearsal(recipe)
            calibrate(prepared, [example])
            conversion = convert_what_can_be(prepared, example)
        if conversion.left_float and on_fault == "error":
            raise _refusal(network, example, recipe, conversion, prefix)
        found = leaving_float(recipe, conversion.left_float, prefix)
        quantized = QuantizedNetwork(conversion.converted, found, example, source="a rehearsal")
        unsaved = _why_unsaved(quantized, network)
        if inspect is not None:
            inspect(quantized, prepared)
    rows = (*quantized.coverage, *quantized.operations)
    return Rehearsal(recipe, conversion.left_float, rows, share_of(rows), unsaved, conversion.converted.parts)


def share_of(rows: tuple[LayerCoverage, ...]) -> float:
    """The share of multiply-accumulates in int8; if none were counted, the share of layers."""
    share = int8_share(rows)
    if share is not None:
        return share
    layers = [row for row in rows if row.what == "layer"]
    return sum(row.quantized for row in layers) / len(layers) if layers else 0.0


def _prepared(network: nn.Module, example: Example, recipe: Recipe, prefix: str) -> nn.Module:
    try:
        with plain_train(network):
            return mode_for(recipe).prepare(network, example, recipe, prefix=prefix)
    except QuantizationError:
        raise
    except Exception as error:  # upstream may raise anything
        raise NetworkError(
            f"mode={recipe.mode!r} cannot prepare {type(network).__name__} ({in_brief(error)})."
        ) from error


def _refusal(
    network: nn.Module, example: Example, recipe: Recipe, conversion: Conversion, prefix: str
) -> QuantizationError:
    """Why ``on_fault="error"`` refuses the network, with the remedies that were tried."""
    names = [join(prefix, name) for name in conversion.left_float]
    faults = "; ".join(f"{join(prefix, name)}: {why}" for name, why in conversion.left_float.items())
    remedy = "on_fault='leave_float', which leaves this float and converts the rest"
    excluding = replace(recipe, exclude=(*recipe.exclude, *names))
    with contextlib.suppress(QuantizationError):
        rehearse(network, example, excluding, prefix=prefix, on_fault="error")
        remedy += f"; or exclude={list(excluding.exclude)}"
    return ConversionError(
        f"{len(names)} parts of {type(network).__name__} cannot be int8 with mode={recipe.mode!r} and "
        f"backend={recipe.backend!r}: {faults}. What to do (tried on this network): {remedy}."
    )


def _why_unsaved(quantized: QuantizedNetwork, float_network: nn.Module) -> str:
    """Why an int8 network cannot be saved, found by writing a file in memory and loading it again.

    Raises:
        ConversionError: It does not even run in this process.
    """
    try:
        expected = _tensors(quantized, quantized.example)
    except Exception as error:
        raise ConversionError(
            f"The int8 network of {type(float_network).__name__} cannot run in mode={quantized.recipe.mode!r}"
            f"{_runtime(quantized.recipe)}: {in_brief(error)}."
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = quantized_from_bytes(artifact_bytes(quantized), float_network, trusted=True)
        found = _tensors(loaded, quantized.example)
    except ArtifactError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - the network itself has run
        return f"{type(error).__name__}: {error}"
    same = len(expected) == len(found) and all(
        torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)) for one, other in zip(expected, found, strict=True)
    )
    return "" if same else "after loading, it computes different values"


def _runtime(recipe: Recipe) -> str:
    return "" if recipe.runtime is None else f" with runtime={recipe.runtime!r}"


def _tensors(network: nn.Module, example: Example) -> list[torch.Tensor]:
    with same_random_numbers(), generators_kept(network, seed=0), buffers_copied(network):
        result = network(*copy.deepcopy(example.args), **copy.deepcopy(example.kwargs))
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def nothing_moves() -> Iterator[None]:
    """Within the block, random states are kept and messages suppressed."""
    with (
        python_and_numpy_kept(),
        torch.random.fork_rng(),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
