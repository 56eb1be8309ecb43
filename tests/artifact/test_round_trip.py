"""Saved and loaded networks are bit-equal."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.artifact import artifact_size_mb, load_quantized, save_quantized
from qat_lightning.errors import ArtifactError
from qat_lightning.settings.backends import pairs
from tests.artifact.making import (
    assert_equal,
    assert_same_network,
    batch_of,
    case_named,
    images,
    quantize,
)
from tests.artifact.networks import Convolutions, FunctionalWeights, Large, Structures, WithOwnBlock, Zoo
from tests.support.exactness import SEVEN_BITS
from tests.support.networks import CASES
from tests.support.targets import missing

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    torch.manual_seed(0)


TABLE = [
    pytest.param(mode, backend, case, id=f"{mode}-{backend}-{case.name}")
    for mode, backend in pairs()
    for case in CASES
    if mode in case.modes and (backend == "x86" or case.name in ("depthwise", "several_inputs"))
]


@pytest.mark.parametrize(("mode", "backend", "case"), TABLE)
@pytest.mark.slow
def test_loaded_network_is_equal(mode: str, backend: str, case, tmp_path: Path) -> None:
    saved = quantize(mode, backend, case.network(), batch_of(case))
    save_quantized(saved, tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=case.network() if mode == "eager" else None)
    assert_same_network(saved, loaded, batch_of(case))
    assert type(loaded.network) is type(saved.network)


@pytest.mark.slow
def test_fresh_process_without_trainer_and_data(tmp_path: Path) -> None:
    case = case_named("depthwise")
    here = [(mode, backend) for mode, backend in pairs() if not missing(backend)]
    for mode, backend in here:
        saved = quantize(mode, backend, case.network(), batch_of(case))
        save_quantized(saved, tmp_path / f"{mode}-{backend}.int8")
        (x,), _ = batch_of(case)(5)
        torch.save([x, saved(x)], tmp_path / f"{mode}-{backend}.pt")
    code = """
        import sys, torch
        from pathlib import Path
        from qat_lightning.artifact import load_quantized
        for path in sorted(Path(sys.argv[1]).glob("*.int8")):
            network = None
            if path.stem.startswith("eager"):
                from tests.support.networks import Depthwise
                network = Depthwise()
            loaded = load_quantized(path, network=network)
            x, expected = torch.load(path.with_suffix(".pt"))
            assert torch.equal(loaded(x), expected), path
            print(path.stem)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "QAT_LIGHTNING_COMPILE": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == sorted(f"{mode}-{backend}" for mode, backend in here)


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_file_is_small_and_has_no_float_weights(mode: str, tmp_path: Path) -> None:
    network = Large()
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    saved = quantize(mode, "x86", network)
    path = tmp_path / "net.int8"
    save_quantized(saved, path)
    assert buffer.tell() > 1e6
    assert buffer.tell() / path.stat().st_size >= 3.5
    assert artifact_size_mb(saved) == path.stat().st_size / 1e6


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_loaded_network_is_an_ordinary_module(mode: str, tmp_path: Path) -> None:
    saved = quantize(mode, "x86", Large())
    save_quantized(saved, tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=Large() if mode == "eager" else None)
    assert_same_network(saved, loaded.train(), images)
    assert_same_network(saved, loaded.eval(), images)
    assert_same_network(saved, copy.deepcopy(loaded), images)
    save_quantized(loaded, tmp_path / "again.int8")
    assert (tmp_path / "again.int8").read_bytes() == (tmp_path / "net.int8").read_bytes()


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_what_is_known_is_kept(mode: str, tmp_path: Path) -> None:
    case = case_named("several_inputs")
    saved = quantize(mode, "x86", case.network(), batch_of(case))
    saved.notes = ["a note"]
    save_quantized(saved, tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=case.network())
    assert loaded.recipe == saved.recipe
    assert loaded.coverage == saved.coverage
    assert str(loaded.checks) == str(saved.checks)
    assert loaded.whole == saved.whole
    assert loaded.notes == ["a note"]
    assert loaded.source == "step 2"
    assert loaded.example.args[0].shape == saved.example.args[0].shape
    assert not loaded.example.args[0].any(), "the data itself is not in the file"
    assert loaded.example.kwargs["table"].shape == saved.example.kwargs["table"].shape
    assert_equal(
        loaded(*saved.example.args, **saved.example.kwargs), saved(*saved.example.args, **saved.example.kwargs)
    )


def _structured(count: int):
    return (torch.randn(count, 3, 8, 8), {"bias": torch.randn(count, 8)}), {}


def _signal(count: int):
    return (torch.randn(count, 3, 4, 8),), {}


