"""Encoding a graph and its modules as plain data, and decoding it node by node from allow-lists.

A decoded graph becomes generated Python code, so everything from a file is checked first: names are plain names,
functions, methods and attributes are on the lists of `operations`, classes on those of `layers`, and constants have the
types of `values`, whose ``repr`` is safe.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from qat_lightning.artifact import operations
from qat_lightning.artifact.classes import decode_container, encode_class, encode_container, is_own_container, maker_of
from qat_lightning.artifact.layers import decode_module, encode_module
from qat_lightning.artifact.packed import decode_packed, encode_packed
from qat_lightning.artifact.progress import Reading, Writing
from qat_lightning.artifact.values import decode, encode, identifier, namedtuple_type, no_tag
from qat_lightning.errors import ArtifactError
from qat_lightning.graph.structures import given_fields, is_namedtuple, know
from qat_lightning.layers.kernels import is_packed
from qat_lightning.modes.graph_network import GraphNetwork, GraphPart
from qat_lightning.modes.structured_tracer import makes_container

_PATH_PART = re.compile(r"[A-Za-z0-9_\-]+")


def encode_graph(root: nn.Module, graph: fx.Graph, writing: Writing) -> dict[str, Any]:
    """Encode a graph, and the modules and tensors that it uses.

    Args:
        root: The module that holds the graph's tensors and modules; those that the graph does not use are left out.
        graph: A graph of functions, methods, modules, tensors and constants.
        writing: Collects tensors, and requirements for loading.

    Raises:
        ArtifactError: A node cannot be stored; the message names it.
    """
    if type(graph._codegen) is not CodeGen:
        raise ArtifactError("its inputs are taken apart by generated code, which a file cannot hold")
    nodes: list[dict[str, Any]] = []

    def special(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if is_own_container(value):
            return encode_container(value, zip(value._fields, value, strict=True), special)
        return writing.tensors.encode(value)

    for node in graph.nodes:
        with _blaming(node):
            target: Any = node.target
            if node.op == "call_function" and (makes_container(node) or is_namedtuple(target)):
                target = {"class": encode_class(getattr(target, "kind", target))}
            elif node.op == "call_function":
                target = operations.name_of(target)
                if not operations.is_allowed(target) or _reads_unlisted_attribute(node):
                    writing.needs_trust.append(f"{target} {node.args[1]}" if target == "getattr" else target)
            elif node.op == "call_method" and target not in operations.METHODS:
                writing.needs_trust.append(f"Tensor.{target}")
            args = [encode(arg, special) for arg in node.args]
            kwargs = {name: encode(arg, special) for name, arg in node.kwargs.items()}
        nodes.append({"op": node.op, "name": node.name, "target": target, "args": args, "kwargs": kwargs})
    return {"nodes": nodes, "used": _used(root, graph, writing)}


def _used(root: nn.Module, graph: fx.Graph, writing: Writing) -> dict[str, Any]:
    """All modules, tensors and constants that the graph uses, by path."""
    targets = {str(node.target): node for node in graph.nodes if node.op in ("get_attr", "call_module")}
    called = {path for path, node in targets.items() if node.op == "call_module"}
    used: dict[str, Any] = {}
    for path, node in sorted(targets.items(), key=lambda item: item[0].count(".")):
        with _blaming(node):
            _check_path(path)
            parts = path.split(".")
            outer = {".".join(parts[:count]) for count in range(1, len(parts))} & called
            used[path] = {"inside": True} if outer else _encode_attribute(_attribute(root, path), path, writing)
    return used


@contextmanager
def _blaming(node: fx.Node) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"its node {node.name!r} {error}") from error


def decode_graph(data: dict[str, Any], reading: Reading) -> GraphNetwork:
    """Inverse of `encode_graph`.

    Raises:
        ArtifactError: The data is not a result of `encode_graph`, or needs more than ``reading`` allows.
    """
    root = nn.Module()
    loose: dict[str, Any] = {}
    for path, attribute in data["used"].items():
        _check_path(path)
        parent, _, leaf = path.rpartition(".")
        if "inside" in attribute:
            _check_inside(root, parent, leaf)
        else:
            _put(_holder(root, parent), leaf, _decode_attribute(attribute, reading), loose, path)
    root.__dict__["graph"] = _decode_nodes(data["nodes"], data["used"], reading)
    network = GraphNetwork(cast(fx.GraphModule, root))
    for path, value in loose.items():
        parent, _, leaf = path.rpartition(".")
        network.get_submodule(parent).__dict__[leaf] = value
    return network.eval()


def _decode_nodes(records: list[dict[str, Any]], used: dict[str, Any], reading: Reading) -> fx.Graph:
    graph = fx.Graph()
    done: dict[str, fx.Node] = {}

    def special(tag: str, content: Any) -> Any:
        # Not tensors: generated code would contain their printed form, and in a graph they are nodes anyway.
        return done[content] if tag == "node" else no_tag(tag, content)

    for record in records:
        name, op = identifier(record["name"]), record["op"]
        args = tuple(decode(arg, special) for arg in record["args"])
        kwargs = {identifier(key): decode(arg, special) for key, arg in record["kwargs"].items()}
        target = _decode_target(op, record["target"], args, used, reading)
        if name in done:
            raise ArtifactError(f"there are two nodes {name!r}")
        done[name] = graph.create_node(op, target, args, kwargs, name=name)
    if [record["op"] for record in records].index("output") != len(records) - 1:
        raise ArtifactError("its graph has nodes after its output")
    graph.lint()
    return graph


def _decode_target(op: Any, target: Any, args: tuple[Any, ...], used: dict[str, Any], reading: Reading) -> Any:
    """The checked target of a node."""
    if op == "call_function" and type(target) is dict:
        if "class" in target:
            return maker_of(target["class"], reading.network)
        name, fields = target["namedtuple"]
        return namedtuple_type(name, tuple(fields))
    if type(target) is not str:
        raise ArtifactError("the target of a node is not a string")
    if op == "call_function":
        return _decode_function(target, args, reading.trusted)
    if op == "placeholder":
        identifier(target.removeprefix("*").removeprefix("*"))
    elif op in ("get_attr", "call_module"):
        _check_used(op, target, used)
    elif op == "call_method":
        _check_method(target, args, reading.trusted)
    elif op != "output" or target != "output":
        raise ArtifactError(f"there is no operation {str(op)[:80]!r} of {target[:80]!r}")
    return target


def _decode_function(target: str, args: tuple[Any, ...], trusted: bool) -> Any:
    if target == "getattr" and not _is_plain_getattr(args, trusted):
        raise ArtifactError(
            "it reads an attribute that files are not allowed to read. If you trust the file, use "
            "load_quantized(path, trusted=True)"
        )
    return operations.function_of(target, trusted=trusted)


def _check_used(op: str, target: str, used: dict[str, Any]) -> None:
    if target not in used:
        raise ArtifactError(f"it has no {target[:80]!r}, which its graph uses")
    if op == "call_module" and not ({"module", "graph", "inside"} & used[target].keys()):
        raise ArtifactError(f"it calls {target[:80]!r}, which is not a module")


def _check_method(target: str, args: tuple[Any, ...], trusted: bool) -> None:
    if not args or not isinstance(args[0], fx.Node):
        raise ArtifactError("a method is called on something that is not the result of a node")
    if target not in operations.METHODS and not (trusted and identifier(target)):
        raise ArtifactError(
            f"it calls the method {target[:80]!r}, which files are not allowed to call. If you trust the file, use "
            "load_quantized(path, trusted=True)"
        )


def _is_plain_getattr(args: tuple[Any, ...], trusted: bool) -> bool:
    if len(args) != 2 or not isinstance(args[0], fx.Node) or type(args[1]) is not str:
        return False
    return _may_be_read(args[0], args[1]) or (trusted and bool(identifier(args[1])))


def _may_be_read(node: fx.Node, name: str) -> bool:
    """Whether an attribute is on the list, or is a field of an input, such as a dataclass."""
    plain = name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")
    return name in operations.ATTRIBUTES or (node.op == "placeholder" and plain and not hasattr(torch.Tensor, name))


def _reads_unlisted_attribute(node: fx.Node) -> bool:
    return node.target is getattr and not _may_be_read(cast(fx.Node, node.args[0]), str(node.args[1]))


def _attribute(root: nn.Module, path: str) -> Any:
    parent, _, leaf = path.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)


def _encode_attribute(value: Any, path: str, writing: Writing) -> dict[str, Any]:
    if isinstance(value, (fx.GraphModule, GraphNetwork)):
        return {"graph": encode_graph(value, value.graph, writing)}
    if isinstance(value, nn.Module):
        return {"module": encode_module(value, path, writing)}
    if is_packed(value):
        return {"packed": encode_packed(value, writing.tensors)}
    tag = "parameter" if isinstance(value, nn.Parameter) else "buffer" if isinstance(value, Tensor) else "value"
    return {tag: encode(value, writing.tensors.encode)}


def _decode_attribute(data: dict[str, Any], reading: Reading) -> Any:
    ((tag, content),) = data.items()
    if tag == "graph":
        return decode_graph(content, reading)
    if tag == "module":
        return decode_module(content, reading)
    if tag == "packed":
        return decode_packed(content, reading.tensors)
    value = decode(content, reading.tensors.decode)
    if tag == "parameter":
        return nn.Parameter(value, requires_grad=False)
    if tag not in ("buffer", "value") or isinstance(value, Tensor) != (tag == "buffer"):
        raise ArtifactError(f"it holds a {str(tag)[:80]!r}, which is unknown")
    return value


def _put(holder: nn.Module, leaf: str, value: Any, loose: dict[str, Any], path: str) -> None:
    """Register a value under a name that neither another part of the file nor `nn.Module` itself uses."""
    if hasattr(holder, leaf) or hasattr(GraphNetwork, leaf) or leaf in ("graph", "_run", "_run_at_inference"):
        raise ArtifactError(f"it has a part named {path[:80]!r}, but that name is taken")
    if isinstance(value, nn.Parameter):
        holder.register_parameter(leaf, value)
    elif isinstance(value, nn.Module):
        holder.add_module(leaf, value)
    elif isinstance(value, Tensor):
        holder.register_buffer(leaf, value)
    else:
        loose[path] = value


def _check_inside(root: nn.Module, parent: str, leaf: str) -> None:
    """Raise an error unless the parent of ``leaf`` is a module that was read before."""
    try:
        holder = root.get_submodule(parent)
    except AttributeError:
        holder = nn.Module()
    if leaf not in {*holder._modules, *holder._parameters, *holder._buffers}:
        raise ArtifactError(f"it has no {f'{parent}.{leaf}'[:80]!r}, which its graph uses")


def _holder(root: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if part not in root._modules:
            _put(root, part, GraphPart(), {}, path)
        child = root._modules[part]
        assert child is not None
        root = child
    return root


def _check_path(path: Any) -> None:
    if type(path) is not str or not all(_PATH_PART.fullmatch(part) for part in path.split(".")):
        raise ArtifactError(
            f"it has a part named {str(path)[:80]!r}: only A to Z, a to z, digits, _ and - are allowed in names"
        )


def encode_signature(signature: inspect.Signature) -> list[list[Any]]:
    """The parameters of a function: name, kind, and whether there is a default."""
    rows = []
    for parameter in signature.parameters.values():
        row: list[Any] = [parameter.name, parameter.kind.name]
        if parameter.default is not parameter.empty:
            row.append(_default(parameter.default))
        rows.append(row)
    return rows


def _default(value: Any) -> Any:
    try:
        return encode(value)
    except ArtifactError:
        # Only the existence of a default matters: its value was captured in the graph.
        return encode(...)


def decode_signature(rows: list[list[Any]]) -> inspect.Signature:
    """Inverse of `encode_signature`."""
    one = inspect.Parameter
    kinds = (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD, one.VAR_POSITIONAL, one.KEYWORD_ONLY, one.VAR_KEYWORD)
    by_name = {kind.name: kind for kind in kinds}
    return inspect.Signature(
        [
            one(identifier(name), by_name[kind], default=decode(default[0]) if default else one.empty)
            for name, kind, *default in rows
        ]
    )


class _Leaf:
    """Placeholder for a leaf of a structure."""


def encode_structure(spec: Any) -> Any:
    """Encode the structure of a `torch.utils._pytree.TreeSpec` as plain data."""

    def special(value: Any) -> Any:
        if isinstance(value, _Leaf):
            return {"leaf": True}
        return encode_container(value, _one_level(value), special) if is_own_container(value) else None

    return encode(torch.utils._pytree.tree_unflatten([_Leaf() for _ in range(spec.num_leaves)], spec), special)


def _one_level(value: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a container, in pytree's order."""
    if is_namedtuple(type(value)):
        return list(zip(value._fields, value, strict=True))
    inner, _ = torch.utils._pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    named = value.items() if isinstance(value, dict) else given_fields(value).items()
    items = [(key, one) for part in inner for key, one in named if one is part]
    if len(items) != len(inner):
        raise ArtifactError(f"holds a {type(value).__qualname__}, which is not constructed from its fields")
    return items


def decode_structure(data: Any, network: nn.Module | None = None) -> Any:
    """Inverse of `encode_structure`. Upstream's own loader is not used, because it imports whatever a file names."""

    def special(tag: str, content: Any) -> Any:
        if tag == "leaf":
            return _Leaf()
        if tag != "container":
            return no_tag(tag, content)
        made = decode_container(content, special, network)
        know(type(made))
        return made

    return torch.utils._pytree.tree_structure(decode(data, special))
