"""Int8 networks of eager and fx on plain tensors: without packed weights and without dtypes that torch deprecates."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError, ExportError, in_brief
from qat_lightning.export.comparison import Comparison, problem
from qat_lightning.export.plain_ops import in_plain_ops, of_two
from qat_lightning.graph.example import Example, call_apart
from qat_lightning.graph.inference_call import InferenceCall, inference_call_between, inference_example
from qat_lightning.graph.signature import CallSpec
from qat_lightning.modes.protocol import Converted
from qat_lightning.settings.kinds import DIRECT

_BACKEND = "x86"
_LEAST_DB = 30.0
_LEAST_EQUAL = 0.98


def to_plain_tensors(network: QuantizedNetwork, example: Example | None = None) -> QuantizedNetwork:
    """Convert an int8 network to one that uses plain integer tensors instead of torch's packed kernels.

    Integers, scales and zero points are those of ``network``. The result has mode ``pt2e``: AOTInductor compiles it at
    its first call; without a C++ compiler it runs with oneDNN's int8 kernels for plain uint8 and int8 tensors. With
    ``runtime="plain"``, an argument of the callbacks and of `Recipe`, networks are converted like this and never
    compiled. Neither the network nor its file needs ``quint8``, ``qint8`` or ``qint32``, which torch deprecates since
    2.13. The file contains the graph, so eager networks load without their code.

    Args:
        network: Static ranges, mode ``eager`` or ``fx``; not changed. A network of mode ``pt2e`` is returned as it is.
        example: A real call; by default the one that ``network`` was verified with.

    Raises:
        ConfigurationError: The kind or mode of the network is not supported.
        ExportError: A kernel has no equivalent, or the result computes different values.
        TraceError: The network cannot be captured as a graph, for example with ``mode="eager"``.

    Example:
        >>> from qat_lightning import Recipe, calibrate, convert, prepare
        >>> call = Example((torch.randn(8, 4),))
        >>> prepared = prepare(torch.nn.Sequential(torch.nn.Linear(4, 2)), call, Recipe("fx", "x86", kind="static"))
        >>> _ = calibrate(prepared, [call.args[0]])
        >>> to_plain_tensors(convert(prepared, call)).recipe.mode
        'pt2e'
    """
    recipe = network.recipe
    if recipe.mode == "pt2e":
        return network
    if recipe.mode not in ("eager", "fx") or recipe.kind in DIRECT:
        raise ConfigurationError(
            f"to_plain_tensors takes static networks of mode 'eager' or 'fx', and this one is of mode {recipe.mode!r} "
            f"and kind {recipe.kind!r}: use one of these two, or mode='pt2e', which does not need this step."
        )
    return _of_mode_pt2e(network, Example(*of_two(network.example if example is None else example)))


def in_its_runtime(network: QuantizedNetwork) -> QuantizedNetwork:
    """An int8 network as its recipe's ``runtime`` wants it: itself, or with ``"plain"`` its form on plain tensors.

    Args:
        network: As its mode converted it; it stays as it is.

    Raises:
        ExportError: A kernel has no counterpart, or the result computes different values.
        TraceError: The network cannot be captured as a graph, for example with ``mode="eager"``.
    """
    if network.recipe.runtime != "plain" or network.recipe.mode == "pt2e":
        return network
    return _of_mode_pt2e(network, Example(*of_two(network.example)))


@torch.no_grad()
def _of_mode_pt2e(network: QuantizedNetwork, call: Example) -> QuantizedNetwork:
    # Imported here, so that other runtimes do not pay for it.
    from qat_lightning.modes.decomposed.int8 import Int8Network
    from qat_lightning.modes.pt2e.capture import capture

    recipe = network.recipe

    def captured(network: QuantizedNetwork, call: Example) -> tuple[fx.GraphModule, CallSpec]:
        return capture(in_plain_ops(network, call), call, train=False)

    graph, spec = captured(network, call)
    at_inference: InferenceCall | None = getattr(network.network, "inference_call", None)
    if at_inference is not None:
        lean, lean_spec = captured(network.at_inference(), inference_example(at_inference, call))
        at_inference = inference_call_between(
            graph.graph, lean.graph, lean_spec, at_inference.without, at_inference.parameters
        )
    made = dataclasses.replace(recipe, mode="pt2e", backend=_BACKEND)
    converted = Converted(
        Int8Network(graph, spec, _BACKEND, recipe.runtime, at_inference),
        list(network.coverage),
        list(network.checks),
        [*network.notes, f"on plain tensors, from mode {recipe.mode!r} and backend {recipe.backend!r}"],
        list(network.operations),
        network.whole,
    )
    plain = QuantizedNetwork(converted, made, call, source=network.source)
    found, expected = Comparison(), call_apart(network, call)
    try:
        actual = call_apart(plain, call)
    except Exception as error:  # kernels may raise anything
        raise ExportError(f"On plain tensors the network cannot run: {in_brief(error)}.") from error
    found.update(expected, actual)
    wrong = problem(found, network, [call], min_sqnr_db=_LEAST_DB, min_equal=_LEAST_EQUAL)
    if wrong:
        raise ExportError(f"On plain tensors the network computes different values: {wrong}.")
    return plain
