"""train.py, run as a user runs it: in its own process, with tiny settings."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from qat_lightning import load_quantized
from qat_lightning.errors import ConfigurationError
from qat_lightning.run import app
from tests.support.nightly import nightly_except

ROOT = Path(__file__).parents[2]
PAIRS = ["mode=fx backend=x86", "mode=eager backend=qnnpack", "mode=pt2e backend=x86"]
FAST = ["debug=fast", "trainer=cpu", "data.datamodule.batch_size=16"]


def run(folder: Path, script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WANDB_MODE": "offline", "COLUMNS": "120", "PYTHONPATH": str(ROOT / "src")}
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        [sys.executable, str(script), *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def train(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(folder, ROOT / "train.py", "hydra.run.dir=out", *words)


def wandb_run(folder: Path) -> dict[str, Any]:
    """The run, read with W&B's own reader."""
    (found,) = (folder / "out" / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(found)]
    result: dict[str, Any] = json.loads(subprocess.check_output(command, text=True))
    return result


@pytest.mark.slow
def test_a_float_run_is_read_back_from_wandb(tmp_path: Path) -> None:
    done = train(tmp_path, "method=float", "seed=3", *FAST)
    assert done.returncode == 0, done.stderr
    assert "float" in done.stdout
    assert "test/acc" in done.stdout
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").is_file()
    found = wandb_run(tmp_path)
    summary, config = found["summary"], found["config"]
    assert (found["name"], found["project"]) == ("float-small_mobilenet", "qat-lightning")
    assert found["tags"] == ["float", "small_mobilenet"]
    assert config["logger"]["wandb"]["group"] == "digits-small_mobilenet"
    assert config["logger"]["wandb"]["job_type"] == "float"
    assert config["model"]["module"]["net"]["_target_"] == "qat_lightning.demos.SmallMobileNet"
    assert config["seed"] == config["data"]["datamodule"]["seed"] == 3
    assert {"float/test/acc", "float/test/loss", "float/size_mb", "float/latency_ms", "val/acc"} <= summary.keys()
    assert not [key for key in summary if key.startswith("test/")]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "completed"
    assert result["metrics"].items() <= summary.items()
    assert result["fit_metrics"]["val/acc"] == summary["val/acc"]["last"]
    assert result["wandb"]["id"] == found["run_id"]
    assert Path(result["wandb"]["dir"]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("pair", nightly_except(PAIRS, "mode=fx backend=x86"))
def test_a_qat_run_leaves_the_whole_comparison_in_wandb(pair: str, tmp_path: Path) -> None:
    export = "mode=fx" in pair
    done = train(tmp_path, *pair.split(), *FAST, *(["export=torchscript"] if export else []))
    assert done.returncode == 0, done.stderr
    for word in ("fake_quant", "int8", "speed-up"):
        assert word in done.stdout
    found = wandb_run(tmp_path)
    summary = found["summary"]
    assert found["tags"] == ["qat", *(word.partition("=")[2] for word in pair.split()), "small_mobilenet"]
    variants = [f"{name}/test/acc" for name in ("float", "fake_quant", "int8")]
    sizes = ["float/size_mb", "int8/size_mb", "size_ratio", "float/latency_ms", "int8/latency_ms", "speedup"]
    schedule = ["quant/fake_quant_enabled", "quant/observers_enabled", "quant/batchnorm_frozen"]
    assert {*variants, *sizes, *schedule, "int8/agreement", "int8/sqnr_db"} <= summary.keys()
    assert {"max", "last"} <= summary["val/acc"].keys()
    assert any(key.startswith("variants/table") for key in summary)
    assert (tmp_path / "out" / "model.int8").is_file()
    assert (tmp_path / "out" / "export" / "model.torchscript.pt").is_file() == export
    assert ({"torchscript/test/acc", "torchscript/agreement"} <= summary.keys()) == export
    assert summary["quant/fake_quant_enabled"] == 1
    assert summary["quant/batchnorm_frozen"] == 0


@pytest.mark.nightly
def test_a_run_takes_a_quantizer_of_the_users(tmp_path: Path) -> None:
    path = "tests.support.quantizers.OwnQuantizer"
    words = ["mode=pt2e", "backend=custom", "logger=csv", *FAST]
    done = train(tmp_path, *words, f"backend.quantizer={{_target_: {path}, dtype: int16}}", "export=exported_program")
    assert done.returncode == 0, done.stderr
    recipe = load_quantized(tmp_path / "out" / "model.int8").recipe
    assert (recipe.backend, recipe.quantizer.keywords) == (path, {"dtype": "int16"})  # type: ignore[union-attr]
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    other = train(tmp_path, *words, f"backend.quantizer={path}", "hydra.run.dir=other", f"ckpt_path={checkpoint}")
    assert other.returncode == 1
    assert "other quantization settings" in " ".join(other.stderr.replace("│", " ").split())


@pytest.mark.nightly
def test_a_run_takes_bits_for_single_layers(tmp_path: Path) -> None:
    overrides = "quantization.scheme.overrides={net.head:{weight_bits:4},net.stages.*:{weight_bits:4},net.stem:float}"
    done = train(tmp_path, "method=qat", "logger=csv", *FAST, overrides)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "model.int8"
    loaded = load_quantized(path)
    assert loaded.recipe.scheme.of("net.stages.0.expand.0").weight_bits == 4
    assert not next(row for row in loaded.coverage if row.name == "stem.0").quantized
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metrics"]["int8/size_mb"] == path.stat().st_size / 1e6


@pytest.mark.slow
def test_lightning_prints_each_message_once_and_the_log_has_it_too(tmp_path: Path) -> None:
    done = train(tmp_path, "method=float", "logger=none", *FAST)
    assert done.returncode == 0, done.stderr
    ended = "`Trainer.fit` stopped"
    assert (done.stdout + done.stderr).count(ended) == 1
    assert (tmp_path / "out" / "train.log").read_text().count(ended) == 1


@pytest.mark.nightly
def test_a_run_with_the_csv_logger_keeps_metrics_and_configuration(tmp_path: Path) -> None:
    done = train(tmp_path, "method=float", "logger=csv", *FAST)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "csv" / "metrics.csv").open() as file:
        names = {name for row in csv.DictReader(file) for name, value in row.items() if value}
    assert {"train/loss", "val/acc", "float/test/acc", "float/size_mb"} <= names
    assert "test/acc" not in names
    assert OmegaConf.load(tmp_path / "out" / "csv" / "hparams.yaml").method.name == "float"


