"""Per-layer overrides, in every mode and kind: int8 has the layers' grids and equals the trained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_lightning import Scheme, load_quantized
from qat_lightning.artifact import artifact_bytes
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.places import find_places
from qat_lightning.modes.prepared import cpu_copy, prepared_state
from qat_lightning.modes.registry import mode_for
from qat_lightning.plain import convert, prepare, quantize
from qat_lightning.settings.engines import onednn_is_exact
from qat_lightning.settings.recipe import Recipe
from tests.support.exactness import X86_LEAST_DB
from tests.support.quantizers import OwnQuantizer

MODES = ("eager", "fx", "pt2e", "parts")
X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A convolution with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(32), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.relu(self.bn(self.conv(x)))


class Blocks(nn.Module):
    """A stem, two residual blocks and a head; weights dominate the file."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(32 * 36, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).flatten(1))


MIXED = Scheme(
    overrides={
        "blocks.*": {"weight_bits": 4},
        "blocks.1": {"weight_bits": 3, "weight_granularity": "per_tensor", "weight_observer": "min_max"},
        "stem.0": "float",
        "head": {"weight_bits": 4},
    }
)
LARGEST = {"blocks.0.conv": 7, "blocks.1.conv": 3, "head": 7}


@pytest.fixture(autouse=True)
def _decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    torch.manual_seed(0)


