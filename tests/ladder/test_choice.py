"""What is tried next: a function of what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning import Scheme, Target
from qat_lightning.errors import ConfigurationError
from qat_lightning.ladder.choice import Attempt, Step, nearest, next_step, to_go_on_from
from qat_lightning.ladder.judgement import Drop
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.rungs import RUNGS, Known, rungs_of
from qat_lightning.ladder.sources import ErrorSources
from qat_lightning.ladder.timing import quietest
from qat_lightning.run.evaluate import SPREAD

KNOWN = Known(
    files=("torchscript",), ranking=tuple(f"net.{i}" for i in range(20)), bits={}, sources=ErrorSources(20.0, 20.0)
)


def measured(step: Step, drop: float, speedup: float = 2.0, size: float = 1.0) -> Attempt:
    return Attempt(step.rung.name, step.plan, Drop(drop, drop - 0.01, drop + 0.01, 9), speedup, size, minutes=1.0)


def climbed(target: Target, outcome: Callable[[Step], Attempt], known: Known = KNOWN) -> list[Attempt]:
    """The attempts of a whole ladder."""
    attempts: list[Attempt] = []
    while (step := next_step(attempts, Plan(), target, known)) is not None:
        assert not step.first
        attempts.append(outcome(step))
    return attempts


def names(attempts: list[Attempt]) -> list[str]:
    return [attempt.rung for attempt in attempts]


def test_what_keeps_the_target_at_once_ends_it() -> None:
    assert names(climbed(Target(max_drop=0.1), lambda step: measured(step, 0.05))) == ["static"]


def test_for_accuracy_observers_recipes_layers_and_trainings_are_tried_in_this_order() -> None:
    found = names(climbed(Target(max_drop=0.01), lambda step: measured(step, 0.5)))
    assert found == [
        "static", "observer_min_max", "observer_percentile", "observer_histogram_kl", "bias_correction",
        "equalization", "float_1_layers", "float_2_layers", "float_4_layers", "float_8_layers", "sequential_mse",
        "adaround", "qat_short", "qat_long",
    ]  # fmt: skip


def test_for_size_bits_are_tried_and_for_speed_files_and_kernels() -> None:
    small = names(climbed(Target(max_size_mb=0.1), lambda step: measured(step, 0.5)))
    assert small == ["static", "weights_4bit", "weight_only_4bit", "weights_2bit"]
    fast = names(climbed(Target(min_speedup=9), lambda step: measured(step, 0.5)))
    assert fast == ["static", "backend_onednn", "file_torchscript", "mode_pt2e"]


def test_where_onednn_overflows_only_fbgemm_is_tried_for_speed() -> None:
    known = replace(KNOWN, exact=False)
    attempts = climbed(Target(min_speedup=9), lambda step: measured(step, 0.5), known)
    assert names(attempts) == ["static", "backend_fbgemm", "file_torchscript"]
    assert attempts[1].plan.backend == "fbgemm"


def test_a_rung_begins_with_what_helped() -> None:
    helps = {"static": 0.5, "observer_percentile": 0.3, "bias_correction": 0.2, "float_2_layers": 0.1}
    found = {a.rung: a.plan for a in climbed(Target(max_drop=0.01), lambda s: measured(s, helps.get(s.rung.name, 0.6)))}
    assert found["float_1_layers"].scheme.activation_observer == "percentile"
    assert found["float_1_layers"].bias_correction
    assert found["float_1_layers"].equalization == "none", "it did not help"
    assert found["adaround"].exclude == ("net.0", "net.1")
    assert found["qat_short"].exclude == ("net.0", "net.1")
    trained = found["qat_short"]
    assert (trained.scheme.activation_observer, trained.bias_correction) == ("percentile", False)
    of_calibration_alone = replace(trained, scheme=Scheme(activation_observer="histogram_kl"))
    assert of_calibration_alone.trained(2).scheme.activation_observer == "auto"
    assert trained.distillation


def test_accuracy_is_won_back_for_what_keeps_size_and_speed() -> None:
    def outcome(step: Step) -> Attempt:
        small = step.plan.scheme.weight_bits == 4
        fast = step.plan.file == "torchscript"
        return measured(step, 0.4 if small else 0.0, 4.0 if fast else 2.0, 0.5 if small else 1.0)

    attempts = climbed(Target(max_drop=0.01, min_speedup=3, max_size_mb=0.6), outcome)
    assert names(attempts)[:4] == ["static", "weights_4bit", "backend_onednn", "file_torchscript"]
    assert all(a.plan.scheme.weight_bits == 4 and a.plan.file == "torchscript" for a in attempts[4:])
    assert names(attempts)[-1] == "qat_long"


def test_where_weights_have_few_bits_the_worst_layers_get_more() -> None:
    helps = {"static": 0.5, "wide_2_layers": 0.1}
    attempts: list[Attempt] = []
    start = Plan(scheme=Scheme(weight_bits=4))
    while (step := next_step(attempts, start, Target(max_drop=0.01), KNOWN)) is not None:
        attempts.append(measured(step, helps.get(step.rung.name, 0.6)))
    found = {attempt.rung: attempt.plan for attempt in attempts}
    wide = found["wide_2_layers"]
    assert wide.scheme.overrides == {"net.0": {"weight_bits": 8}, "net.1": {"weight_bits": 8}}
    assert wide.words(start) == "2 layers otherwise"
    assert Plan.from_dict(json.loads(json.dumps(wide.to_dict()))) == wide
    assert found["qat_short"].scheme.overrides == wide.scheme.overrides
    assert names(attempts).index("wide_8_layers") < names(attempts).index("float_1_layers")
    assert found["float_1_layers"].scheme.overrides == {"net.1": {"weight_bits": 8}}, "a float layer has no bits"
    assert not found["float_2_layers"].scheme.overrides


@pytest.mark.parametrize(
    ("overrides", "wide"),
    [
        ({"net.0": {"weight_bits": 8}, "net.*": {"weight_bits": 3}}, {"weight_bits": 8}),
        ({"net.?": {"weight_bits": 3, "weight_observer": "mse"}}, {"weight_bits": 8, "weight_observer": "mse"}),
    ],
)
def test_wide_layers_are_wide_whatever_other_patterns_match_them(
    overrides: dict[str, dict[str, object]], wide: dict[str, object]
) -> None:
    found = few_bits({"static": 0.5}, Scheme(weight_bits=4, overrides=overrides))["wide_1_layers"].scheme
    assert found.overrides is not None
    assert list(found.overrides.items())[-1] == ("net.0", wide)
    assert (found.of("net.0").weight_bits, found.of("net.1").weight_bits) == (8, 3)


def test_layers_that_are_wide_already_are_no_step() -> None:
    wide = {"net.1": {"weight_bits": 8}, "net.0": {"weight_bits": 8}}
    found = few_bits({"static": 0.5}, Scheme(weight_bits=4, overrides=wide))
    assert "wide_2_layers" not in found
    assert "wide_4_layers" in found


def test_layers_with_few_bits_among_others_with_8_are_made_wide() -> None:
    found = few_bits({"static": 0.5}, Scheme(overrides={"net.?": {"weight_bits": 4}}))
    wide = found["wide_2_layers"].scheme
    assert [wide.of(name).weight_bits for name in ("net.0", "net.1", "net.2")] == [8, 8, 4]
    assert not [name for name in few_bits({"static": 0.5}, Scheme()) if name.startswith("wide")]


def few_bits(helps: Mapping[str, float], scheme: Scheme, known: Known = KNOWN) -> dict[str, Plan]:
    """The plans of a ladder for accuracy, whose weights have few bits and whose network has blocks."""
    attempts: list[Attempt] = []
    known = replace(known, blocks=True)
    while (step := next_step(attempts, Plan(scheme=scheme), Target(max_drop=0.01), known)) is not None:
        attempts.append(measured(step, helps.get(step.rung.name, 0.6)))
    return {attempt.rung: attempt.plan for attempt in attempts}


def test_with_few_bits_rounding_is_learned_by_blocks_before_by_layers() -> None:
    found = few_bits({"static": 0.5}, Scheme(weight_bits=4))
    order = list(found)
    first = order.index("sequential_mse")
    assert order[first : first + 3] == ["sequential_mse", "adaround_blocks", "adaround"]
    assert (found["adaround_blocks"].adaround, found["adaround_blocks"].adaround_blocks) == (1000, True)
    assert not found["adaround"].adaround_blocks
    assert found["adaround_blocks"].words(Plan(scheme=Scheme(weight_bits=4))) == "AdaRound 1000 iterations by blocks"
    some = few_bits({"static": 0.5}, Scheme(overrides={"net.0": {"weight_bits": 3}, "net.1": "float"}))
    assert "adaround_blocks" in some
    assert "adaround_blocks" not in few_bits({"static": 0.5}, Scheme(weight_bits=6))
    assert "adaround_blocks" not in few_bits({"static": 0.5}, Scheme(weight_bits=4), replace(KNOWN, adaround=0))


def test_what_takes_long_comes_before_float_layers_for_few_bits_and_after_them_for_more() -> None:
    for bits, first in ((3, "sequential_mse"), (4, "sequential_mse"), (6, "float_1_layers"), (8, "float_1_layers")):
        order = list(few_bits({"static": 0.5}, Scheme(weight_bits=bits)))
        assert min(("sequential_mse", "float_1_layers"), key=order.index) == first, bits
        assert ("adaround" in order, order.count("sequential_mse")) == (True, 1)


def test_what_sequential_mse_and_blocks_won_is_kept_and_layers_are_not_tried_then() -> None:
    found = few_bits({"static": 0.5, "sequential_mse": 0.3, "adaround_blocks": 0.2}, Scheme(weight_bits=4))
    assert "adaround" not in found
    wide = found["wide_1_layers"]
    assert (wide.sequential_mse, wide.adaround_blocks) == (True, True)
    trained = found["qat_short"]
    assert (trained.sequential_mse, trained.adaround, trained.adaround_blocks) == (False, 0, False)


def test_ranges_of_which_all_is_asked_for_are_not_searched() -> None:
    whole = {"net.0": {"weight_observer": "min_max"}}
    assert "sequential_mse" not in few_bits({}, Scheme(weight_observer="min_max"))
    assert "sequential_mse" not in few_bits({}, Scheme(weight_bits=4, overrides=whole))


def test_a_search_keeps_the_rungs_that_it_began_with() -> None:
    assert rungs_of([rung.name for rung in RUNGS]) == RUNGS
    earlier = [rung.name for rung in rungs_of(None)]
    assert [name for name in dict.fromkeys(rung.name for rung in RUNGS) if name not in earlier] == [
        "backend_fbgemm",
        "equalization_relu6",
        "sequential_mse",
        "adaround_blocks",
    ]
    with pytest.raises(ConfigurationError, match=r"has more steps \(magic\)"):
        rungs_of(["static", "magic"])


def test_bits_of_each_layer_are_chosen_before_all_layers_get_few() -> None:
    known = replace(KNOWN, bits={"net.0": {"weight_bits": 3}})
    found = climbed(Target(max_size_mb=0.1), lambda step: measured(step, 0.5), known)
    assert names(found)[1:3] == ["bits_by_layer", "weights_4bit"]
    assert found[1].plan.scheme.overrides == known.bits
    assert not found[2].plan.scheme.overrides, "all layers alike"
    static = Step(RUNGS[0], Plan())
    step = next_step([measured(static, 0.0)], Plan(), Target(max_size_mb=0.1), replace(KNOWN, bits=None))
    assert step is not None
    assert (step.rung.name, step.first) == ("bits_by_layer", "bits")


def test_speeds_that_are_alike_do_not_decide_what_is_gone_on_with() -> None:
    step = Step(RUNGS[0], Plan())
    slow, worse = measured(step, 0.1, 1.80), measured(step, 0.5, 1.83)
    target = Target(max_drop=0.01, min_speedup=2)
    assert to_go_on_from([slow, worse], target) is slow


def test_a_rung_that_has_nothing_to_change_is_passed_over() -> None:
    known = replace(KNOWN, epochs=(0, 0), ranking=())
    found = names(climbed(Target(max_drop=0.01), lambda step: measured(step, 0.5), known))
    assert found[-1] == "adaround"


def test_layers_are_ranked_before_the_first_rung_that_needs_it() -> None:
    attempts: list[Attempt] = []
    known = replace(KNOWN, ranking=None)
    while (step := next_step(attempts, Plan(), Target(max_drop=0.01), known)) is not None and not step.first:
        attempts.append(measured(step, 0.5))
    assert names(attempts)[-1] == "equalization"
    assert step is not None
    assert step.first == "ranking"


def test_what_the_error_comes_from_is_measured_before_the_first_step_for_accuracy_alone() -> None:
    known = replace(KNOWN, sources=None)
    static = measured(Step(RUNGS[0], Plan()), 0.5)
    step = next_step([static], Plan(), Target(max_drop=0.01), known)
    assert step is not None
    assert (step.rung.name, step.first) == ("observer_min_max", "sources")
    assert next_step([static], Plan(), Target(max_drop=0.6), known) is None
    of_size = next_step([static], Plan(), Target(max_size_mb=0.1), known)
    assert of_size is not None
    assert of_size.first == ""


def test_the_steps_for_the_larger_part_of_the_error_go_first() -> None:
    def order(weights_db: float, activations_db: float) -> list[str]:
        known = replace(KNOWN, sources=ErrorSources(weights_db, activations_db), relu6=True)
        return names(climbed(Target(max_drop=0.01), lambda step: measured(step, 0.5), known))

    of_weights, of_activations = order(22.0, 30.0), order(30.0, 22.0)
    observers = ["observer_min_max", "observer_percentile", "observer_histogram_kl"]
    recipes = ["bias_correction", "equalization", "equalization_relu6"]
    assert of_weights[:7] == ["static", *recipes, *observers]
    assert of_activations[:7] == ["static", *observers, *recipes]
    assert of_weights[7:] == of_activations[7:], "layers left float and trainings stay last"
    assert order(20.0, 21.0) == of_activations, "cheap steps go first where both are alike"
    far_apart = order(5.0, 30.0)
    assert far_apart[:4] == ["static", *recipes]
    assert far_apart[-3:] == observers, "what can bring next to nothing comes after the trainings"


def test_a_relu6_is_replaced_where_there_is_one() -> None:
    found = climbed(Target(max_drop=0.01), lambda step: measured(step, 0.5), replace(KNOWN, relu6=True))
    plans = {attempt.rung: attempt.plan for attempt in found}
    assert plans["equalization_relu6"].equalization == "replace_relu6"
    assert "equalization_relu6" not in names(climbed(Target(max_drop=0.01), lambda step: measured(step, 0.5)))


def test_with_confidence_the_search_goes_on_where_the_drop_is_undecided() -> None:
    def outcome(step: Step) -> Attempt:
        return measured(step, -0.05 if step.rung.name == "observer_percentile" else 0.005)

    assert names(climbed(Target(max_drop=0.01), outcome)) == ["static"]
    sure = Target(max_drop=0.01, confident=True)
    attempts = climbed(sure, outcome)
    assert names(attempts) == ["static", "observer_min_max", "observer_percentile"]
    assert attempts[0].verdict(sure) == "misses drop, the drop is undecided"
    assert nearest(attempts[:2], sure) is attempts[0]


def test_what_fails_is_tried_in_another_mode_and_a_training_without_its_teacher() -> None:
    def outcome(step: Step) -> Attempt:
        if step.plan.mode == "fx":
            return Attempt(step.rung.name, step.plan, error="TraceError: control flow")
        if step.plan.distillation:
            return Attempt(step.rung.name, step.plan, error="ConfigurationError: manual optimization")
        return measured(step, 0.5)

    attempts = climbed(Target(max_drop=0.01), outcome)
    assert names(attempts)[:2] == ["static", "mode_auto"]
    assert names(attempts)[-3:] == ["qat_short", "qat_short_plain", "qat_long_plain"]
    everything = climbed(Target(max_drop=0.01), lambda s: Attempt(s.rung.name, s.plan, error="NetworkError: none"))
    assert names(everything) == ["static", "mode_auto"]
    assert nearest(everything, Target(max_drop=0.01)) is None


def test_a_training_that_was_not_started_says_nothing_of_its_teacher() -> None:
    def outcome(step: Step) -> Attempt:
        if step.plan.epochs:
            return Attempt(step.rung.name, step.plan, started=False, error="not started")
        return measured(step, 0.5)

    assert names(climbed(Target(max_drop=0.01), outcome))[-2:] == ["qat_short", "qat_long"]


@given(st.data())
def test_a_ladder_ends_and_tries_nothing_twice(data: st.DataObject) -> None:
    number = st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0])
    target = Target(
        max_drop=data.draw(number), min_speedup=data.draw(number) or None, max_size_mb=data.draw(number) or 1
    )

    def outcome(step: Step) -> Attempt:
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            return Attempt(step.rung.name, step.plan, error="ConversionError: no")
        return measured(step, data.draw(number), data.draw(number), data.draw(number))

    attempts = climbed(target, outcome)
    assert len(set(names(attempts))) == len(attempts) <= len(RUNGS)
    assert not any(attempt.missed(target) == {} for attempt in attempts[:-1] if not attempt.error)


@given(st.integers(0, 12))
def test_a_ladder_that_is_broken_off_goes_on_as_it_was(at: int) -> None:
    target = Target(max_drop=0.01)
    whole = climbed(target, lambda step: measured(step, 0.5))
    stored = [Attempt.from_dict(json.loads(json.dumps(attempt.to_dict()))) for attempt in whole]
    assert stored == whole
    step = next_step(stored[:at], Plan(), target, KNOWN)
    assert step is not None
    assert (step.rung.name, step.plan) == (whole[at].rung, whole[at].plan)


def test_the_nearest_misses_the_fewest_limits_by_the_least() -> None:
    step = Step(RUNGS[0], Plan())
    target = Target(max_drop=0.1, max_size_mb=1)
    both, far, near = measured(step, 0.11, size=1.1), measured(step, 9.0, size=0.5), measured(step, 0.0, size=1.2)
    assert nearest([both, far, near], target) is near
    assert near.verdict(target) == "misses size"
    assert measured(step, 0.095, size=1.0).verdict(target) == "keeps the target, the drop is undecided"
    assert measured(step, 0.105, size=1.0).verdict(target) == "misses drop, the drop is undecided"


def test_a_plan_is_a_file_and_words() -> None:
    plan = Plan("pt2e", "x86", scheme=Scheme(weight_bits=4), exclude=("a", "b")).trained(8)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.words() == ("pt2e x86, static, 4-bit weights, 2 layers float, trained 8 epochs from the float network")


def test_a_speed_that_was_measured_on_a_busy_machine_is_called_uncertain() -> None:
    step = next_step([], Plan(), Target(min_speedup=2), KNOWN)
    assert step is not None
    quiet = replace(measured(step, 0.0, speedup=3.0), metrics={SPREAD: 0.05})
    busy = replace(quiet, metrics={SPREAD: 0.8})
    assert quiet.verdict(Target(min_speedup=2)) == "keeps the target"
    assert busy.verdict(Target(min_speedup=2)) == "keeps the target, the speed-up is uncertain on this busy machine"
    assert "uncertain" not in busy.verdict(Target(max_drop=0.1))


def test_noisy_speeds_are_measured_again_and_the_quietest_is_kept() -> None:
    spreads = iter([0.9, 0.4, 0.6, 0.0])
    assert quietest(lambda: {SPREAD: next(spreads)}) == {SPREAD: 0.4}
    assert next(spreads) == 0.0
    assert quietest(lambda: {"speedup": 2.0}) == {"speedup": 2.0}
