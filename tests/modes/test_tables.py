"""Embeddings in static networks: fake-quantized tables that train, and integers with the same values."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.artifact.write import artifact_size_mb
from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.layers.integer.weight_only import WeightOnlyEmbedding
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.places import find_places
from qat_lightning.modes.prepared import cpu_copy, set_phase
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import FAMILIES, Recipe
from qat_lightning.settings.scheme import Scheme

MODES = ("fx", "eager")
IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [11, 6, 1, 7]])


class Words(nn.Module):
    """A table, one of positions, and a head that may be tied to the first."""

    def __init__(self, tied: bool = True, **arguments: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8, padding_idx=0, **arguments)
        self.positions = nn.Embedding(4, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions(torch.arange(4))
        y: Tensor = self.head(torch.relu(self.inner(x)))
        return y


class Bags(nn.Module):
    """Two bags."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.EmbeddingBag(12, 8, mode="mean", padding_idx=0)
        self.most = nn.EmbeddingBag(12, 8, mode="max")
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.mean(ids) + self.most(ids))
        return y


class Encoders(nn.Module):
    """One table under several names, called twice, and another with its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(12, 8)
        self.encoder = nn.ModuleDict({"words": self.shared, "inner": nn.Linear(8, 8)})
        self.decoder = nn.ModuleDict({"words": nn.Embedding(12, 8), "inner": nn.Linear(8, 8)})
        self.decoder["words"].weight = self.shared.weight
        self.head = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.encoder["inner"](self.shared(ids)))
        y = torch.relu(self.decoder["inner"](self.decoder["words"](ids.flip(1)) + self.shared(ids.flip(0))))
        z: Tensor = self.head(x + y)
        return z


CASES = {
    "words": (Words, {"words", "positions"}),
    "bags": (Bags, {"mean", "most"}),
    "encoders": (Encoders, {"shared", "decoder.words"}),
}


def trained(network: nn.Module, recipe: Recipe, steps: int = 3) -> nn.Module:
    """A prepared network after some steps."""
    prepared = get_mode(recipe.mode).prepare(network, Example((IDS,)), recipe).train()
    if recipe.kind == "static":
        calibrate(prepared, [Example((IDS,))])
        return prepared
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        prepared(IDS).square().mean().backward()
        optimizer.step()
    return prepared


def converted(prepared: nn.Module, mode: str) -> Converted:
    return get_mode(mode).convert(cpu_copy(prepared), Example((IDS,)))


def as_trained(prepared: nn.Module, name: str) -> Tensor:
    """A fake-quantized table."""
    table: Any = cpu_copy(prepared).get_submodule(name)
    rounded: Tensor = table.weight_fake_quant(table.weight)
    return rounded


def rows(result: Converted) -> dict[str, tuple[bool, str]]:
    return {row.name: (row.quantized, row.reason) for row in result.coverage}


BACKENDS = [(mode, "x86", kind, case) for mode in MODES for kind in ("qat", "static") for case in CASES]
BACKENDS += [(mode, backend, "qat", "words") for mode in MODES for backend in ("onednn", "fbgemm", "qnnpack")]


@pytest.mark.parametrize(("mode", "backend", "kind", "case"), BACKENDS)
def test_tables_become_integers_that_yield_what_training_had(
    mode: str, backend: str, kind: Any, case: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make, names = CASES[case]
    network, recipe = make(), Recipe(mode, backend, kind=kind)
    code, before = copy.deepcopy(network), set(network.state_dict())
    prepared = trained(network, recipe)
    assert set(prepared.state_dict()) >= before
    assert {place.layer for place in find_places(prepared) if place.what == "weight"} >= names
    result = converted(prepared, mode)
    assert all(quantized for quantized, _ in rows(result).values()), rows(result)
    assert {row.name for row in get_mode(mode).coverage(cpu_copy(prepared), Example((IDS,))) if not row.reason} >= names
    for name in names:
        table = result.network.get_submodule(name)
        assert isinstance(table, WeightOnlyEmbedding)
        assert torch.equal(table.weight, as_trained(prepared, name))
    checks = {check.name: check for check in result.checks}
    assert all(checks[name].sqnr_db == float("inf") and "WeightOnlyEmbedding" in checks[name].op for name in names)
    quantized = QuantizedNetwork(result, recipe, Example((IDS,)))
    quantized.save(tmp_path / "network.int8")
    loaded = load_quantized(tmp_path / "network.int8", network=code)
    assert torch.equal(loaded(IDS), quantized(IDS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["words", "encoders"])
def test_the_file_is_smaller_and_tied_tables_are_in_it_once(mode: str, case: str) -> None:
    torch.manual_seed(0)
    make, _ = CASES[case]
    recipe = Recipe(mode, "x86")
    sizes = []
    for families in (FAMILIES, tuple(name for name in FAMILIES if name != "tables")):
        chosen = replace(recipe, families=families)
        result = converted(trained(make(), chosen), mode)
        buffer = io.BytesIO()
        torch.save(result.network.state_dict(), buffer)
        tensors = {t.data_ptr(): t for t in result.network.state_dict().values() if isinstance(t, Tensor)}
        tables = [t for t in tensors.values() if t.dtype is torch.int8 and t.shape == (12, 8)]
        assert len(tables) == (len(families) == len(FAMILIES))
        sizes.append(artifact_size_mb(QuantizedNetwork(result, chosen, Example((IDS,)))))
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("network", "exclude", "float_tables"),
    [
        (lambda: Words(), ("words",), {"words": "excluded"}),
        (lambda: Words(), ("head",), {"words": "its weight is shared with 'head', which stays float"}),
        (lambda: Words(tied=False), ("head",), {}),
        (
            lambda: Words(tied=False, max_norm=1.0),
            (),
            {"words": "Embedding with max_norm rescales its rows in every call"},
        ),
        (
            lambda: Words(tied=False, sparse=True),
            (),
            {"words": "Embedding with sparse=True: quantizing its table would make the gradients dense"},
        ),
        (lambda: Encoders(), ("decoder.words",), {"decoder.words": "excluded", "shared": "its weight is shared with"}),
    ],
    ids=["excluded", "tied to a float head", "not tied", "max_norm", "sparse", "tied to an excluded table"],
)
def test_what_stays_float_says_why(
    mode: str, network: Any, exclude: tuple[str, ...], float_tables: dict[str, str]
) -> None:
    torch.manual_seed(0)
    prepared = get_mode(mode).prepare(network(), Example((IDS,)), Recipe(mode, "x86", exclude=exclude))
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    prepared.train()(IDS).square().mean().backward()
    result = converted(prepared, mode)
    found = {name: reason for name, (quantized, reason) in rows(result).items() if not quantized and name != "head"}
    assert found.keys() == float_tables.keys()
    assert all(found[name].startswith(reason) for name, reason in float_tables.items()), found
    said = get_mode(mode).coverage(cpu_copy(prepared), Example((IDS,)))
    assert {(row.name, row.reason) for row in said if row.what == "layer"} == {
        (row.name, row.reason) for row in result.coverage
    }


class Read(nn.Module):
    """A table whose weight ``forward`` also reads."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.words, self.inner, self.read = nn.Embedding(12, 8), nn.Linear(8, 8), read

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.read(torch.relu(self.inner(self.words(ids))), self.words.weight, ids)
        return y


