"""The order of a module's parameters and submodules."""

from __future__ import annotations

import torch
from torch import nn

from qat_lightning.graph.module_order import order_as, order_by_keys


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def of(*order: str) -> nn.Module:
    module = nn.Module()
    for name in order:
        module.add_module(name, nn.BatchNorm1d(1))
    module.register_parameter("own", nn.Parameter(torch.ones(1)))
    return module


def test_what_the_other_has_comes_first_and_in_its_order() -> None:
    module, other = of("c", "a", "added", "b"), of("a", "b", "c")
    module.a._parameters["bias"] = module.a._parameters.pop("bias")
    module.a._parameters["weight"] = module.a._parameters.pop("weight")
    order_as(module, other)
    assert names(module) == [*names(other), "added.weight", "added.bias"]
    assert list(module._modules) == ["a", "b", "c", "added"]


def test_the_order_of_a_state_dict_is_taken_and_what_has_no_entry_keeps_its_place() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.BatchNorm1d(1), nn.Flatten())
    saved = nn.Sequential()
    for name in ("2", "0"):
        saved.add_module(name, module[int(name)])
    order_by_keys(module, [f"net.{key}" for key in saved.state_dict()] + ["other.0.weight"], "net.")
    assert list(module._modules) == ["2", "1", "0", "3"]
    assert names(module) == names(saved)
