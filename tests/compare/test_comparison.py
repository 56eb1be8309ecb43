import csv
import dataclasses
import io
import math
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qat_lightning.compare import Limits, Run, compare, decide
from qat_lightning.compare.table import as_csv, cells, markdown
from qat_lightning.errors import ConfigurationError
from tests.compare.making import configuration, plain, qat
from tests.configs.conftest import CONF


def by_label(runs, **options):
    return {configuration.label: configuration for configuration in compare(runs, **options).configurations}


def test_seeds_are_folded_and_the_best_comes_first():
    found = compare([qat("fx", 0, 0.96), qat("fx", 1, 0.98), qat("pt2e", 0, 0.99)]).configurations
    assert [(c.label, c.score.seeds) for c in found] == [("pt2e", 1), ("fx", 2)]
    assert found[1].score.mean == pytest.approx(0.97)
    assert found[1].score.deviation == pytest.approx(0.02 / 2**0.5)
    assert found[0].score.deviation is None


def test_the_drop_is_paired_with_the_float_run_of_the_same_seed():
    runs = [plain(0, 0.99), plain(1, 0.95), qat("fx", 0, 0.98), qat("fx", 1, 0.94), qat("fx", 2, 0.10)]
    found = by_label(runs)["qat"]
    assert found.baseline == "float runs"
    assert found.drop.mean == pytest.approx(1.0)
    assert found.drop.deviation == pytest.approx(0.0, abs=1e-9)
    assert found.drop.seeds == 2


def test_without_a_float_run_of_the_same_training_the_runs_own_float_is_the_baseline():
    longer = dataclasses.replace(
        plain(0, 0.99), config=configuration("float", 0, trainer={"max_epochs": 60}, mode={"name": "fx"})
    )
    found = by_label([longer, qat("fx", 0, 0.88)])
    (label,) = (label for label in found if label.startswith("qat"))
    assert found[label].baseline == "float of the same run"
    assert found[label].drop.mean == pytest.approx(2.0)


def test_a_run_that_continues_a_float_run_is_not_the_baseline():
    longer = plain(acc=1.0)
    longer.config["method"] = {"name": "finetune", "continues": True}
    found = {c.variant: c for c in compare([plain(acc=0.9), longer, qat("fx", acc=0.95)]).configurations}
    assert found["int8"].drop is not None
    assert found["int8"].drop.mean == pytest.approx(-5), "points, relative to the float run that both continue"


def test_what_only_watches_or_shares_is_no_other_training() -> None:
    run = qat("fx", 0, 0.97)
    watched = {"callbacks": {"monitor": {"every_n_steps": 10}, "model_checkpoint": {"save_top_k": 3}}}
    shared = {"baseline": {"use": "compare", "folder": "elsewhere"}}
    found = by_label([plain(0, 0.98), dataclasses.replace(run, config=run.config | watched | shared)])
    assert found["qat"].baseline == "float runs"


def test_a_float_checkpoint_is_named_as_the_baseline():
    run = qat("fx")
    run = dataclasses.replace(run, config=run.config | {"float_checkpoint": "last.ckpt"})
    (found,) = compare([run]).configurations
    assert found.baseline == "float_checkpoint"


def test_float_runs_that_differ_in_a_mode_only_are_one_configuration():
    other = dataclasses.replace(plain(1), config=configuration("float", 1, mode={"name": "pt2e"}))
    found = by_label([plain(0), other, qat("fx")])
    assert found["float"].score.seeds == 2


def test_what_cannot_be_compared_is_left_out_with_the_reason():
    failed = qat("pt2e", status="failed", reason="it broke")
    without = dataclasses.replace(qat("eager"), metrics={"train/loss": 1.0})
    found = compare([qat("fx"), failed, without])
    assert len(found.configurations) == 1
    assert [run.reason for run in found.left_out] == ["it broke", "it has no test/acc of a variant"]


def test_where_nothing_finished_the_error_says_why():
    with pytest.raises(ConfigurationError) as error:
        compare([qat("fx", status="failed", reason="out of memory")])
    assert "method=qat mode=fx seed=0 (failed): out of memory" in str(error.value)


