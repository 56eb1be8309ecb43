"""Embeddings in mode fx: tables are fake-quantized where the graph calls them, and become integers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from qat_lightning.layers.integer.weight_only import WeightOnlyEmbedding
from qat_lightning.layers.tables import TABLES, is_rounded_table, make_tables_plain, round_table, why_float
from qat_lightning.modes.left_float import layer_of
from qat_lightning.modes.qconfig import table_fake_quantize
from qat_lightning.modes.tables import READ, choose_tables, integer_tables, tied_to
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.settings.recipe import Recipe

_ARGUMENTS = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def call_embeddings(
    graph_module: fx.GraphModule, network: nn.Module, selected: Mapping[str, bool], scopes: dict[str, Any]
) -> None:
    """Let embeddings of subclasses, which are traced through, be layers where they look up their rows.

    Args:
        graph_module: The trace; changed in place.
        network: The traced network.
        selected: Whether each layer is to be quantized, by its name.
        scopes: The module whose ``forward`` created each node; new nodes get the scope of those they replace.
    """
    for node in graph_module.graph.find_nodes(op="call_function", target=F.embedding):
        given = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
        weight = given["weight"]
        owner, _, leaf = str(getattr(weight, "target", "")).rpartition(".")
        renormalizes = given.get("max_norm") is not None
        if leaf != "weight" or not selected.get(owner, False) or renormalizes or given.get("sparse"):
            continue
        module = network.get_submodule(owner)
        if not isinstance(module, nn.Embedding) or module._modules:
            continue
        if not _hold_layer(graph_module, owner, module, given):
            continue
        with graph_module.graph.inserting_before(node):
            call = graph_module.graph.call_module(owner, (given["input"],))
        scopes[call.name] = scopes.get(node.name, (owner, type(module)))
        node.replace_all_uses_with(call)
        graph_module.graph.erase_node(node)
        if not weight.users:
            graph_module.graph.erase_node(weight)
    graph_module.recompile()


def _hold_layer(graph_module: fx.GraphModule, owner: str, module: nn.Embedding, given: dict[str, Any]) -> bool:
    """Replace an embedding by a plain one with its tensors for a lookup; returns whether that is the registered one."""
    padding, by_frequency = given.get("padding_idx"), bool(given.get("scale_grad_by_freq"))
    padding = padding if padding is None else padding % module.num_embeddings
    held = graph_module.get_submodule(owner)
    if type(held) is nn.Embedding:  # another lookup of the same rows
        same = held.padding_idx == padding and held.scale_grad_by_freq == by_frequency
        return same and not why_float(held)
    layer = nn.Embedding(
        module.num_embeddings, module.embedding_dim, padding, scale_grad_by_freq=by_frequency, device="meta"
    )
    layer._parameters.update(module._parameters)
    layer._buffers.update(module._buffers)
    layer._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    graph_module.set_submodule(owner, layer.train(module.training))
    return True


def round_tables(prepared: fx.GraphModule, recipe: Recipe, selects: Callable[[str], bool]) -> dict[str, str]:
    """Fake-quantize the tables of embeddings that the graph calls.

    Args:
        prepared: The result of upstream's prepare.
        recipe: Recipe with the scheme.
        selects: Whether a layer is selected, by its name in the float network.

    Returns:
        The reasons why others stay float, by name.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    called = dict.fromkeys(str(node.target) for node in prepared.graph.find_nodes(op="call_module"))
    tables = {name: modules[name] for name in called if isinstance(modules[name], TABLES)}
    read = _read_by_functions(prepared, modules)
    for name in called:
        if name not in tables:
            read |= {key: tied_to(owner) for key, owner in _kept_float(name, modules[name]).items()}
    chosen, reasons = choose_tables(tables, lambda name: selects(layer_of(name)), read)
    for name in chosen:
        round_table(modules[name], table_fake_quantize(recipe))
    return {layer_of(name): reason for name, reason in reasons.items()}


def _read_by_functions(prepared: fx.GraphModule, modules: dict[str, nn.Module]) -> dict[int, str]:
    """The tensors that the graph reads directly, except weights that are rounded right there."""

    def rounds(node: fx.Node) -> bool:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, FakeQuantize) and module.source == "present"

    attributes = prepared.graph.find_nodes(op="get_attr")
    read = [node for node in attributes if not all(rounds(user) for user in node.users)]
    return {id(operator.attrgetter(str(node.target))(prepared)): READ for node in read}


def _kept_float(name: str, called: nn.Module) -> dict[int, str]:
    """The parameters in a called module, except rounded ones, and the layers that own them."""
    found: dict[int, str] = {}
    for inner, module in called.named_modules():
        if "weight_fake_quant" not in module._modules:
            owner = ".".join(part for part in (name, inner) if part)
            found |= {id(parameter): layer_of(owner) for parameter in module.parameters(recurse=False)}
    return found


def take_integer_tables(prepared: nn.Module) -> dict[str, WeightOnlyEmbedding]:
    """Replace fake-quantized embeddings by plain ones before conversion, and return their integer embeddings.

    Upstream's converter does not support a fake-quantize inside an embedding, and ignores a plain one.
    """
    tables: list[tuple[str, Any]] = [
        (name, module) for name, module in prepared.named_modules() if is_rounded_table(module)
    ]
    made = integer_tables((name, table) for name, table in tables if not table.weight_fake_quant.left_float)
    make_tables_plain(prepared)
    return made


def put_integer_tables(int8: fx.GraphModule, tables: dict[str, WeightOnlyEmbedding]) -> None:
    """Replace the trained embeddings by integer ones."""
    for name, table in tables.items():
        int8.set_submodule(name, table)