@pytest.mark.slow
def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(tmp_path: Path) -> None:
    settings = ["method=float", "logger=csv", *FAST, "trainer.log_every_n_steps=1"]
    save = ["callbacks.model_checkpoint.every_n_train_steps=3", "callbacks.model_checkpoint.save_top_k=-1"]
    assert train(tmp_path, *settings, *save, "callbacks.model_checkpoint.monitor=null").returncode == 0
    (middle,) = (tmp_path / "out" / "checkpoints").glob("*step3.ckpt")
    done = train(tmp_path, *settings, "hydra.run.dir=again", f"ckpt_path={middle}")
    assert done.returncode == 0, done.stderr

    def tested(folder: str) -> list[str]:
        with (tmp_path / folder / "csv" / "metrics.csv").open() as file:
            return [row["float/test/loss"] for row in csv.DictReader(file) if row["float/test/loss"]]

    assert tested("out")
    assert tested("again") == tested("out")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mode=pt2e", "backend=qnnpack"], ["mode='eager'", "mode='fx'", "x86, xnnpack"]),
        (["mode=fxx"], ["auto", "eager", "fx", "pt2e"]),
        (["mode=fx", "backend=custom", "backend.quantizer=a.B"], ["for a.B use mode='pt2e'"]),
        (["mode=pt2e", "backend=custom"], ["give backend.quantizer=..."]),
    ],
)
def test_a_wrong_option_is_one_message_that_lists_the_possible_ones(
    words: list[str], says: list[str], tmp_path: Path
) -> None:
    done = train(tmp_path, *words)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    shown = " ".join(done.stderr.replace("│", " ").split())
    for part in says:
        assert part in shown
    assert not (tmp_path / "out" / "wandb").exists()


