"""Encoding the network of each mode: a graph for fx and pt2e, a plan and tensors for eager, both for parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from qat_lightning.artifact.calls import (
    decode_inference,
    decode_sizes,
    decode_spec,
    encode_inference,
    encode_sizes,
    encode_spec,
)
from qat_lightning.artifact.graph import decode_graph, encode_graph
from qat_lightning.artifact.progress import Reading, Writing
from qat_lightning.artifact.values import decode, encode
from qat_lightning.errors import ArtifactError, CheckpointMismatchError
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe


def encode_network(network: nn.Module, mode: str, writing: Writing) -> dict[str, Any]:
    """Encode the int8 network of a mode as plain data.

    Raises:
        ArtifactError: It contains something that no file can store.
    """
    return _CODECS[mode][0](network, writing)


def decode_network(data: dict[str, Any], recipe: Recipe, reading: Reading) -> nn.Module:
    """Inverse of `encode_network`, within the engine for which weights are to be packed.

    Raises:
        ArtifactError: The data is damaged, or needs more than ``reading`` provides.
    """
    return _CODECS[recipe.mode][1](data, recipe, reading)


def _encode_fx(network: nn.Module, writing: Writing) -> dict[str, Any]:
    assert isinstance(network, GraphNetwork)
    data = encode_graph(network, network.graph, writing) | encode_inference(network.inference_call, writing)
    return data if network.sizes is None else data | {"sizes": encode_sizes(network.sizes)}


def _decode_fx(data: dict[str, Any], recipe: Recipe, reading: Reading) -> nn.Module:
    network = decode_graph(data, reading)
    if "sizes" in data:
        network.give_sizes(decode_sizes(data["sizes"]), None)
    network.inference_call = decode_inference(data, network.graph, reading)
    return network


def _encode_pt2e(network: Any, writing: Writing) -> dict[str, Any]:
    graph = encode_graph(network.decomposed, network.decomposed.graph, writing)
    return {"graph": graph} | encode_spec(network.spec) | encode_inference(network.inference_call, writing)


def _decode_pt2e(data: dict[str, Any], recipe: Recipe, reading: Reading) -> nn.Module:
    # Imported here, so that each mode is imported only if used.
    from torch.fx import GraphModule

    from qat_lightning.modes.decomposed.int8 import Int8Network

    spec = decode_spec(data, reading)
    rebuilt = decode_graph(data["graph"], reading)
    decomposed = GraphModule(rebuilt, rebuilt.graph).eval()
    call = decode_inference(data, rebuilt.graph, reading)
    return Int8Network(decomposed, spec, recipe.backend, recipe.runtime, call)


def _encode_eager(network: nn.Module, writing: Writing) -> dict[str, Any]:
    writing.needs_network[""] = type(network).__name__
    try:
        state = network.state_dict()
    except RuntimeError as error:
        # QNNPACK packs 3-d convolutions, but does not return their weights.
        raise ArtifactError(f"its packed weights cannot be read ({error}): keep Conv3d float with exclude=") from error
    buffers = {name: buffer for name, buffer in network.named_buffers() if name not in state}
    plan = {"class": type(network).__name__, "plan": encode(network.quantization_plan)}
    return plan | _encode_state(state, buffers, writing)


def _encode_state(state: Mapping[str, Any], buffers: Mapping[str, Tensor], writing: Writing) -> dict[str, Any]:
    """The tensors of a network whose code is not in the file."""
    try:
        return {
            "state": [[name, encode(value, writing.tensors.encode)] for name, value in state.items()],
            "buffers": [[name, encode(value, writing.tensors.encode)] for name, value in buffers.items()],
        }
    except ArtifactError as error:
        raise ArtifactError(f"its state_dict {error}") from error


def _given(reading: Reading, cls: str, mode: str, what: str) -> nn.Module:
    """A copy of the float network that was passed, because its code is not in the file."""
    if reading.network is None:
        raise ArtifactError(
            f"mode={mode!r} keeps your Python code{what}, which no file can hold: give the float network, a {cls} as "
            "its code makes it, trained or not, as load_quantized(path, network=...)"
        )
    return copy.deepcopy(reading.network).cpu().float()


def _decode_eager(data: dict[str, Any], recipe: Recipe, reading: Reading) -> nn.Module:
    from qat_lightning.modes.eager.mode import EagerMode
    from qat_lightning.modes.uncalibrated.eager import skeleton

    kind = str(data["class"])
    float_network = _given(reading, kind, "eager", "")
    given = type(float_network).__name__
    make = skeleton if recipe.kind in DIRECT else EagerMode().skeleton
    try:
        network = make(float_network, decode(data["plan"]), recipe)
    except CheckpointMismatchError as error:
        raise ArtifactError(
            f"it was saved from a {kind}, and the network given does not match it. {str(error).removesuffix('.')}"
        ) from error
    saved: Mapping[str, Any] = {name: decode(value, reading.tensors.decode) for name, value in data["state"]}
    # The network's own dictionary: its versions describe the layout of packed weights.
    state = network.state_dict()
    if state.keys() != saved.keys():
        different = ", ".join(sorted(state.keys() ^ saved.keys())[:8])
        raise ArtifactError(f"it was saved from a {kind} that has other tensors than the {given} given: {different}")
    state.update(saved)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ArtifactError(f"it was saved from a {kind} of another shape than the {given} given: {error}") from error
    _load_buffers(network, data["buffers"], reading)
    return network


def _load_buffers(network: nn.Module, saved: Any, reading: Reading) -> None:
    """Load the buffers that are not in a ``state_dict``."""
    buffers = dict(network.named_buffers())
    for name, value in saved:
        tensor = decode(value, reading.tensors.decode)
        if name in buffers and isinstance(tensor, Tensor):
            buffers[name].data = tensor


def _encode_parts(network: nn.Module, writing: Writing) -> dict[str, Any]:
    """Encode the graph of each part, and the tensors of the rest, whose code is the network's own."""
    from qat_lightning.modes.parts.int8 import rest_of

    known = network.__dict__["quantization_parts"]
    state, buffers = rest_of(network)
    parts = []
    for name in known["names"]:
        inside = Writing(writing.tensors, needs_trust=writing.needs_trust)
        parts.append([name, _encode_fx(network.get_submodule(name), inside)])
        writing.needs_network |= {f"{name}.{inner}": kind for inner, kind in inside.needs_network.items()}
    writing.needs_network[""] = type(network).__name__
    forms = list(map(list, known["forms"].items()))
    plan = {"class": type(network).__name__, "parts": parts, "forms": forms}
    plan["attributes"] = encode(known["attributes"])
    return plan | _encode_state(state, buffers, writing)


