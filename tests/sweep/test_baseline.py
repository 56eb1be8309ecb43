"""The shared float run: what changes its key, and what happens to a broken one."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from qat_lightning.errors import ConfigurationError
from qat_lightning.sweep.baseline import Baseline, fingerprint, float_configuration, with_baseline
from tests.configs.conftest import composed  # noqa: F401

Compose = Callable[..., DictConfig]
SHARED = [
    "baseline=shared",
    "trainer=cpu",
    "debug=fast",
    "model.module.net.width=4",
    "callbacks.rich_progress_bar=null",
]


def key(compose: Compose, folder: Path, *words: str) -> str:
    return Baseline.of(compose(*SHARED, f"baseline.folder={folder}", *words)).folder.name


@pytest.fixture
def keys(composed: Compose, tmp_path: Path) -> Callable[..., str]:  # noqa: F811
    return lambda *words: key(composed, tmp_path, *words)


@pytest.mark.parametrize(
    "word",
    [
        "method=float",
        "method=ptq",
        "mode=eager",
        "backend=qnnpack",
        "quantization.start=0.7",
        "logger=csv",
        "run.name=mine",
        "recipe=distillation",
        "export=onnx",
        "callbacks=pruning",
        "resume=true",
    ],
)
@pytest.mark.slow
def test_what_is_done_with_a_float_run_does_not_change_it(word: str, keys: Callable[..., str]) -> None:
    assert keys(word) == keys()


@pytest.mark.parametrize(
    "word",
    [
        "seed=1",
        "model.module.lr=0.001",
        "model.module.net.width=6",
        "model=resnet20",
        "data.datamodule.batch_size=16",
        "trainer.max_epochs=3",
        "trainer.precision=bf16-mixed",
        "callbacks=early_stopping",
        "+baseline.float.trainer.max_epochs=9",
    ],
)
@pytest.mark.slow
def test_whatever_changes_the_float_run_changes_its_key(word: str, keys: Callable[..., str]) -> None:
    words = [word] if not word.startswith("model=") else [word, "model.module.net.width=4"]
    assert keys(*words) != keys()


def test_code_and_data_change_the_key(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    (tmp_path / "my_networks.py").write_text("def make(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    images = tmp_path / "images.npz"
    images.write_text("some")
    words = ["model=custom", "model.module.net._target_=my_networks.make", f"+data.datamodule.path={images}"]

    def now() -> dict[str, Any]:
        cfg = composed("baseline=shared", *words)
        return fingerprint(float_configuration(cfg))

    first = now()
    assert first["code"].keys() == {"qat_lightning", "lightning", "my_networks"}
    assert first["data"].keys() == {str(images)}
    assert now() == first
    images.write_text("others")
    second = now()
    assert second["data"] != first["data"]
    (tmp_path / "my_networks.py").write_text("def make(): return None\n")
    assert now()["code"] != second["code"]


def test_a_broken_float_run_is_trained_anew_and_a_whole_one_is_not(composed: Compose, tmp_path: Path) -> None:  # noqa: F811
    cfg = composed(*SHARED, f"baseline.folder={tmp_path}")
    baseline = Baseline.of(cfg)
    assert not baseline.there
    whole = baseline.ensure().read_bytes()
    written = baseline.checkpoint.stat().st_mtime_ns
    assert baseline.ensure().stat().st_mtime_ns == written
    baseline.checkpoint.write_bytes(whole[:1000])
    assert not baseline.there
    baseline.ensure()
    assert baseline.there
    assert with_baseline(cfg).float_checkpoint == str(baseline.checkpoint)


def _train(cfg: DictConfig) -> None:
    Baseline.of(cfg).ensure()


@pytest.mark.slow
def test_of_two_processes_one_trains_it(composed: Compose, tmp_path: Path) -> None:  # noqa: F811
    cfg = composed(*SHARED, f"baseline.folder={tmp_path}", "paths.output_dir=out")
    with Baseline.of(cfg).lock():
        other = multiprocessing.get_context("fork").Process(target=_train, args=(cfg,))
        other.start()
        other.join(2)
        assert other.is_alive(), "it waits"
        assert not Baseline.of(cfg).there
    other.join(120)
    assert other.exitcode == 0
    assert Baseline.of(cfg).there


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"baseline": {"use": "both"}}, "none, compare, start"), ({"trainer": {"devices": 2}}, "method=float")],
)
def test_what_cannot_be_shared_is_refused(changed: dict[str, Any], says: str) -> None:
    cfg = OmegaConf.create({"baseline": {"use": "compare"}, "trainer": {"devices": 1}})
    with pytest.raises(ConfigurationError, match=says):
        with_baseline(OmegaConf.merge(cfg, changed))
