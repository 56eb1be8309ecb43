"""Settings of the callback have the same names, wherever a program's configuration has them."""

from __future__ import annotations

from typing import Any

from qat_lightning.compare import Run, compare
from qat_lightning.compare.quantizing import part_of, under_one_name
from qat_lightning.compare.settings import differing, flatten

QAT, PTQ = "qat_lightning.QuantizationAwareTraining", "qat_lightning.PostTrainingQuantization"


def run(name: str, words: tuple[str, ...], callbacks: dict[str, Any], *, said: bool = True, **more: Any) -> Run:
    """A run of a program with callbacks under ``callbacks``; ours have logged their settings."""
    config: dict[str, Any] = {"lr": 0.1, "seed": 0, **more, "callbacks": {"stop": {"patience": 3}, **callbacks}}
    for part in callbacks.values() if said else ():
        config["quantization/method"] = part["_target_"].rpartition(".")[2]
        config |= {f"quantization/{key}": value for key, value in part.items() if key != "_target_"}
        config["quantization/scheme.weight_bits"] = 8
    variant = "int8" if callbacks else "float"
    return Run(name, name, config=config, overrides=words, metrics={f"{variant}/test/acc": 0.9})


def qat(mode: str, target: str = QAT, **more: Any) -> dict[str, Any]:
    return {"qat": {"_target_": target, "mode": mode, **more}}


def test_the_part_of_the_callback_is_found_by_its_class_or_by_what_it_logged() -> None:
    assert part_of(flatten({"callbacks": qat("fx")})) == "callbacks.qat"
    mine = {"callbacks": qat("fx", "src.callbacks.Mine"), "quantization/method": "Mine"}
    assert part_of(flatten(mine)) == "callbacks.qat"
    assert part_of(flatten({"callbacks": qat("fx", "src.callbacks.Mine")})) == ""
    assert part_of(flatten({"callbacks": {**qat("fx"), "other": {"_target_": PTQ}}})) == "", "it is not clear which"


def test_each_setting_is_there_once_with_the_value_that_was_asked_for() -> None:
    (found,) = ({k: v for k, v in under_one_name(flatten(r.config)).items() if "quant" in k or "qat" in k}
                for r in [run("a", (), qat("fx", start=0))])  # fmt: skip
    assert found == {
        "quantization.method": "QuantizationAwareTraining",
        "quantization.mode": "fx",
        "quantization.start": "0",
        "quantization.scheme.weight_bits": "8",
    }


def test_two_sweeps_over_the_group_and_over_its_settings_are_compared_without_saying_anything_twice() -> None:
    chosen = [run(f"g{m}", (f"callbacks=qat_{m}",), qat(m, start=0.3)) for m in ("fx", "eager")]
    set_ = [
        run(f"s{m}", ("callbacks=qat", f"callbacks.qat.mode={m}", f"callbacks.qat.start={s}"), qat(m, start=s))
        for m in ("fx", "eager")
        for s in (0, 0.5)
    ]
    float_run = run("f", ("callbacks=default",), {})
    ptq = run("p", ("callbacks=ptq",), {"ptq": {"_target_": PTQ, "mode": "fx"}})
    settings = differing([*chosen, *set_, float_run, ptq])
    assert [setting.label for setting in settings] == ["callbacks", "mode", "start"]
    labels = {c.label for c in compare([*chosen, *set_, float_run, ptq]).configurations}
    assert {"qat_fx fx start=0.3", "qat eager start=0.5", "ptq fx", "default"} <= labels
    assert len(labels) == 8


def test_a_group_below_another_one_names_what_is_in_it() -> None:
    runs = [run(m, (f"callbacks/qat={m}_x86",), qat(m)) for m in ("fx", "eager")] + [
        run("f", ("callbacks/qat=no",), {})
    ]
    assert {c.label for c in compare(runs).configurations} == {"fx_x86", "eager_x86", "no"}


def test_experiments_which_set_what_is_in_other_groups_name_their_runs() -> None:
    runs = [run(m, (f"experiment={m}_small",), qat(m), lr=lr) for m, lr in (("fx", 0.1), ("eager", 0.2))]
    assert [c.label for c in compare(runs).configurations] == ["fx_small", "eager_small"]


def test_experiments_that_set_the_seed_are_seeds() -> None:
    runs = [run(f"{m}{s}", (f"experiment={m}_{s}",), qat(m), seed=s) for m in ("fx", "eager") for s in (0, 1)]
    assert [(c.label, c.score.seeds) for c in compare(runs).configurations] == [("fx", 2), ("eager", 2)]


def test_bare_tests_are_those_of_float_unless_a_callback_quantized() -> None:
    def bare(one: Run) -> Run:
        return Run(one.name, one.folder, config=one.config, overrides=one.overrides, metrics={"test/acc": 0.95})

    float_run, unclear = bare(run("f", ("callbacks=default",), {})), bare(run("q", ("callbacks=qat",), qat("eager")))
    found = compare([float_run, unclear, run("i", ("callbacks=fx",), qat("fx"))])
    assert {(c.label, c.variant) for c in found.configurations} == {("default", "float"), ("fx", "int8")}
    assert [left.name for left in found.left_out] == ["q"]
    (int8,) = (c for c in found.configurations if c.variant == "int8")
    assert int8.drop is not None
    assert round(int8.drop.mean, 6) == 5.0
