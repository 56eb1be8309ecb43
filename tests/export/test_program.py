"""The graph of plain ops from which formats are made, for every mode × backend pair on every network."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat_lightning import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError, ExportError, TraceError
from qat_lightning.export.formats import get_format
from qat_lightning.export.program import float_program, int8_program
from qat_lightning.export.protocol import Source
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize as quantize_directly
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import pairs
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.artifact.making import batch_of, case_named, quantize
from tests.support.networks import CASES, Case
from tests.support.targets import skipped_without

TABLE = [
    pytest.param(mode, backend, case, id=f"{mode}-{backend}-{case.name}", marks=skipped_without(backend))
    for mode, backend in pairs()
    for case in CASES
    if mode in case.modes and case.name != "control_flow"
    if backend == "x86" or case.name in ("residual", "depthwise")
]
"""Every network with one backend, and with the other backends those that show what their kernels do."""


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the decomposed graph of mode pt2e, which needs no compiler."""
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


@functools.cache
def _quantized(mode: str, backend: str, case: Case) -> QuantizedNetwork:
    torch.manual_seed(0)
    return quantize(mode, backend, case.network(), batch_of(case))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
def test_program_computes_what_the_int8_network_does(mode: str, backend: str, case: Case) -> None:
    quantized = _quantized(mode, backend, case)
    program = int8_program(quantized)
    for size in (1, 5, 16):
        args, kwargs, _ = case.batch(size)
        with torch.no_grad():
            got = case.logits(program.module()(*args, **kwargs))
            expected = case.logits(quantized(*args, **kwargs))
        assert got.shape[0] == size
        assert sqnr_db(expected, got) > (100 if mode == "pt2e" else 30)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_weights_are_int8_and_activations_are_rounded_where_kernels_round(mode: str) -> None:
    program = int8_program(_quantized(mode, "x86", case_named("residual")))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("quantized_decomposed.dequantize_per_channel.default") == 4
    assert names.count("quantized_decomposed.quantize_per_tensor.default") >= 5
    tensors = {**program.state_dict, **program.constants}
    assert sum(tensor.dtype is torch.int8 for tensor in tensors.values() if isinstance(tensor, torch.Tensor)) == 4
    assert not any(tensor.numel() > 64 and tensor.is_floating_point() for tensor in program.state_dict.values())


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_loaded_network_has_the_same_program(mode: str, tmp_path: Path) -> None:
    case = case_named("plain")
    quantized = _quantized(mode, "x86", case)
    quantized.save(tmp_path / "model.int8")
    loaded = load_quantized(tmp_path / "model.int8", network=case.network() if mode == "eager" else None)
    args, kwargs, _ = case.batch(3)
    one, other = (int8_program(network).module()(*args, **kwargs) for network in (quantized, loaded))
    assert torch.equal(one, other)


def test_prepared_network_is_converted_first() -> None:
    case, recipe = case_named("linear"), Recipe("fx", "x86")
    args, kwargs, _ = case.batch(8)
    flow, example = get_mode("fx"), Example(args, kwargs)
    prepared = flow.prepare(case.network(), example, recipe).train()
    prepared(*args)
    with pytest.raises(ConfigurationError, match="give example="):
        int8_program(prepared)
    converted = flow.convert(cpu_copy(prepared), example)
    got = int8_program(prepared, example).module()(*args)
    assert sqnr_db(converted.network(*args), got) > 50


def test_control_flow_is_an_error_that_says_where() -> None:
    quantized = _quantized("eager", "x86", case_named("control_flow"))
    with pytest.raises(TraceError, match=r"networks\.py.*mode='fx'"):
        int8_program(quantized)


def test_float_network_is_no_int8_network() -> None:
    with pytest.raises(ConfigurationError, match="neither an int8 network"):
        int8_program(nn.Linear(2, 2))


def test_kernel_that_computes_something_else_is_named() -> None:
    quantized = copy.deepcopy(_quantized("fx", "x86", case_named("plain")))
    head = quantized.network.get_submodule("head")
    kernel = torch.ao.nn.quantized.Linear.forward
    head.forward = lambda x: _negated(kernel(head, x))
    with pytest.raises(ExportError, match="'head' computes different values"):
        int8_program(quantized)


def _negated(x: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(-x.dequantize(), x.q_scale(), x.q_zero_point(), x.dtype)


def test_float_program_takes_any_batch_and_leaves_the_network_in_training() -> None:
    case = case_named("several_inputs")
    network = case.network().train()
    args, kwargs, _ = case.batch(4)
    program = float_program(network, Example(args, kwargs))
    assert network.training
    args, kwargs, _ = case.batch(7)
    with torch.no_grad():
        expected = network.eval()(*args, **kwargs)
        got = program.module()(*args, **kwargs)
    assert torch.allclose(expected["logits"], got["logits"], atol=1e-5)


def test_example_of_one_sample_gives_a_program_for_any_batch() -> None:
    program = float_program(nn.Linear(3, 2), Example((torch.zeros(1, 3),)))
    assert program.module()(torch.zeros(5, 3)).shape == (5, 2)


class _FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(4, -1)


def test_fixed_batch_is_refused() -> None:
    with pytest.raises(TraceError, match="only for the batch size 4"):
        float_program(_FixedBatch(), Example((torch.zeros(4, 2),)))


@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_kinds_without_calibration_have_a_program(mode: str, kind: Any) -> None:
    case, recipe = case_named("linear"), Recipe(mode, "x86", kind=kind)
    args, kwargs, _ = case.batch(8)
    example = Example(args, kwargs)
    quantized = QuantizedNetwork(quantize_directly(case.network(), example, recipe), recipe, example)
    args, kwargs, _ = case.batch(5)
    with torch.no_grad():
        assert sqnr_db(quantized(*args), int8_program(quantized).module()(*args)) > 40


BY_TOKEN: Any = {"weight_bits": 4, "activation_granularity": "per_token"}
IN_GROUPS: Any = {"weight_bits": 4, "weight_granularity": "per_group", "weight_group_size": 32}


@pytest.mark.parametrize(
    ("mode", "scheme"),
    [("fx", BY_TOKEN | IN_GROUPS), ("eager", IN_GROUPS), ("eager", BY_TOKEN | {"activation_symmetric": True})],
)
def test_grids_of_tokens_and_groups_go_into_a_program_and_into_torchscript(
    mode: str, scheme: Any, tmp_path: Path
) -> None:
    recipe = Recipe(mode, "x86", Scheme(**scheme), kind="dynamic")
    network = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    example, other = Example((torch.randn(8, 8),)), 7 * torch.randn(5, 8)
    quantized = QuantizedNetwork(quantize_directly(network, example, recipe), recipe, example)
    get_format("torchscript").write(Source(quantized, example), tmp_path / "net.pt")
    scripted = get_format("torchscript").load(tmp_path / "net.pt")([other])[0]
    with torch.no_grad():
        assert sqnr_db(quantized(other), int8_program(quantized).module()(other)) > 60
        assert sqnr_db(quantized(other), scripted) > 60
