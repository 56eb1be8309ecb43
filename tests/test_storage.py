"""Files in remote storage: written atomically, and read like local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile
from torch import nn

from qat_lightning import QuantizedModelExport, load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.errors import ArtifactError, ConfigurationError, MissingExtraError
from qat_lightning.export.run import export_quantized, open_artifact
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe
from qat_lightning.storage import (
    copied_here,
    is_file,
    is_folder,
    name_of,
    open_to_read,
    place,
    require_folder,
    require_storage,
)
from qat_lightning.whole_files import move_whole, write_whole
from tests.support.exactness import SEVEN_BITS

CALL = Example((torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),))
RECIPE = Recipe("fx", "x86", SEVEN_BITS)  # which every runtime multiplies exactly on every x86 CPU


@pytest.fixture
def absent() -> str:
    """A protocol whose package is not installed."""
    fsspec.register_implementation(
        "absent", "no_such_package.FileSystem", clobber=True, errtxt="Install no_such_package to access Absent"
    )
    return "absent://bucket/model.int8"


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is lost in the middle of every file."""

    class Lost(Exception):
        """An exception like boto's, which derives from none of Python's own OSErrors."""

    def write(self: Any, data: Any) -> int:
        half = super(MemoryFile, self).write(bytes(data)[: len(data) // 2])
        raise Lost(f"after {half} bytes")

    monkeypatch.setattr(MemoryFile, "write", write, raising=False)


def read_bytes(path: Any) -> bytes:
    with open_to_read(path) as file:
        return file.read()


def prepared() -> nn.Module:
    torch.manual_seed(0)
    network = get_mode("fx").prepare(nn.Sequential(nn.Linear(8, 4)), CALL, RECIPE)
    network.train()(*CALL.args)
    return network.eval()


def int8() -> QuantizedNetwork:
    network = prepared()
    return QuantizedNetwork(get_mode("fx").convert(network, CALL), RECIPE, CALL)


def test_a_network_is_saved_and_loaded(bucket: str) -> None:
    network = int8()
    network.save(f"{bucket}/runs/model.int8")
    loaded = load_quantized(f"{bucket}/runs/model.int8")
    assert torch.equal(network(*CALL.args), loaded(*CALL.args))


def test_what_was_there_stays_when_the_connection_is_lost(bucket: str, breaks: None) -> None:
    fsspec.filesystem("memory").pipe("/bucket/model.int8", b"before")
    with pytest.raises(ArtifactError, match=r"memory://bucket/model.int8 cannot be written.*Lost: after \d+ bytes"):
        int8().save(f"{bucket}/model.int8")
    assert read_bytes(f"{bucket}/model.int8") == b"before"
    assert fsspec.filesystem("memory").find("/bucket") == ["/bucket/model.int8"]


def test_a_new_file_is_not_there_by_half(bucket: str, breaks: None) -> None:
    with pytest.raises(OSError, match="Lost"):
        write_whole(f"{bucket}/export.json", b"0123456789")
    assert not is_file(f"{bucket}/export.json")


def test_the_files_of_a_format_are_there_together_or_not_at_all(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model.bin", "model.xml"):
        (tmp_path / name).write_text("whole")
    written = MemoryFile.write

    def write(self: Any, data: Any) -> int:
        if self.path.endswith("model.xml"):
            raise ConnectionError("lost")
        return written(self, data)

    monkeypatch.setattr(MemoryFile, "write", write, raising=False)
    with pytest.raises(ConnectionError):
        move_whole([tmp_path / "model.bin", tmp_path / "model.xml"], bucket)
    assert not fsspec.filesystem("memory").find("/bucket")


def test_a_tree_takes_the_place_of_the_one_before_and_comes_back(bucket: str, tmp_path: Path) -> None:
    tree = tmp_path / "model.mlpackage"
    for name in ("Data/weights.bin", "Data/deep/program.mil", "Manifest.json"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    write_whole(f"{bucket}/run/model.mlpackage/Data/old.bin", b"old")
    (there,) = move_whole([tree], f"{bucket}/run/")
    assert there == f"{bucket}/run/model.mlpackage"
    assert is_folder(there)
    with copied_here([there]) as (here,):
        assert here.name == tree.name
        files = {file.relative_to(here).as_posix(): file.read_text() for file in here.rglob("*") if file.is_file()}
    assert files == {name: name for name in ("Data/weights.bin", "Data/deep/program.mil", "Manifest.json")}


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["torchscript", "pt2", "exported_program", "onnx", "openvino"])
def test_every_format_goes_to_other_storage_and_runs_from_there(bucket: str, format_name: str) -> None:
    network = int8()
    (result,) = export_quantized(network, f"{bucket}/export", [format_name], batches=[CALL])
    assert result.passed, result.error
    assert all(is_file(str(file)) for file in result.files)
    assert result.size_mb == pytest.approx(sum(len(read_bytes(file)) for file in result.files) / 1e6)
    assert is_file(f"{bucket}/export/export.json")
    with open_artifact(result) as loaded:
        assert torch.allclose(loaded(*CALL.args), network(*CALL.args), atol=0.05)


@pytest.mark.slow
def test_an_upload_that_fails_is_the_result_of_its_format(bucket: str, breaks: None) -> None:
    with pytest.warns(UserWarning, match="results of the export could not be written.*Lost"):
        (result,) = export_quantized(prepared(), f"{bucket}/export", ["torchscript"], example=CALL)
    assert not result.passed
    assert "Lost" in result.error
    assert not fsspec.filesystem("memory").find("/bucket")


def test_a_missing_file_is_named(bucket: str) -> None:
    with pytest.raises(ArtifactError, match=r"memory://bucket/none\.int8 does not exist"):
        load_quantized(f"{bucket}/none.int8")


def test_what_is_no_network_is_told_from_one_that_is_damaged(bucket: str) -> None:
    write_whole(f"{bucket}/text.int8", b"text")
    with pytest.raises(ArtifactError, match="is not an int8 network"):
        load_quantized(f"{bucket}/text.int8")
    write_whole(f"{bucket}/cut.int8", b"PK\x03\x04")
    with pytest.raises(ArtifactError, match="is damaged"):
        load_quantized(f"{bucket}/cut.int8")


def test_a_folder_is_no_place_for_a_file(bucket: str) -> None:
    write_whole(f"{bucket}/run/other", b"")
    with pytest.raises(ArtifactError, match="is not a file"):
        int8().save(f"{bucket}/run")


def test_a_missing_package_is_named_before_anything_is_done(absent: str) -> None:
    for do in (
        lambda: require_storage(absent),
        lambda: load_quantized(absent),
        lambda: int8().save(absent),
        lambda: export_quantized(nn.Identity(), absent),
        lambda: require_storage(f"simplecache::{absent}"),
    ):
        with pytest.raises(MissingExtraError, match="Install no_such_package"):
            do()


def test_an_unknown_protocol_and_a_url_that_was_made_a_path_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="does not know the protocol 'quatsch'"):
        require_storage("quatsch://bucket/model.int8")
    with pytest.raises(ConfigurationError, match="as a str"):
        place(Path("s3://bucket/model.int8"))


def test_a_file_url_is_a_path_of_this_machine(tmp_path: Path) -> None:
    network = int8()
    network.save(f"file://{tmp_path}/model.int8")
    assert (tmp_path / "model.int8").is_file()
    assert torch.equal(load_quantized(f"file://{tmp_path}/model.int8")(*CALL.args), network(*CALL.args))
    assert name_of(place(f"file://{tmp_path}/model.int8")) == "model.int8"


def test_a_folder_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_folder(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigurationError, match=f"because {tmp_path / 'file'} is a file"):
            require_folder(path)
        with pytest.raises(ConfigurationError, match="is a file"):
            QuantizedModelExport(dirpath=str(path))
        with pytest.raises(ConfigurationError, match="is a file"):
            export_quantized(nn.Linear(2, 2), path, ["torchscript"])
    for no_path in (3, ["x"]):
        with pytest.raises(ConfigurationError, match="is not a path: give a str or a Path"):
            QuantizedModelExport(dirpath=no_path)  # type: ignore[arg-type]