CONFIG = {
    "seed": 0,
    "ckpt_path": None,
    "float_checkpoint": None,
    "method": {"name": "qat"},
    "quantization": {"mode": "fx", "backend": "x86"},
    "paths": {"output_dir": "runs"},
}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"ckpt_path": "none.ckpt"}, "ckpt_path=none.ckpt does not exist"),
        ({"float_checkpoint": "none.ckpt"}, "float_checkpoint=none.ckpt does not exist"),
        ({"quantization": None, "method": {"name": "float"}, "float_checkpoint": "x"}, "choose method=qat"),
        ({"model": {"fused": True}}, "or choose method=float"),
        (
            {"quantization": None, "method": {"name": "finetune", "continues": True}, "baseline": {"use": "none"}},
            "add baseline=start",
        ),
        ({"quantization": {"mode": "fx", "backend": "tpu"}}, "x86, onednn, fbgemm, qnnpack, xnnpack"),
        ({"quantization": {"mode": "dynamic", "backend": "x86"}}, "eager, fx, pt2e, auto"),
        ({"data": {"a": "???", "b": "${data.a}"}, "model": "???"}, "data.a=... model=..."),
    ],
)
def test_check_says_what_to_type_instead(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        app.check(OmegaConf.create({**CONFIG, **changed}))
    assert says in str(error.value)


def test_the_panel_names_the_mistake_and_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = OmegaConf.create({"_target_": "qat_lightning.Scheme", "weight_bits": 1})
    with pytest.raises(SystemExit) as stopped, app.readable_errors():
        instantiate({"scheme": cfg})
    assert stopped.value.code == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "ConfigurationError" in shown
    assert "use an int from 2 to 8" in shown
    assert "In the configuration: scheme" in shown


def test_the_full_error_is_shown_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InstantiationException), app.readable_errors():
        instantiate({"_target_": "qat_lightning.Scheme", "weight_bits": 1})


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), app.readable_errors():
        _ = 1 / 0


@pytest.mark.slow
def test_a_users_own_app_can_add_the_packaged_group(tmp_path: Path) -> None:
    (tmp_path / "my_config.yaml").write_text("hydra:\n  searchpath: [pkg://qat_lightning.conf]\nlr: 0.1\n")
    script = tmp_path / "my_app.py"
    script.write_text(
        "import hydra\n"
        '@hydra.main(version_base="1.3", config_path=".", config_name="my_config")\n'
        "def main(cfg):\n"
        "    callback = hydra.utils.instantiate(cfg.quantization)\n"
        "    print(type(callback).__name__, callback.mode, callback.backend)\n"
        "main()\n"
    )
    done = run(tmp_path, script, "+quantization=pt2e_x86", "quantization.start={epoch:3}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["QuantizationAwareTraining", "pt2e", "x86"]


@pytest.mark.slow
def test_the_packaged_group_goes_into_a_group_of_callbacks(tmp_path: Path) -> None:
    """For an app that instantiates every entry; also in a sweep over the group with other settings."""
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "default.yaml").write_text("timer:\n  _target_: lightning.pytorch.callbacks.Timer\n")
    (tmp_path / "my_config.yaml").write_text(
        "defaults: [callbacks: default, _self_]\nhydra:\n  searchpath: [pkg://qat_lightning.conf]\n"
    )
    script = tmp_path / "my_app.py"
    script.write_text(
        "import hydra\n"
        '@hydra.main(version_base="1.3", config_path=".", config_name="my_config")\n'
        "def main(cfg):\n"
        "    callbacks = [hydra.utils.instantiate(part) for part in cfg.callbacks.values()]\n"
        '    print("made", type(callbacks[-1]).__name__, callbacks[-1].mode, callbacks[-1].schedule.start)\n'
        "main()\n"
    )
    group = "+quantization@callbacks.quantization="
    done = run(tmp_path, script, f"{group}fx_x86", "callbacks.quantization.start=0.3")
    assert done.returncode == 0, done.stderr
    assert "made QuantizationAwareTraining fx {fraction: 0.3}" in done.stdout
    done = run(tmp_path, script, "-m", f"{group}fx_x86,eager_x86", "++callbacks.quantization.start=0.3")
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("made")] == ["fx", "eager"]
    assert done.stdout.count("{fraction: 0.3}") == 2
