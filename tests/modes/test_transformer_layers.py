"""Torch's attention and transformer layers in every mode: their linear maps are int8."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning.artifact import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.layers.transformer import WrittenAttention, written_out
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.modes.uncalibrated import quantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe

ROWS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
PADDING = torch.tensor([[False] * 6, [True] + [False] * 5, [False] * 4 + [True] * 2, [True, False] * 3])
Case = tuple[Callable[[], nn.Module], Callable[[Any, Tensor, Any], Tensor], Tensor | None]


def _both(results: tuple[Tensor, Tensor]) -> Tensor:
    return results[0] + results[1].mean()


CASES: dict[str, Case] = {
    "self": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True, dropout=0.1),
        lambda part, x, mask: part(x, x, x, need_weights=False)[0],
        None,
    ),
    "with weights": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True, dropout=0.1),
        lambda part, x, mask: _both(part(x, x, x, key_padding_mask=mask)),
        PADDING,
    ),
    "weights of each head, sequence first": (
        lambda: nn.MultiheadAttention(16, 4, bias=False),
        lambda part, x, mask: _both(part(x, x.flip(0), x.flip(0), average_attn_weights=False)),
        None,
    ),
    "other sizes": (
        lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=4, batch_first=True),
        lambda part, x, mask: part(x, x[..., :8], x[..., :4])[0],
        None,
    ),
    "causal": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True),
        lambda part, x, mask: part(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0],
        CAUSAL,
    ),
    "more positions": (
        lambda: nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True),
        lambda part, x, mask: part(x, x, x, key_padding_mask=mask)[0],
        PADDING,
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
        lambda part, x, mask: part(x, src_key_padding_mask=mask),
        PADDING,
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", norm_first=True, batch_first=True),
            2,
            nn.LayerNorm(16),
        ),
        lambda part, x, mask: part(x, mask),
        CAUSAL,
    ),
    "decoder layer": (
        lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True),
        lambda part, x, mask: part(x, x.flip(1), mask, tgt_is_causal=True),
        CAUSAL,
    ),
    "transformer": (
        lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True),
        lambda part, x, mask: part(x, x.flip(1), tgt_mask=mask),
        CAUSAL,
    ),
}
QUICK = ("with weights", "decoder layer")


class Network(nn.Module):
    """One of the cases between two linear layers."""

    def __init__(self, case: str) -> None:
        super().__init__()
        make, self.call, _ = CASES[case]
        self.before, self.part, self.head = nn.Linear(16, 16), make(), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.call(self.part, self.before(x), mask))


def network_of(case: str) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    mask = CASES[case][2]
    return Network(case), Example((ROWS,) if mask is None else (ROWS, mask))


def train(prepared: nn.Module, example: Example) -> None:
    """Train a few steps with fake-quantization; return the gradients."""
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    prepared.train()
    for _ in range(3):
        prepared(*example.args).square().sum().backward()


class Own(nn.TransformerDecoderLayer):
    """A subclass that changes a part of torch's class."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return 0.5 * super()._ff_block(x)


CASES["a class of one's own"] = (
    lambda: Own(16, 4, 32, batch_first=True),
    lambda part, x, mask: part(x, x.flip(1)),
    None,
)


@pytest.mark.parametrize("case", CASES)
def test_written_out_they_compute_the_same(case: str) -> None:
    network, example = network_of(case)
    for flag in (True, False):
        for module in network.modules():
            module.training = flag and not isinstance(module, nn.Dropout)
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        expected = network(*example.args)
        with written_out(network, lambda name: True):
            assert any(isinstance(module, WrittenAttention) for module in network.modules())
            actual = network(*example.args)
        assert torch.allclose(actual, expected, atol=1e-5)
    assert not any(isinstance(module, WrittenAttention) for module in network.modules())