def test_the_front_has_no_configuration_that_another_beats_in_everything():
    runs = [qat("fx", acc=0.98, latency=3.0), qat("pt2e", acc=0.97, latency=2.0), qat("eager", acc=0.96, latency=4.0)]
    assert [c.label for c in compare(runs).front] == ["fx", "pt2e"]


def test_what_has_no_size_or_latency_is_never_on_the_front():
    run = qat("fx", acc=1.0)
    simulated = dataclasses.replace(run, metrics={"fake_quant/test/acc": 1.0, "float/test/acc": 1.0})
    found = by_label([simulated, qat("pt2e", acc=0.5)])
    assert found["fx"].variant == "fake_quant"
    assert [c.on_front for c in found.values()] == [False, True]


def test_a_smaller_loss_is_better_when_it_is_the_metric():
    found = compare([qat("fx", acc=0.9), qat("pt2e", acc=0.8)], metric="test/loss")
    assert [c.label for c in found.configurations] == ["fx", "pt2e"]
    assert [c.label for c in found.front] == ["fx"]


def test_numbers_are_named_in_labels():
    runs = [Run(str(bits), str(bits), config={"weight_bits": bits}, metrics={"int8/acc": 0.9}) for bits in (4, 8)]
    assert set(by_label(runs)) == {"weight_bits=4", "weight_bits=8"}


def test_settings_that_look_alike_in_short_are_different_configurations():
    files = {"a.csv": 0.9, "b.csv": 0.5}
    runs = [Run(file, file, config={"data": {"file": file}}, metrics={"int8/acc": acc}) for file, acc in files.items()]
    assert {label: found.score.mean for label, found in by_label(runs).items()} == {
        "file=a.csv": 0.9,
        "file=b.csv": 0.5,
    }


def diverged(run, value=None):
    """The same run with a loss of int8 and fake-quant that is not a number: readers leave it out, programs may not."""
    metrics = {k: v for k, v in run.metrics.items() if not k.startswith(("int8/", "fake_quant/"))}
    missing = {} if value is None else dict.fromkeys(("int8/test/acc", "fake_quant/test/acc"), value)
    return dataclasses.replace(run, metrics=metrics | missing)


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_seed_that_diverged_is_left_out_with_the_reason_wherever_it_is_listed(place, value):
    runs = [qat("fx", seed, 0.97) for seed in range(3)]
    runs[place] = diverged(runs[place], value)
    found = compare(runs)
    (fx,) = found.configurations
    assert (fx.variant, fx.score.seeds, fx.drop.seeds) == ("int8", 2, 2)
    (left,) = found.left_out
    assert left.folder == f"out/fx-{place}"
    assert "its test/acc of int8" in left.reason
    assert "not a finite number" in left.reason


def test_a_quantized_run_of_which_only_float_has_a_score_is_no_float_run():
    failed = diverged(qat("pt2e", metrics=qat("pt2e").metrics | {"float/test/acc": 1.0}))
    comparison = compare([failed, qat("fx", acc=0.97)])
    found = {c.label: c for c in comparison.configurations}
    assert found["fx"].baseline == "float of the same run"
    assert not found["pt2e"].is_float
    assert compare([failed]).configurations[0].label == "method=qat mode=pt2e seed=0"
    assert "Float" not in decide(comparison, Limits(prefer="score")).reason


def test_figures_of_fewer_seeds_than_the_score_have_their_own_number():
    comparison = compare([plain(0, 0.98), *(qat("fx", seed, 0.97) for seed in range(3))])
    header, rows = cells(comparison)
    (row,) = (row for row in rows if "qat" in row)
    assert (row[header.index("drop (pp)")], row[header.index("n")]) == ("1.00 (n=1)", "3")
    assert row[header.index("size (MB)")] == "1.000 ± 0.000"
    assert "Its drop is that of 1 of 3 seeds." in decide(comparison, Limits(max_drop=2)).reason


