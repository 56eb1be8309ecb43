"""Encoding how a network is called: its signature, the sizes it supports, and its call without inputs of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qat_lightning.artifact.graph import (
    decode_graph,
    decode_signature,
    decode_structure,
    encode_graph,
    encode_signature,
    encode_structure,
)
from qat_lightning.artifact.progress import Reading, Writing
from qat_lightning.artifact.values import decode, encode
from qat_lightning.errors import ArtifactError
from qat_lightning.graph.given_sizes import GivenInput, GivenSizes
from qat_lightning.graph.inference_call import InferenceCall, makes_none, output_leaves, place_of
from qat_lightning.graph.signature import CallSpec, Input
from qat_lightning.modes.structured_tracer import makes_container


def encode_sizes(sizes: GivenSizes) -> dict[str, Any]:
    """Encode the input sizes that a graph supports."""
    inputs = [[given.path, encode(given.shape), encode(given.value)] for given in sizes.inputs]
    return {"network": sizes.network, "names": list(sizes.names), "inputs": inputs}


def decode_sizes(data: dict[str, Any]) -> GivenSizes:
    """Inverse of `encode_sizes`."""
    inputs = [GivenInput(str(path), decode(shape), decode(value)) for path, shape, value in data["inputs"]]
    return GivenSizes(str(data["network"]), tuple(map(str, data["names"])), tuple(inputs))


def encode_spec(spec: CallSpec) -> dict[str, Any]:
    """Encode the signature of a captured network.

    Raises:
        ArtifactError: Its result has a class that a file cannot hold.
    """
    try:
        outputs = encode_structure(spec.out_spec)
    except ArtifactError as error:
        raise ArtifactError(
            f"what its forward returns {error}, whose class a file cannot hold: return a tuple or a dict"
        ) from error
    return {
        "name": spec.name,
        "signature": encode_signature(spec.signature),
        "inputs": [list(map(encode, (given.path, given.shape, given.value, given.dtype))) for given in spec.inputs],
        "in": encode_structure(spec.in_spec),
        "out": outputs,
        "batch": spec.batch,
    }


def decode_spec(data: dict[str, Any], reading: Reading) -> CallSpec:
    """Inverse of `encode_spec`.

    Raises:
        ArtifactError: The data is damaged.
    """
    spec = CallSpec(
        name=str(data["name"]),
        signature=decode_signature(data["signature"]),
        in_spec=decode_structure(data["in"], reading.network),
        inputs=tuple(_decode_input(*given) for given in data["inputs"]),
        out_spec=decode_structure(data["out"], reading.network),
        batch=int(data["batch"]),
    )
    if spec.in_spec.num_leaves != len(spec.inputs):
        raise ArtifactError("its inputs do not match its graph")
    return spec


def _decode_input(path: Any, shape: Any, value: Any, dtype: Any = None) -> Input:
    """An input; files of earlier versions do not have its dtype."""
    kind = decode(dtype)
    if kind is not None and not isinstance(kind, torch.dtype):
        raise ArtifactError(f"the dtype of its input {path} is {kind!r}")
    return Input(str(path), decode(shape), decode(value), kind)


def encode_inference(call: InferenceCall | None, writing: Writing) -> dict[str, Any]:
    """Encode the call without the inputs of the loss, as an entry for the network's own; empty if there is none."""
    if call is None:
        return {}
    data = {
        "without": list(call.without),
        "parameters": list(call.parameters),
        "outputs": _encode_nodes(call.outputs, writing),
        "count": call.count,
    }
    if call.spec is not None:
        data["spec"] = encode_spec(call.spec)
    if call.rest is not None and not any(node.op in ("get_attr", "call_module") for node in call.rest.nodes):
        data["rest"] = _encode_nodes(call.rest, writing)
    return {"inference": data}


def _encode_nodes(graph: fx.Graph, writing: Writing) -> list[Any]:
    """Encode a graph that reads no tensors of the network."""
    nodes: list[Any] = encode_graph(fx.GraphModule({}, graph), graph, writing)["nodes"]
    return nodes


def _decode_nodes(nodes: list[Any], reading: Reading) -> fx.Graph:
    graph: fx.Graph = decode_graph({"nodes": nodes, "used": {}}, reading).graph
    return graph


def decode_inference(data: dict[str, Any], graph: fx.Graph, reading: Reading) -> InferenceCall | None:
    """Inverse of `encode_inference`.

    Args:
        data: The network's entry.
        graph: The network's graph.
        reading: What loading provides.

    Raises:
        ArtifactError: The data is damaged.
    """
    if "inference" not in data:
        return None
    own = data["inference"]
    outputs = _decode_nodes(own["outputs"], reading)
    spec = decode_spec(own["spec"], reading) if "spec" in own else None
    rest = _decode_nodes(own["rest"], reading) if "rest" in own else None
    call = InferenceCall(
        tuple(map(str, own["without"])), tuple(map(str, own["parameters"])), outputs, int(own["count"]), spec, rest
    )
    leaves = output_leaves(graph.output_node().args[0], makes_container if spec is None else makes_none)
    places = [place_of(node) for node in outputs.find_nodes(op="placeholder")]
    if len(list(leaves)) != call.count or not all(0 <= place < call.count for place in places):
        raise ArtifactError("its call without the inputs of the loss does not match its graph")
    return call