def _pairs() -> list[Any]:
    found = []
    for case in CASES:
        for mode in ("fx", "eager", "pt2e"):
            for backend in ("x86", "onednn", "fbgemm", "qnnpack") if mode != "pt2e" else ("x86", "xnnpack"):
                quick = backend == "x86" and mode != "pt2e" and case in QUICK
                later = pytest.mark.slow if backend == "x86" else pytest.mark.nightly
                found.append(pytest.param(case, mode, backend, marks=() if quick else later))
    return found


@pytest.mark.parametrize(("case", "mode", "backend"), _pairs())
@pytest.mark.filterwarnings("ignore")
def test_their_linear_maps_are_int8(case: str, mode: str, backend: str, tmp_path: Path) -> None:
    network, example = network_of(case)
    own, recipe, flow = dict(network.state_dict()), Recipe(mode, backend), get_mode(mode)
    prepared = flow.prepare(copy.deepcopy(network), example, recipe)
    prepared.load_state_dict(own, strict=False)
    assert set(own) <= set(prepared.state_dict())
    train(prepared, example)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in prepared.parameters())
    converted = flow.convert(cpu_copy(prepared), example)
    floats = [row.name for row in converted.coverage if not row.quantized and row.kind != "MultiheadAttention"]
    assert not floats or mode == "pt2e", floats
    assert any(row.quantized for row in converted.coverage if row.name.startswith("part"))
    worst = min(check.sqnr_db for check in converted.checks)
    assert worst > 50, [check for check in converted.checks if check.sqnr_db == worst]
    told = {row.name: row.quantized for row in flow.coverage(cpu_copy(prepared), example)}
    assert told == {row.name: row.quantized for row in [*converted.coverage, *converted.operations]}
    saved = QuantizedNetwork(converted, recipe, example)
    saved.save(tmp_path / "model.int8")
    again = load_quantized(tmp_path / "model.int8", network=network)
    assert torch.equal(again(*example.args), saved(*example.args))


@pytest.mark.parametrize(("mode", "kind"), [("fx", "dynamic"), ("eager", "dynamic"), ("fx", "weight_only")])
def test_without_calibration_what_is_inside_transformers_is_integer(mode: str, kind: str) -> None:
    network, example = network_of("encoder layer")
    converted = quantize(network.eval(), example, Recipe(mode, "x86", kind=kind))
    assert all(row.quantized for row in converted.coverage if row.kind in ("Linear", "MultiheadAttention"))
    with torch.no_grad():
        assert sqnr_db(network(*example.args), converted.network(*example.args)) > 25


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_what_is_excluded_is_called_as_it_was(mode: str) -> None:
    network, example = network_of("with weights")
    prepared = get_mode(mode).prepare(network, example, Recipe(mode, "x86", exclude=("part",)))
    assert type(prepared.part) is nn.MultiheadAttention
    assert not any(name.startswith("part.") and "fake_quant" in name for name, _ in prepared.named_modules())


@pytest.mark.parametrize("mode", ["fx", "eager"])
def test_a_recipe_of_an_earlier_release_leaves_attention_float(mode: str) -> None:
    network, example = network_of("encoder layer")
    earlier = Recipe(mode, "x86").to_dict()
    del earlier["families"]
    recipe = Recipe.from_dict(earlier)
    assert not recipe.differences(Recipe(mode, "x86"))
    prepared = get_mode(mode).prepare(network, example, recipe)
    rows = {row.name: row for row in get_mode(mode).coverage(cpu_copy(prepared), example)}
    assert not rows["part.self_attn"].quantized
    assert Recipe.from_dict(recipe.to_dict()).families == ()


def test_the_fast_path_of_evaluation_is_not_taken() -> None:
    network, example = network_of("encoder layer")
    prepared = get_mode("eager").prepare(network, example, Recipe("eager", "x86"))
    train(prepared, example)
    prepared.eval()
    with torch.inference_mode():
        rounded = prepared(*example.args)
        set_phase(prepared, fake_quant=False, observers=False, batchnorm_frozen=False)
        assert not torch.equal(rounded, prepared(*example.args))