@pytest.mark.parametrize(("mode", "backend"), [pair for pair in pairs() if pair[1] in ("x86", "fbgemm")])
def test_every_geometry_of_convolution(mode: str, backend: str, tmp_path: Path) -> None:
    saved = quantize(mode, backend, Convolutions(), _signal)
    save_quantized(saved, tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=Convolutions())
    assert_same_network(saved, loaded, _signal)


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_structures_constants_and_types(mode: str, tmp_path: Path) -> None:
    saved = quantize(mode, "x86", Structures(), _structured)
    save_quantized(saved, tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8")
    assert_same_network(saved, loaded, _structured)
    result = loaded(*_structured(2)[0])
    assert type(result["point"])._fields == ("logits", "hidden"), "a namedtuple, though not of the user's class"
    assert torch.equal(result["point"].hidden, result["pair"][0].float())


def test_layers_without_a_module(tmp_path: Path) -> None:
    saved = quantize("pt2e", "x86", FunctionalWeights())
    save_quantized(saved, tmp_path / "net.int8")
    assert_same_network(saved, load_quantized(tmp_path / "net.int8"), images)


@pytest.mark.slow
def test_layers_that_stay_float(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.zoo = Zoo()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = self.zoo.norms(self.zoo.activations(self.zoo.stem(x)))
            x = self.zoo.pools(self.zoo.transposed(self.zoo.up(x)))
            x = self.zoo.norm(self.zoo.flatten(x).transpose(1, 2))
            x, _ = self.zoo.attention(x, x, x, need_weights=False)
            x = self.zoo.rnn(self.zoo.gru(self.zoo.lstm(x)[0])[0])[0]
            return self.zoo.head(x)

    saved = quantize("fx", "x86", Mixed(), exclude=("zoo",))
    save_quantized(saved, tmp_path / "net.int8")
    assert_same_network(saved, load_quantized(tmp_path / "net.int8"), images)


class Fusable(nn.Module):
    """Layers that fusion merges into one module, quantized or not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 1)
        self.norms = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
        self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.norms(F.relu(self.conv(x)))
        return self.head(F.relu(self.middle(x.mean((2, 3)))))


@pytest.mark.parametrize("exclude", [(), ("stem", "norms"), ("stem", "bn", "conv", "middle")], ids=len)
def test_fused_layers_that_stay_float(exclude: tuple[str, ...], tmp_path: Path) -> None:
    saved = quantize("fx", "x86", Fusable(), exclude=exclude)
    save_quantized(saved, tmp_path / "net.int8")
    assert_same_network(saved, load_quantized(tmp_path / "net.int8"), images)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ELU(0.7),
        nn.LeakyReLU(0.2),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(8)),
    ],
)
@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_layers_on_integers(layer: nn.Module, backend: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), copy.deepcopy(layer), nn.Conv2d(8, 4, 1))
    saved = quantize("fx", backend, network)
    save_quantized(saved, tmp_path / "net.int8")
    assert_same_network(saved, load_quantized(tmp_path / "net.int8"), images)


def test_own_module_comes_from_the_network_given(tmp_path: Path) -> None:
    path = tmp_path / "net.int8"
    saved = quantize("fx", "x86", WithOwnBlock(), exclude=("block",))
    save_quantized(saved, path)
    with pytest.raises(ArtifactError, match=r"'block' of class OwnBlock.*network="):
        load_quantized(path)
    with pytest.raises(ArtifactError, match=r"OwnBlock at 'block', where the network given \(Large\) has nothing"):
        load_quantized(path, network=Large())
    with pytest.raises(ArtifactError, match="has another shape"):
        load_quantized(path, network=WithOwnBlock(width=16))
    given = WithOwnBlock()
    before = copy.deepcopy(given.state_dict())
    assert_same_network(saved, load_quantized(path, network=given), images)
    assert_equal(before, given.state_dict())


def test_eager_needs_its_network(tmp_path: Path) -> None:
    path = tmp_path / "net.int8"
    saved = quantize("eager", "x86", Large())
    save_quantized(saved, path)
    with pytest.raises(ArtifactError, match=r"mode='eager' keeps your Python code.*Large.*network="):
        load_quantized(path)
    with pytest.raises(ArtifactError, match="saved from a Large"):
        load_quantized(path, network=WithOwnBlock())
    wrong = Large()
    wrong.register_buffer("more", torch.zeros(1))
    with pytest.raises(ArtifactError, match=r"other tensors.*more"):
        load_quantized(path, network=wrong)
    given = Large()
    before = copy.deepcopy(given.state_dict())
    load_quantized(path, network=given)
    assert_equal(before, given.state_dict())


def swish(x: Tensor) -> Tensor:
    """Branches on values, so that a trace keeps it as one call."""
    return x * torch.sigmoid(x) if bool(x.isfinite().all()) else x


torch.fx.wrap("swish")


class CallsOwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return swish(self.conv(x))


def test_own_function_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "net.int8"
    saved = quantize("fx", "x86", CallsOwnFunction())
    with pytest.warns(UserWarning, match=r"swish.*trusted=True"):
        save_quantized(saved, path)
    with pytest.raises(ArtifactError, match=r"swish.*trusted=True"):
        load_quantized(path)
    assert_same_network(saved, load_quantized(path, trusted=True), images)


def test_nothing_ordinary_needs_trust(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for mode in ("eager", "fx", "pt2e"):
            save_quantized(quantize(mode, "x86", Large()), tmp_path / mode)


@pytest.mark.slow
def test_loaded_pt2e_network_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")
    case = case_named("residual")
    saved = quantize("pt2e", "x86", case.network(), batch_of(case), scheme=SEVEN_BITS)
    save_quantized(saved, tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8")
    assert_same_network(saved, loaded, batch_of(case))
    assert loaded.network.runs == saved.network.runs == "aotinductor"
