"""Invalid files, and failures while writing."""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_lightning.artifact import artifact_bytes, load_quantized, save_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ArtifactError, ConfigurationError, QuantizationError
from tests.artifact.making import quantize, read, write
from tests.support.networks import Plain


@pytest.fixture(scope="module")
def quantized() -> QuantizedNetwork:
    return quantize("fx", "x86", Plain())


@pytest.fixture
def path(quantized: QuantizedNetwork, tmp_path: Path) -> Path:
    save_quantized(quantized, tmp_path / "net.int8")
    return tmp_path / "net.int8"


def test_artifact_error_is_one_of_ours() -> None:
    assert issubclass(ArtifactError, QuantizationError)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load_quantized(tmp_path / "nothing.int8")


def test_folder(tmp_path: Path, quantized: QuantizedNetwork) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_quantized(tmp_path)
    with pytest.raises(ArtifactError, match="not a file"):
        save_quantized(quantized, tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ArtifactError, match="is damaged"):
        load_quantized(path)


def test_flipped_bytes(path: Path) -> None:
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.compress_size)
    data = bytearray(path.read_bytes())
    header = largest.header_offset
    begin = header + 30 + sum(int.from_bytes(data[header + at : header + at + 2], "little") for at in (26, 28))
    data[begin + largest.compress_size // 2] ^= 0xFF  # in what is read, and not in what fills up the file
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged"):
        load_quantized(path)


@pytest.mark.parametrize("content", [b"", b"accuracy 0.98\n", b"\x80\x02}q\x00."])
def test_something_else(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not an int8 network"):
        load_quantized(path)


def test_another_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ArtifactError, match="is a zip"):
        load_quantized(path)


def test_state_dict(path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ArtifactError, match=r"torch\.save.*state_dict"):
        load_quantized(path)


def test_lightning_checkpoint(path: Path) -> None:
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": {}, "epoch": 0}, path)
    with pytest.raises(ArtifactError, match=r"Lightning checkpoint.*qat\.save"):
        load_quantized(path)


def test_newer_format(path: Path) -> None:
    description, data = read(path)
    # A newer release may write everything else otherwise.
    write(path, {"format": 3, "qat_lightning": "9.9.9"}, data)
    with pytest.raises(ArtifactError, match=r"format 3, written by qat-lightning 9\.9\.9.*pip install -U"):
        load_quantized(path)
    for wrong in (0, "1", None, True, 1.0):
        write(path, {**description, "format": wrong}, data)
        with pytest.raises(ArtifactError, match="no format number"):
            load_quantized(path)


def test_unknown_backend_of_another_release(path: Path) -> None:
    description, data = read(path)
    description["recipe"]["backend"] = "tpu"
    write(path, description, data)
    with pytest.raises(QuantizationError, match="tpu"):
        load_quantized(path)


def test_same_network_makes_same_file(quantized: QuantizedNetwork) -> None:
    assert artifact_bytes(quantized) == artifact_bytes(quantized)


def test_folders_are_made_and_permissions_are_usual(quantized: QuantizedNetwork, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "net.int8"
    save_quantized(quantized, str(target))
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_symbolic_link_is_followed(quantized: QuantizedNetwork, tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_quantized(quantized, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    load_quantized(tmp_path / "real")


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_failed_write_leaves_what_was_there(
    fails: str, quantized: QuantizedNetwork, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), full)
    with pytest.raises(ArtifactError, match=r"No space left on device.*MB"):
        save_quantized(quantized, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_write_leaves_what_was_there(
    quantized: QuantizedNetwork, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_quantized(quantized, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_device_files_are_not_replaced(quantized: QuantizedNetwork) -> None:
    with pytest.raises(ArtifactError, match="not a file"):
        save_quantized(quantized, os.devnull)
    assert not Path(os.devnull).is_file()


def test_a_file_as_folder(quantized: QuantizedNetwork, path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        save_quantized(quantized, path / "inside.int8")


def test_a_class_in_place_of_the_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"network=<class .*Linear'> is not a network: give an instance"):
        load_quantized(tmp_path / "any.int8", network=nn.Linear)  # type: ignore[arg-type]
