"""Bias correction removes the mean error of rounded weights, in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.bias_correction import apply_layer, correct_biases
from qat_lightning.recipes.layers import rounded_layers
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.recipes.test_equalization import unfair
from tests.support.networks import CASES, Case

CASE = {case.name: case for case in CASES}
MODES = ("eager", "fx", "pt2e")
LAYERS = {
    "plain": {"conv": "bn", "head": None},
    "residual": {"stem": None, "conv1": "bn1", "conv2": "bn2", "head": None},
    "depthwise": {"expand.0": "expand.1", "depthwise.0": "depthwise.1", "project.0": "project.1", "head.1": None},
    "functional": {"left": None, "right": None, "join": None, "head": None},
}


def prepare(mode: str, case: Case, bits: int = 3) -> tuple[nn.Module, list[Example]]:
    torch.manual_seed(0)
    network = unfair(case.network()).eval()
    batches = [Example(*case.batch(16)[:2]) for _ in range(3)]
    recipe = Recipe(mode, "x86", Scheme(weight_bits=bits, weight_granularity="per_tensor"), kind="static")
    prepared = get_mode(mode).prepare(network, batches[0], recipe)
    calibrate(prepared, batches)
    return prepared, batches


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", MODES)
def test_the_layers_and_their_batchnorms(mode: str, name: str) -> None:
    prepared, _ = prepare(mode, CASE[name])
    assert {layer.name: layer.batchnorm for layer in rounded_layers(prepared)} == LAYERS[name]


@pytest.mark.parametrize("name", ["plain", "depthwise", "functional"])
@pytest.mark.parametrize("mode", MODES)
def test_the_mean_error_of_each_layer_is_gone(mode: str, name: str) -> None:
    prepared, batches = prepare(mode, CASE[name])
    reference = copy.deepcopy(prepared_state(prepared).float_network).eval()
    weights = {layer.name: (layer.rounded() - layer.folded(), layer) for layer in rounded_layers(prepared)}
    before = {key: value.clone() for key, value in prepared.state_dict().items() if isinstance(value, Tensor)}
    corrected = correct_biases(prepared, batches)
    assert set(corrected) == set(weights)
    errors: dict[str, list[Tensor]] = {key: [] for key in weights}
    for key, (error, _) in weights.items():
        reference.get_submodule(key).register_forward_hook(
            lambda module, args, out, key=key, error=error: errors[key].append(apply_layer(module, args[0], error))
        )
    with torch.no_grad():
        for batch in batches:
            reference(*batch.args, **batch.kwargs)
    after = prepared.state_dict()
    for key, (_, layer) in weights.items():
        whole = torch.cat([error.transpose(0, 1).flatten(1) for error in errors[key]], 1)
        owner = f"{layer.batchnorm or key}.bias"
        moved = after[owner] - before[owner]
        assert (whole.mean(1)).abs().max() > 0
        torch.testing.assert_close(whole.mean(1) + moved, torch.zeros_like(moved), atol=1e-5, rtol=0)
    moved_keys = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved_keys <= {f"{layer.batchnorm or key}.bias" for key, (_, layer) in weights.items()}


@pytest.mark.parametrize("mode", MODES)
def test_outputs_of_low_bits_come_nearer(mode: str) -> None:
    prepared, batches = prepare(mode, CASE["depthwise"])
    reference = copy.deepcopy(prepared_state(prepared).float_network).eval()

    def error() -> float:
        with torch.no_grad():
            shifts = [(prepared(*b.args) - reference(*b.args)).mean(0) for b in batches]
        return float(torch.stack(shifts).mean(0).norm())

    before = error()
    correct_biases(prepared, batches)
    assert error() < before


def test_layers_without_a_bias_are_left_out() -> None:
    network: Any = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    x = torch.rand(8, 4)
    prepared = get_mode("eager").prepare(network, Example((x,)), Recipe("eager", "x86"))
    assert set(correct_biases(prepared, [x])) == {"2"}
    assert correct_biases(prepared, []) == {}