def trained(mode: str, scheme: Scheme, network: nn.Module | None = None, backend: Any = "x86", **recipe: Any) -> Any:
    torch.manual_seed(0)
    prepared = prepare(network or Blocks(), Example((X,)), Recipe(mode, backend, scheme, **recipe))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(3):
        prepared(torch.randn(8, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return prepared


def grids(prepared: nn.Module, what: str) -> dict[str, int]:
    return {p.layer: p.fq.quant_max for p in find_places(prepared) if p.what == what and p.kind != "input"}


def integers_of(network: nn.Module) -> list[Tensor]:
    """The weights of an int8 network, as its kernels get them."""
    found = []
    for module in network.modules():
        weight = getattr(module, "weight", None)
        weight = weight() if callable(weight) else weight
        if isinstance(weight, Tensor) and weight.is_quantized:
            found.append(weight.int_repr())
    return [*found, *(b for _, b in network.named_buffers() if b.dtype is torch.int8 and b.dim() > 1)]


@pytest.mark.parametrize("mode", MODES)
def test_int8_is_what_trained_on_the_grids_of_each_layer(mode: str, tmp_path: Path) -> None:
    prepared = trained(mode, MIXED)
    assert grids(prepared, "weight") == LARGEST
    fq = {p.layer: p.fq for p in find_places(prepared) if p.what == "weight"}
    assert [fq[layer].per_channel for layer in LARGEST] == [True, False, True]
    assert [fq[layer].clipped for layer in LARGEST] == [True, False, True]
    made = convert(prepared, Example((X,)))
    rows = {row.name: row for row in made.coverage if row.what == "layer"}
    assert [name for name, row in rows.items() if row.quantized] == list(LARGEST)
    assert rows["stem.0"].excluded
    assert min(check.sqnr_db for check in made.checks) > X86_LEAST_DB
    with torch.no_grad():
        torch.testing.assert_close(made(X), cpu_copy(prepared)(X), rtol=0, atol=1e-5 if onednn_is_exact() else 0.1)
    assert {int(weight.abs().max()) for weight in integers_of(made)} == {3, 7}
    path = tmp_path / "model.int8"
    made.save(path)
    loaded = load_quantized(path, network=Blocks() if mode in ("eager", "parts") else None)
    assert torch.equal(loaded(X), made(X))
    assert loaded.recipe.scheme == MIXED


@pytest.mark.parametrize("mode", MODES)
def test_the_file_is_smaller_by_the_bits_of_the_layers(mode: str) -> None:
    whole = len(artifact_bytes(convert(trained(mode, Scheme()), Example((X,)))))
    mixed = len(artifact_bytes(convert(trained(mode, Scheme(overrides={"head": {"weight_bits": 4}})), Example((X,)))))
    assert whole - mixed == pytest.approx(32 * 36 * 32 / 2, rel=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_more_bits_than_the_network_has(mode: str) -> None:
    scheme = Scheme(weight_bits=4, overrides={"head": {"weight_bits": 8}})
    prepared = trained(mode, scheme)
    assert grids(prepared, "weight") == {"stem.0": 7, "blocks.0.conv": 7, "blocks.1.conv": 7, "head": 127}
    made = convert(prepared, Example((X,)))
    assert min(check.sqnr_db for check in made.checks) > X86_LEAST_DB


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("learned", ["lsq", "lsq+"])
def test_learned_steps_begin_on_the_grids_of_each_layer(mode: str, learned: Any) -> None:
    prepared = trained(mode, Scheme(learned_step=learned, overrides=MIXED.overrides))
    assert grids(prepared, "weight") == LARGEST
    made = convert(prepared, Example((X,)))
    with torch.no_grad():
        difference = (made(X) - cpu_copy(prepared)(X)).abs()
    assert difference.max() < 0.1
    if onednn_is_exact():  # a value on the border of two steps may still be put on either
        assert (difference > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize("mode", MODES)
def test_activation_bits_are_those_of_the_output_of_the_layer(mode: str) -> None:
    prepared = trained(mode, Scheme(overrides={"blocks.1.conv": {"activation_bits": 4}}))
    found = grids(prepared, "activation")
    # In pt2e the sum is rounded, and what is added to it is not.
    name = "blocks.1.conv" if "blocks.1.conv" in found else None
    assert [layer for layer, largest in found.items() if largest == 15] == ([name] if name else [])
    assert name or mode == "pt2e"
    inputs = [p.fq.quant_max for p in find_places(prepared) if p.kind == "input"]
    assert set(inputs) == {255}
    assert "have 4" in prepared_state(prepared).recipe.simulated


class Joined(nn.Module):
    """Two layers whose outputs are concatenated, and so share a range."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), self.right(x)], 1))


def test_of_values_that_share_a_range_the_fewest_bits_decide() -> None:
    prepared = trained("fx", Scheme(overrides={"right": {"activation_bits": 4}}), Joined())
    found = {p.layer: p.fq for p in find_places(prepared) if p.what == "activation" and p.kind != "input"}
    assert found["left"] is found["right"]
    assert found["left"].quant_max == 15


def test_the_grids_of_an_own_quantizer_get_coarser() -> None:
    scheme = Scheme(overrides={"blocks.0.*": {"weight_bits": 4}, "stem": {"weight_granularity": "per_tensor"}})
    prepared = trained("pt2e", scheme, backend=f"{OwnQuantizer.__module__}.OwnQuantizer")
    before = trained("pt2e", Scheme(), backend=f"{OwnQuantizer.__module__}.OwnQuantizer")
    largest = grids(before, "weight")
    assert grids(prepared, "weight") == largest | {"blocks.0.conv": 7}
    fq = {p.layer: p.fq for p in find_places(prepared) if p.what == "weight"}
    assert not fq["stem.0"].per_channel
    assert min(check.sqnr_db for check in convert(prepared, Example((X,))).checks) > X86_LEAST_DB


GROUPS = {"weight_bits": 4, "weight_granularity": "per_group", "weight_group_size": 32}


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
@pytest.mark.parametrize("trains", [False, True])
def test_weight_only_layers_have_grids_of_their_own(mode: str, trains: bool, tmp_path: Path) -> None:
    scheme = Scheme(overrides={"blocks.*": GROUPS, "head": {"weight_bits": 3}, "stem": "float"})
    recipe = Recipe(mode, "x86", scheme, kind="weight_only", trained=trains)
    if trains:
        prepared = trained(mode, scheme, kind="weight_only", trained=True)
        made = convert(prepared, Example((X,)))
    else:
        made = quantize(Blocks(), Example((X,)), recipe)
    whole = quantize(Blocks(), Example((X,)), Recipe(mode, "x86", kind="weight_only"))
    assert len(artifact_bytes(made)) < 0.7 * len(artifact_bytes(whole))
    assert [row.quantized for row in made.coverage] == [False, True, True, True]
    made.save(tmp_path / "model.int8")
    loaded = load_quantized(tmp_path / "model.int8", network=Blocks() if mode == "eager" else None)
    assert torch.equal(loaded(X), made(X))


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_dynamic_layers_have_grids_of_their_own(mode: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(4, 64)
    scheme = Scheme(overrides={"2": {"weight_bits": 4}, "4": "float"})
    made = quantize(network, Example((x,)), Recipe(mode, "x86", scheme, kind="dynamic"))
    assert [row.quantized for row in made.coverage] == [True, True, False]
    assert sorted(int(weight.abs().max()) for weight in integers_of(made)) == [7, 127]
    made.save(tmp_path / "model.int8")
    loaded = load_quantized(tmp_path / "model.int8", network=network if mode == "eager" else None)
    assert torch.equal(loaded(x), made(x))


class Words(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_tables_of_static_networks_have_bits_of_their_own(mode: str, tmp_path: Path) -> None:
    words = torch.randint(0, 50, (4, 6))
    recipe = Recipe(mode, "x86", Scheme(overrides={"lit.net.table": {"weight_bits": 4}}), kind="static")
    prepared = mode_for(recipe).prepare(Words(), Example((words,)), recipe, prefix="lit.net")
    prepared(words)
    example = Example((words,))
    made = QuantizedNetwork(mode_for(recipe).convert(cpu_copy(prepared), example), recipe, example)
    assert all(row.quantized for row in made.coverage if row.what == "layer")
    made.save(tmp_path / "model.int8")
    loaded = load_quantized(tmp_path / "model.int8", network=Words() if mode == "eager" else None)
    assert torch.equal(loaded(words), made(words))
    with torch.no_grad():
        torch.testing.assert_close(made(words), cpu_copy(prepared)(words), rtol=0, atol=1e-5)


def test_a_pattern_without_a_layer_is_refused_before_anything_is_prepared() -> None:
    scheme = Scheme(overrides={"block.0": {"weight_bits": 4}})
    with pytest.raises(ConfigurationError, match=r"Did you mean 'blocks\.0"):
        prepare(Blocks(), Example((X,)), Recipe("fx", "x86", scheme))
    with pytest.raises(ConfigurationError, match=r"Did you mean 'blocks\.0"):
        quantize(Blocks(), Example((X,)), Recipe("fx", "x86", scheme, kind="weight_only"))
