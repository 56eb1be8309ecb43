"""Embeddings in mode eager: tables are fake-quantized in the layers, which become integer layers in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from qat_lightning.checks import LayerCheck
from qat_lightning.graph.scopes import join
from qat_lightning.layers.integer.integer_layer import take_over_hooks
from qat_lightning.layers.integer.weight_only import WeightOnlyEmbedding
from qat_lightning.layers.tables import TABLES, is_rounded_table, round_table, table_grid
from qat_lightning.modes.eager.chains import Chain
from qat_lightning.modes.eager.layers import become
from qat_lightning.modes.eager.observation import Observation
from qat_lightning.modes.judging import decibels
from qat_lightning.modes.qconfig import table_fake_quantize
from qat_lightning.modes.tables import READ, choose_tables, integer_tables, tied_to
from qat_lightning.settings.recipe import Recipe


def find_tables(
    network: nn.Module, observation: Observation, chains: Collection[Chain], recipe: Recipe, prefix: str
) -> tuple[list[str], dict[str, str]]:
    """The embeddings whose tables are to be fake-quantized, and the reasons why others stay float.

    Args:
        network: The float network.
        observation: One run of it.
        chains: The layers that will be int8.
        recipe: Selects the layers.
        prefix: The network's own name; the recipe's globs include it.
    """
    if "tables" not in recipe.families:
        return [], {}
    heads = {network.get_submodule(chain.name) for chain in chains}
    tables = {name: module for name, module in network.named_modules() if isinstance(module, TABLES)}
    read: dict[int, str] = {}
    for name, module in network.named_modules():
        if name not in tables and module not in heads:
            read |= {id(parameter): tied_to(name) for parameter in module.parameters(recurse=False)}
    read |= {id(module.weight): READ for module in tables.values() if observation.reads(module, looked_up=True)}
    return choose_tables(tables, lambda name: recipe.selects(join(prefix, name)), read)


def round_tables(network: nn.Module, names: Collection[str], recipe: Recipe) -> None:
    """Fake-quantize the tables of embeddings."""
    for name in names:
        round_table(network.get_submodule(name), table_fake_quantize(recipe))


def rounded_tables(prepared: nn.Module) -> dict[str, Any]:
    """The embeddings of a prepared network with fake-quantized tables, by name, except those left float."""
    tables: dict[str, Any] = {name: module for name, module in prepared.named_modules() if is_rounded_table(module)}
    return {name: table for name, table in tables.items() if not table.weight_fake_quant.left_float}


def make_integer(module: Any, recipe: Recipe) -> None:
    """Turn a float embedding into an integer one, with integers to be set later; it stays the same object."""
    made = WeightOnlyEmbedding.empty(module, table_grid(table_fake_quantize(recipe)))
    take_over_hooks(made, module)
    module.__dict__.clear()
    become(module, WeightOnlyEmbedding, **made.__dict__)


@torch.no_grad()
def fill_tables(network: nn.Module, prepared: nn.Module, names: Collection[str]) -> list[LayerCheck]:
    """Copy the integers of trained embeddings to an int8 network, and compare their outputs.

    Args:
        network: The int8 network.
        prepared: The trained network, on the CPU, in float32.
        names: Names of the embeddings.
    """
    trained: Mapping[str, Any] = {name: prepared.get_submodule(name) for name in names}
    checks = []
    for name, made in integer_tables(trained.items()).items():
        table: Any = network.get_submodule(name)
        table.integers, table.scales = made.integers, made.scales
        wanted = trained[name].weight_fake_quant.round(trained[name].weight.float())
        op = f"{type(table).__module__}.{type(table).__name__}"
        checks.append(LayerCheck(name, op, decibels(wanted, table.weight)))
    return checks
