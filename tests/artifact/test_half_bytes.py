"""Weights of up to 4 bits take half a byte in files, also in static networks, and are loaded bit-equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qat_lightning.artifact import artifact_bytes, artifact_size_mb, load_quantized, save_quantized, tensors
from qat_lightning.artifact.tensors import TensorReader, TensorWriter
from qat_lightning.errors import ArtifactError
from qat_lightning.settings.scheme import Scheme
from tests.artifact.making import assert_same_network, images, quantize, read, write

MODES = ("eager", "fx", "pt2e", "parts")


class Wide(nn.Module):
    """Weights much larger than everything else in the file: 27,648 + 73,728 + 2,560 values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128 * 36, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


WEIGHTS = sum(parameter.numel() for name, parameter in Wide().named_parameters() if name.endswith("weight"))


@pytest.fixture(autouse=True)
def _decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    torch.manual_seed(0)


def load(path: Path, mode: str) -> nn.Module:
    return load_quantized(path, network=Wide() if mode in ("eager", "parts") else None)


@pytest.mark.parametrize("mode", MODES)
def test_static_weights_of_4_bits_take_half_a_byte_and_load_bit_equal(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = quantize(mode, "x86", Wide())
    saved = quantize(mode, "x86", Wide(), scheme=Scheme(weight_bits=4))
    save_quantized(saved, tmp_path / "net.int8")
    size = (tmp_path / "net.int8").stat().st_size
    assert artifact_size_mb(saved) == size / 1e6
    assert len(artifact_bytes(wide)) - size == pytest.approx(WEIGHTS / 2, rel=0.01)
    assert read(tmp_path / "net.int8")[0]["format"] == 2
    loaded = load(tmp_path / "net.int8", mode)
    assert_same_network(saved, loaded, images)
    assert artifact_bytes(loaded) == (tmp_path / "net.int8").read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_files_of_a_value_a_byte_load(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = quantize(mode, "x86", Wide(), scheme=Scheme(weight_bits=4))
    with monkeypatch.context() as earlier:
        earlier.setattr(tensors, "_fits_half_bytes", lambda flat: False)
        save_quantized(saved, tmp_path / "net.int8")
    assert read(tmp_path / "net.int8")[0]["format"] == 1
    assert_same_network(saved, load(tmp_path / "net.int8", mode), images)


def test_a_network_of_8_bits_makes_a_file_that_every_release_reads(tmp_path: Path) -> None:
    save_quantized(quantize("fx", "x86", Wide()), tmp_path / "net.int8")
    assert read(tmp_path / "net.int8")[0]["format"] == 1


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 2**31 - 1), st.booleans(), st.sampled_from([7, 8, 127]))
def test_integers_come_back_with_their_memory_order(shape: list[int], seed: int, flipped: bool, largest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(-largest, largest + 1, shape, generator=generator).to(torch.int8)
    value = value.permute(*reversed(range(value.dim()))) if flipped else value
    writer = TensorWriter()
    ((tag, content),) = writer.encode(value).items()
    found = TensorReader(writer.table, bytes(writer.data)).decode(tag, content)
    assert found.dtype is torch.int8
    assert torch.equal(found, value)
    expected = value.numel()
    if value.numel() > 1 and int(value.min()) >= -8 and int(value.max()) <= 7:
        expected = -(-value.numel() // 2)
    assert len(writer.data) == expected


def _of_another_dtype(entry: dict) -> None:
    entry["dtype"] = "uint8"


def _said_otherwise(entry: dict) -> None:
    entry["packed"] = "yes"


def _past_the_end(entry: dict) -> None:
    entry["shape"] = [10_000, *entry["shape"][1:]]


@pytest.mark.parametrize("spoil", [_of_another_dtype, _said_otherwise, _past_the_end])
def test_spoilt_half_bytes_are_refused(spoil: Callable[[dict], None], tmp_path: Path) -> None:
    path = tmp_path / "net.int8"
    save_quantized(quantize("fx", "x86", Wide(), scheme=Scheme(weight_bits=4)), path)
    description, data = read(path)
    spoil(next(entry for entry in description["tensors"] if entry.get("packed")))
    write(path, description, data)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_quantized(path)