READS = {
    "linear": lambda x, weight, ids: F.linear(x, weight),
    "product": lambda x, weight, ids: x @ weight.t(),
    "looked up": lambda x, weight, ids: x + F.embedding(ids, weight),
    "mean": lambda x, weight, ids: x + weight.mean(0),
    "returned": lambda x, weight, ids: (x, weight)[0] + weight[0],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("read", READS)
def test_a_table_that_forward_reads_itself_is_what_it_was_in_training(mode: str, read: str) -> None:
    torch.manual_seed(0)
    prepared = trained(Read(READS[read]), Recipe(mode, "x86"))
    result = converted(prepared, mode)
    # In fx by an int8 kernel, or as another call of the layer: no float table is kept beside it.
    packed = mode == "fx" and read in ("linear", "product", "looked up")
    assert rows(result)["words"] == (packed, "" if packed else "forward reads its weight directly, besides calling it")
    assert result.whole is not None
    assert result.whole.sqnr_db > 50


class Scaled(nn.Embedding):
    """Rows times a buffer."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.register_buffer("factor", torch.tensor(3.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor


class Shifted(nn.Embedding):
    """Looks up other rows than requested, and adds a parameter."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding((input + 1) % 12, self.weight) + self.bias


@pytest.mark.parametrize("cls", [Scaled, Shifted])
def test_embeddings_of_classes_of_their_own_have_integer_tables_in_fx(cls: type[nn.Embedding], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, recipe = Words(), Recipe("fx", "x86")
    network.words = cls(12, 8, padding_idx=0)
    network.head.weight = network.words.weight
    names = [name for name, _ in network.named_parameters()]
    keys = set(network.state_dict())
    prepared = trained(network, recipe)
    assert [name for name, _ in prepared.named_parameters()] == names
    assert set(prepared.state_dict()) >= keys
    result = converted(prepared, "fx")
    assert all(quantized for quantized, _ in rows(result).values()), rows(result)
    assert isinstance(result.network.get_submodule("words"), WeightOnlyEmbedding)
    assert result.whole is not None
    assert result.whole.sqnr_db > 50
    quantized = QuantizedNetwork(result, recipe, Example((IDS,)))
    quantized.save(tmp_path / "network.int8")
    assert torch.equal(load_quantized(tmp_path / "network.int8")(IDS), quantized(IDS))


def test_rows_of_a_table_with_max_norm_that_are_looked_up_by_a_function_stay_as_they_are() -> None:
    torch.manual_seed(0)
    network = Read(READS["looked up"])
    network.words = nn.Embedding(12, 8, max_norm=0.5)
    result = converted(trained(network, Recipe("fx", "x86")), "fx")
    assert not rows(result)["words"][0]


@pytest.mark.parametrize("mode", MODES)
def test_rounding_passes_gradients_to_the_rows_that_are_looked_up_but_for_the_padding(mode: str) -> None:
    torch.manual_seed(0)
    network = Words(tied=False)
    prepared = get_mode(mode).prepare(copy.deepcopy(network), Example((IDS,)), Recipe(mode, "x86")).train()
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    prepared(IDS).square().mean().backward()
    gradient = prepared.get_parameter("words.weight").grad
    assert gradient is not None
    used = gradient.abs().sum(1) > 0
    assert used.tolist() == [row in (1, 2, 3, 4, 5, 6, 7, 11) for row in range(12)]
    assert not prepared.get_submodule("words")(torch.tensor([0])).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weight_bits=4),
        Scheme(weight_granularity="per_tensor"),
        Scheme(learned_step="lsq"),
        Scheme(weight_observer="mse"),
    ],
    ids=["4 bits", "per tensor", "lsq", "mse"],
)
def test_tables_are_on_the_grid_of_the_scheme(mode: str, scheme: Scheme, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Words(tied=False)
    code = copy.deepcopy(network)
    recipe = Recipe(mode, "x86", scheme=scheme)
    prepared = trained(network, recipe)
    result = converted(prepared, mode)
    table = result.network.get_submodule("words")
    assert torch.equal(table.weight, as_trained(prepared, "words"))
    assert table.integers.dtype is (torch.uint8 if scheme.weight_bits == 4 else torch.int8)
    quantized = QuantizedNetwork(result, recipe, Example((IDS,)))
    quantized.save(tmp_path / "network.int8")
    assert torch.equal(load_quantized(tmp_path / "network.int8", network=code)(IDS), quantized(IDS))


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_an_earlier_release_leaves_tables_float(mode: str) -> None:
    torch.manual_seed(0)
    earlier = replace(Recipe(mode, "x86"), families=tuple(name for name in FAMILIES if name != "tables"))
    prepared = get_mode(mode).prepare(Words(), Example((IDS,)), earlier)
    found = {row.name: row for row in get_mode(mode).coverage(prepared, Example((IDS,)))}
    assert found["words"].reason == f"Embedding is not quantized in mode={mode!r}"
    assert type(prepared.get_submodule("words")) is nn.Embedding


@pytest.mark.parametrize("mode", MODES)
def test_a_table_can_be_left_float_later(mode: str) -> None:
    torch.manual_seed(0)
    prepared = trained(Words(tied=False), Recipe(mode, "x86"))
    assert "words" in get_mode(mode).parts(prepared)
    assert leave_float(prepared, {"words": "it was tried"}, Example((IDS,))) == ["words"]
    assert "words" not in get_mode(mode).parts(prepared)
    result = converted(prepared, mode)
    assert rows(result)["words"] == (False, "it was tried")
    assert rows(result)["positions"] == (True, "")
    weight = cpu_copy(prepared).get_parameter("words.weight")
    assert torch.equal(result.network.get_submodule("words")(IDS), F.embedding(IDS, weight))


@pytest.mark.parametrize("mode", MODES)
def test_a_network_is_prepared_again(mode: str) -> None:
    """The state of an earlier preparation of its embeddings is discarded."""
    network = Words(tied=False)
    get_mode("fx").prepare(network, Example((IDS,)), Recipe("fx", "x86"))
    again = get_mode(mode).prepare(network, Example((IDS,)), Recipe(mode, "x86", exclude=("words",)))
    assert type(again.get_submodule("words")) is nn.Embedding


@pytest.mark.parametrize("kind", ["qat", "static"])
@pytest.mark.parametrize("mode", MODES)
def test_tables_may_be_all_that_is_quantized(mode: str, kind: Any) -> None:
    torch.manual_seed(0)
    recipe = Recipe(mode, "x86", kind=kind, include=("words",))
    result = converted(trained(Words(tied=False), recipe), mode)
    assert {name for name, (quantized, _) in rows(result).items() if quantized} == {"words"}
    assert result.whole is not None
    assert result.whole.sqnr_db == float("inf")


@pytest.mark.parametrize("mode", MODES)
def test_a_network_in_which_no_table_can_be_quantized_is_refused_in_words(mode: str) -> None:
    with pytest.raises(NetworkError, match="nothing to quantize"):
        get_mode(mode).prepare(Words(), Example((IDS,)), Recipe(mode, "x86", include=("words",)))
