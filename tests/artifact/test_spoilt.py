"""Accidentally damaged files: an error, or results as before."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qat_lightning.artifact import artifact_bytes, load_quantized
from qat_lightning.errors import ArtifactError
from tests.artifact.making import assert_same_network, images, quantize, read, write
from tests.stress.spoiling import members, packed, spoil
from tests.support.networks import Plain


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


@pytest.fixture(scope="module")
def good() -> dict[str, tuple[bytes, nn.Module]]:
    made = {mode: quantize(mode, "x86", Plain()) for mode in ("eager", "fx", "pt2e")}
    return {mode: (artifact_bytes(network), network) for mode, network in made.items()}


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_a_spoilt_file_is_refused_or_gives_the_network_that_was_saved(
    good: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    data, network = good[mode]
    loaded = []
    for seed in range(120):
        spoilt, what = spoil(data, seed)
        (tmp_path / "net.int8").write_bytes(spoilt)
        try:
            found = load_quantized(tmp_path / "net.int8", network=Plain() if mode == "eager" else None)
        except ArtifactError:
            continue
        assert_same_network(found, network, images)
        loaded.append(what)
    # Times and versions of zip's are in no digest; nearly all else is.
    assert len(loaded) < 20, loaded


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_a_file_spoilt_on_purpose_ends_in_no_error_but_ours(good: dict[str, Any], mode: str, tmp_path: Path) -> None:
    refused = 0
    for seed in range(120):
        spoilt, _ = spoil(good[mode][0], seed, whole_again=True)
        (tmp_path / "net.int8").write_bytes(spoilt)
        try:
            load_quantized(tmp_path / "net.int8", network=Plain() if mode == "eager" else None)
        except ArtifactError:
            refused += 1
    assert refused > 60


def test_a_changed_number_is_noticed_and_an_old_file_has_no_digest(good: dict[str, Any], tmp_path: Path) -> None:
    data, network = good["fx"]
    description, tensors = members(data)
    description["checks"][0][2] = 99.0
    (tmp_path / "net.int8").write_bytes(packed(description, tensors))
    with pytest.raises(ArtifactError, match="changed after it was written"):
        load_quantized(tmp_path / "net.int8")
    del description["digest"]
    (tmp_path / "net.int8").write_bytes(packed(description, tensors))
    assert_same_network(load_quantized(tmp_path / "net.int8"), network, images)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("scale", {"float": "nan"}, "scale that is negative, infinite or NaN"),
        ("scale", {"float": "inf"}, "scale that is negative, infinite or NaN"),
        ("scale", -0.1, "scale that is negative, infinite or NaN"),
        ("zero_point", 256, "zero point outside of their range"),
        ("zero_point", -1, "zero point outside of their range"),
    ],
)
def test_a_layer_with_an_impossible_grid(
    good: dict[str, Any], name: str, value: Any, says: str, tmp_path: Path
) -> None:
    (tmp_path / "net.int8").write_bytes(good["fx"][0])
    description, tensors = read(tmp_path / "net.int8")
    description["network"]["used"]["head"]["module"]["packed"]["numbers"][name] = value
    write(tmp_path / "net.int8", description, tensors)
    with pytest.raises(ArtifactError, match=says):
        load_quantized(tmp_path / "net.int8")


@pytest.mark.parametrize("content", [float("nan"), float("inf"), -1.0])
def test_weights_with_an_impossible_grid(good: dict[str, Any], content: float, tmp_path: Path) -> None:
    description, tensors = members(good["fx"][0])
    weight = description["network"]["used"]["conv"]["module"]["packed"]["weight"]["quantized"]
    entry = description["tensors"][weight["scales"]]
    scales = torch.full(entry["shape"], content, dtype=getattr(torch, entry["dtype"])).numpy().tobytes()
    spoilt = tensors[: entry["start"]] + scales + tensors[entry["start"] + len(scales) :]
    write(tmp_path / "net.int8", description, spoilt)
    with pytest.raises(ArtifactError, match="scale that is negative, infinite or NaN"):
        load_quantized(tmp_path / "net.int8")


def test_a_description_that_unpacks_to_more_than_any_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_lightning.artifact.read._LARGEST_DESCRIPTION", 1_000_000)
    with zipfile.ZipFile(tmp_path / "net.int8", "w") as archive:
        archive.writestr("network.json", b" " * 2_000_000, zipfile.ZIP_DEFLATED)
        archive.writestr("tensors.bin", b"")
    with pytest.raises(ArtifactError, match="would take 2 MB, and none takes more than 1 MB"):
        load_quantized(tmp_path / "net.int8")


def test_a_file_that_says_it_is_encrypted(good: dict[str, Any], tmp_path: Path) -> None:
    data = bytearray(good["fx"][0])
    for start in (data.find(b"PK\x01\x02") + 8, data.find(b"PK\x03\x04") + 6):
        data[start] |= 1
    assert zipfile.ZipFile(io.BytesIO(bytes(data))).infolist()[0].flag_bits & 1
    (tmp_path / "net.int8").write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged"):
        load_quantized(tmp_path / "net.int8")


def test_a_recipe_that_is_not_possible_is_the_fault_of_the_file(good: dict[str, Any], tmp_path: Path) -> None:
    description, tensors = members(good["fx"][0])
    description["recipe"]["scheme"]["weight_bits"] = 99
    write(tmp_path / "net.int8", description, tensors)
    with pytest.raises(ArtifactError, match=r"its recipe is invalid. scheme.weight_bits=99"):
        load_quantized(tmp_path / "net.int8")