def _decode_parts(data: dict[str, Any], recipe: Recipe, reading: Reading) -> nn.Module:
    from qat_lightning.modes.parts.int8 import forms_of, with_parts
    from qat_lightning.modes.plain_attributes import take_attributes

    kind = str(data["class"])
    network = _given(reading, kind, "parts", " around the parts")
    _check_forms(forms_of(network), {str(key): shape for key, shape in data["forms"]}, kind, type(network).__name__)
    parts = {}
    for name, graph in data["parts"]:
        inside = Reading(reading.tensors, network.get_submodule(str(name)), reading.trusted)
        parts[str(name)] = _decode_fx(graph, recipe, inside)
    rest = {str(key): decode(value, reading.tensors.decode) for key, value in data["state"]}
    attributes = decode(data["attributes"]) if "attributes" in data else {}
    try:
        take_attributes(network, attributes)
    except CheckpointMismatchError as error:
        raise ArtifactError(str(error)) from error
    network = with_parts(network, parts, rest, attributes)
    _load_buffers(network, data["buffers"], reading)
    return network


def _check_forms(own: Mapping[str, list[int]], forms: Mapping[str, list[int]], kind: str, given: str) -> None:
    """Raise an error for a network with other tensors than the quantized one had, even where graphs replace them."""
    if own.keys() != forms.keys():
        different = ", ".join(sorted(own.keys() ^ forms.keys())[:8])
        raise ArtifactError(f"it was saved from a {kind} that has other tensors than the {given} given: {different}")
    wrong = [f"{key}: {forms[key]} there, {own[key]} here" for key in own if own[key] != forms[key]]
    if wrong:
        raise ArtifactError(f"it was saved from a {kind} of another shape than the {given} given: {wrong[0]}")


_CODECS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., nn.Module]]] = {
    "eager": (_encode_eager, _decode_eager),
    "fx": (_encode_fx, _decode_fx),
    "parts": (_encode_parts, _decode_parts),
    "pt2e": (_encode_pt2e, _decode_pt2e),
}
"""The functions that encode and decode the int8 network of each mode."""