def composed(method: str, metrics: dict[str, float], *overrides: str) -> Run:
    """A run with the configuration of train.py."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"method={method}", "seed=3", *overrides])
    if "float_checkpoint" in config.get("quantization", {}):
        config.quantization.float_checkpoint = None  # resolved, like that of a run
    return Run(method, method, config=OmegaConf.to_container(config, resolve=False), metrics=metrics)


@pytest.mark.parametrize(
    "overrides",
    [
        ["export=[onnx,openvino]"],
        ["callbacks.rich_progress_bar=null", "callbacks.learning_rate_monitor=null"],
        ["logger=none", "save_int8=false", "isolate=false"],
        ["mode=pt2e", "backend=onednn", "baseline=shared"],
        ["+callbacks.mine=null"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("method", ["qat", "ptq", "auto"])
def test_what_cannot_change_a_float_run_leaves_it_the_baseline(method: str, overrides: list[str]) -> None:
    found = {"float/test/acc": 0.90, "int8/test/acc": 0.95}
    for own, of_float in ((overrides, ()), ((), [word for word in overrides if "export" not in word])):
        runs = [composed("float", {"float/test/acc": 0.99}, *of_float), composed(method, found, *own)]
        (int8,) = (configuration for configuration in compare(runs).configurations if configuration.variant == "int8")
        assert int8.baseline == "float runs"
        assert int8.drop is not None
        assert int8.drop.mean == pytest.approx(4.0)


@pytest.mark.parametrize("method", ["qat", "auto"])
@pytest.mark.parametrize("override", ["trainer.max_epochs=9", "model.module.lr=0.5", "data.datamodule.batch_size=7"])
def test_what_changes_a_float_run_does_not(method: str, override: str) -> None:
    found = {"float/test/acc": 0.97, "int8/test/acc": 0.95}
    compared = compare([composed("float", {"float/test/acc": 0.98}), composed(method, found, override)])
    (int8,) = (configuration for configuration in compared.configurations if configuration.variant == "int8")
    assert int8.baseline == "float of the same run"
    assert int8.drop is not None
    assert int8.drop.mean == pytest.approx(2.0)


def test_the_csv_tells_how_many_seeds_each_figure_is_of() -> None:
    runs = [plain(0, 0.99), plain(1, 0.98), qat("fx", 0, 0.96), qat("fx", 1, 0.97), qat("fx", 2, 0.95)]
    rows = list(csv.DictReader(io.StringIO(as_csv(compare(runs)))))
    (row,) = (row for row in rows if row["variant"] == "int8")
    assert (row["n"], row["score_seeds"], row["drop_seeds"]) == ("3", "3", "2")
    assert float(row["drop_mean"]) == pytest.approx(2.0)
    (row,) = (row for row in rows if row["variant"] == "float")
    assert (row["score_seeds"], row["drop_mean"], row["drop_seeds"]) == ("2", "", "")


def test_the_metric_is_one_that_a_finished_run_has() -> None:
    failed = qat("fx", metrics={"int8/test/acc": 0.9}, status="failed", reason="it was killed")
    compared = compare(
        [failed, qat("pt2e", metrics={"int8/test/loss": 0.1}), qat("eager", metrics={"int8/test/loss": 0.2})]
    )
    assert compared.metric.name == "test/loss"
    assert [c.label for c in compared.configurations] == ["pt2e", "eager"]
    with pytest.raises(ConfigurationError, match="No finished run has the metric 'test/acc'"):
        compare([failed, qat("pt2e", metrics={"int8/test/loss": 0.1})], metric="test/acc")


@pytest.mark.parametrize(
    "where", [{"callbacks": {"qat": {"float_checkpoint": "f.ckpt"}}}, {"quantization/float_checkpoint": "f.ckpt"}]
)
def test_a_float_checkpoint_of_a_program_is_named_as_the_baseline(where: dict[str, Any]) -> None:
    config: dict[str, Any] = {"callbacks": {"qat": {"_target_": "qat_lightning.QuantizationAwareTraining"}}, "seed": 0}
    for section, value in where.items():
        config[section] = config.get(section, {}) | value if isinstance(value, dict) else value
    if "callbacks" in where:
        config["callbacks"]["qat"] |= {"_target_": "qat_lightning.QuantizationAwareTraining"}
    (found,) = compare([Run("a", "a", config=config, metrics=qat("fx").metrics)]).configurations
    assert found.baseline == "float_checkpoint"


def test_a_float_run_of_a_program_that_only_has_a_section_for_quantization_is_a_baseline() -> None:
    config = {"quantization": {"enabled": False}, "seed": 0, "lr": 0.1}
    own = {"quantization": {"_target_": "qat_lightning.QuantizationAwareTraining"}}
    runs = [
        Run("f", "f", config=config, metrics={"test/acc": 0.99}),
        Run("q", "q", config=config | own, metrics=qat("fx").metrics),
    ]
    found = {c.variant: c for c in compare(runs).configurations}
    assert found["int8"].baseline == "float runs"


def test_drops_against_different_floats_are_told_apart() -> None:
    other = qat("pt2e", 0, 0.95)
    other = dataclasses.replace(other, config=other.config | {"trainer": {"max_epochs": 60}})
    compared = compare([plain(0, 0.98), qat("fx", 0, 0.97), other])
    header, rows = cells(compared)
    drops = {row[header.index("variant") - 1]: row[header.index("drop (pp)")] for row in rows}
    assert sorted(drops.values()) == ["-5.00 *", "1.00", "–"]
    text = markdown(compared, decide(compared, Limits()))
    assert "against float of the same run, so drops with and without it do not compare" in text
    (row,) = (row for row in csv.DictReader(io.StringIO(as_csv(compared))) if row["drop_mean"].startswith("-"))
    assert (row["baseline"], row["noise"]) == ("float of the same run", "")


def test_what_separates_a_run_from_the_float_runs_is_said_with_the_remedy() -> None:
    own = {"callbacks": {"qat": {"_target_": "qat_lightning.QuantizationAwareTraining"}}}
    float_run = Run("float", "f", config={"lr": 0.01, "width": 8, "seed": 0}, metrics={"test/acc": 0.98})
    other = Run("wide", "w", config={"lr": 0.1, "width": 16, "seed": 0}, metrics={"test/acc": 0.99})
    quantized = Run("q", "q", config={"lr": 0.001, "width": 8, "seed": 0} | own, metrics={"int8/test/acc": 0.97})
    compared = compare([float_run, other, quantized])
    says = "no float run has the same training: float has another lr; with --ignore 'lr' they are compared"
    assert says in decide(compared, Limits(max_drop=2)).reason
    assert "No float run has the same training: float has another lr" in markdown(compared, decide(compared, Limits()))
    labels = {c.variant: c.label for c in compared.configurations if c.score.mean != 0.99}
    assert labels["int8"].startswith("qat")
    (found,) = (c for c in compare([float_run, other, quantized], ignore=["lr"]).configurations if c.variant == "int8")
    assert found.drop is not None
    assert (found.drop.mean, found.unpaired) == (pytest.approx(1.0), "")
    later = dataclasses.replace(quantized, config=quantized.config | {"lr": 0.01, "seed": 4})
    (found,) = (c for c in compare([float_run, later]).configurations if c.variant == "int8")
    assert found.unpaired == "no float run has the seed 4"


def test_data_and_networks_are_never_suggested_to_be_ignored_and_of_many_differences_the_rest_is_counted() -> None:
    same = {"_target_": "qat_lightning.QuantizationAwareTraining"}

    def unpaired(**other: object) -> str:
        float_run = Run("float", "f", config={"lr": 0.1}, metrics={"test/acc": 0.98})
        quantized = Run("q", "q", config={"lr": 0.1, **other, "quantization": same}, metrics={"int8/test/acc": 0.97})
        (found,) = (c for c in compare([float_run, quantized]).configurations if c.variant == "int8")
        return found.unpaired

    assert unpaired(data={"name": "digits"}).endswith("float has another data.name")
    assert unpaired(model={"width": 8}).endswith("float has another model.width")
    assert unpaired(**dict.fromkeys("abcdefgh", 1)).endswith("float has another a, b, c, d, e and 3 more")
    assert unpaired(a=1).endswith("float has another a; with --ignore 'a' they are compared")
