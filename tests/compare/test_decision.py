import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.compare import Limits, compare, decide
from qat_lightning.compare.tasks import only
from qat_lightning.errors import ConfigurationError
from tests.compare.making import plain, qat

RUNS = [
    plain(acc=0.98),
    qat("fx", acc=0.979, latency=3.0, size=1.0),
    qat("pt2e", acc=0.976, latency=2.0, size=1.1),
    qat("eager", acc=0.95, latency=1.0, size=0.9),
]


@pytest.mark.parametrize(
    ("limits", "winner", "runner_up"),
    [
        ({"max_drop": 0.5}, "qat pt2e", "qat fx"),
        ({"max_drop": 0.2}, "qat fx", None),
        ({"max_latency": 2.5}, "qat pt2e", "qat eager"),
        ({"max_size": 1.05}, "qat fx", "qat eager"),
        ({"max_drop": 0.5, "max_latency": 2.5, "max_size": 1.2}, "qat pt2e", None),
        ({"max_drop": 0.5, "prefer": "score"}, "qat fx", "qat pt2e"),
        ({"prefer": "size"}, "qat eager", "qat fx"),
    ],
)
def test_the_best_that_keeps_the_limits_wins(limits, winner, runner_up):
    decision = decide(compare(RUNS), Limits(**limits))
    assert decision.winner.label == winner
    assert (decision.runner_up and decision.runner_up.label) == runner_up
    assert winner in decision.reason
    assert runner_up is None or f"Runner-up: {runner_up}" in decision.reason


def test_where_nothing_qualifies_the_closest_is_named_with_what_it_misses():
    decision = decide(compare(RUNS), Limits(max_drop=0.2, max_latency=2.5))
    assert decision.winner is None
    assert decision.reason == (
        "None of 3 int8 configurations keeps a drop of at most 0.2 pp and a latency of at most 2.5 ms. "
        "Closest is qat fx, whose latency is 3 ms."
    )


def test_a_float_run_is_no_candidate_and_where_it_beats_all_that_is_said():
    decision = decide(compare(RUNS), Limits(max_drop=0.0))
    assert decision.winner is None
    assert "None of 3 int8 configurations" in decision.reason
    fast = plain(metrics={"float/test/acc": 0.98, "float/latency_ms": 0.5, "float/size_mb": 4.2})
    by_latency = decide(compare([fast, *RUNS[1:]]), Limits(max_drop=5, prefer="latency"))
    assert by_latency.winner.label == "qat eager"
    assert (
        "Float beats every int8 network in latency, so there is nothing to gain in speed: 0.5 ms" in by_latency.reason
    )
    by_score = decide(compare(RUNS), Limits(prefer="score"))
    assert "Float beats every int8 network in score: test/acc 98.00 %." in by_score.reason
    assert "Float" not in decide(compare(RUNS), Limits(max_drop=0.5)).reason


def test_float_that_beats_the_choice_but_not_every_int8_network_is_said_to_do_just_that():
    float_run = plain(metrics={"float/test/acc": 0.98, "float/latency_ms": 1.5, "float/size_mb": 4.2})
    decision = decide(compare([float_run, *RUNS[1:]]), Limits(max_drop=0.5))
    assert decision.winner.label == "qat pt2e"
    assert "Float beats the choice in latency" in decision.reason, "qat eager is faster than float"


def test_a_figure_at_its_limit_keeps_it_whatever_arithmetic_adds_to_it():
    runs = [plain(acc=0.98), qat("fx", acc=0.975)]
    assert 100 * (0.98 - 0.975) > 0.5
    assert decide(compare(runs), Limits(max_drop=0.5)).winner is not None
    assert decide(compare(runs), Limits(max_drop=0.499)).winner is None


def busy(runs):
    """The same runs with other work: in the second, everything took five times as long."""
    first, *rest = runs
    slow = {k: 5 * v if k.endswith("latency_ms") else v for k, v in first.metrics.items()}
    return [dataclasses.replace(first, metrics=slow), *rest]


def test_latencies_measured_beside_other_work_decide_nothing():
    comparison = compare([qat("pt2e", acc=0.976, latency=2.0), *busy([qat("fx", acc=0.979, latency=3.0)])])
    assert comparison.noisy
    assert decide(comparison, Limits(max_drop=0.5, prefer="latency")).winner is None
    fallen_back = decide(comparison, Limits(max_drop=100))
    assert fallen_back.winner.label == "fx"
    assert "Latency is ignored" in fallen_back.reason
    assert "--remeasure" in fallen_back.reason
    limited = decide(comparison, Limits(max_latency=100, prefer="score"))
    assert limited.winner.label == "pt2e"
    assert all(c.on_front for c in comparison.configurations if c.label == "fx"), "the front is that of score and size"


def test_without_limits_nothing_is_chosen():
    decision = decide(compare(RUNS), Limits())
    assert decision.winner is None
    assert "no limit was given" in decision.reason


def test_a_difference_within_the_spread_over_seeds_is_said():
    runs = [qat("fx", seed, latency=2 + 0.5 * seed) for seed in (0, 1)]
    runs += [qat("pt2e", seed, latency=2.1 + 0.5 * seed) for seed in (0, 1)]
    assert "within the spread over seeds" in decide(compare(runs), Limits(max_drop=100)).reason
    assert "within the spread" not in decide(compare(RUNS), Limits(max_drop=0.5)).reason


def test_what_was_only_simulated_cannot_be_shipped():
    simulated = qat("fx", metrics={"fake_quant/test/acc": 1.0, "float/test/acc": 1.0})
    assert decide(compare([simulated]), Limits(max_drop=1)).winner is None
    assert "Nothing can be shipped" in decide(compare([simulated]), Limits(max_drop=1)).reason


def test_a_limited_figure_that_was_not_measured_does_not_pass():
    unmeasured = qat("fx", metrics={"int8/test/acc": 0.9})
    decision = decide(compare([unmeasured]), Limits(max_latency=100))
    assert decision.winner is None
    assert "latency is not known" in decision.reason


def without(figure, *runs):
    return [dataclasses.replace(run, metrics={k: v for k, v in run.metrics.items() if figure not in k}) for run in runs]


@pytest.mark.parametrize(("figure", "goal"), [("latency_ms", "latency"), ("size_mb", "size")])
def test_a_figure_that_no_run_has_decides_nothing(figure, goal):
    runs = without(figure, *RUNS)
    asked = decide(compare(runs), Limits(prefer=goal))
    assert asked.winner is None
    assert f"No run is chosen by {goal}: it is not known of any of the 3 candidates." in asked.reason
    assert "evaluate_variants" in asked.reason
    by_drop = decide(compare(runs), Limits(max_drop=0.5))
    assert by_drop.winner.label == ("qat fx" if goal == "latency" else "qat pt2e")
    assert ("Latency is ignored: it is not known" in by_drop.reason) == (goal == "latency")
    assert "not measured" not in by_drop.reason


def test_candidates_without_the_figure_that_decides_are_named():
    runs = [RUNS[0], *without("latency_ms", RUNS[1]), *RUNS[2:]]
    decision = decide(compare(runs), Limits(max_drop=0.5))
    assert decision.winner.label == "qat pt2e"
    assert "The latency of qat fx is not known." in decision.reason


def test_a_tie_is_not_decided_by_a_disturbed_latency():
    runs = busy([qat("fx", latency=1.0, size=2.0), qat("pt2e", latency=9.0, size=1.0)])
    comparison = compare(runs)
    assert comparison.noisy
    assert decide(comparison, Limits(max_drop=100, prefer="score")).winner.label == "pt2e", "it is smaller"


@pytest.mark.parametrize(
    "limits",
    [
        {"max_drop": math.nan},
        {"max_latency": 0},
        {"max_size": -1},
        {"max_size": True},
        {"prefer": "speed"},
        {"max_drop": "1"},
    ],
)
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ConfigurationError):
        Limits(**limits)


limit = st.none() | st.floats(0.01, 5)


@given(limit, limit, limit, st.sampled_from([None, "score", "latency", "size"]))
def test_the_winner_keeps_every_limit_and_nothing_that_does_is_better(max_drop, max_latency, max_size, prefer):
    comparison = compare(RUNS)
    limits = Limits(max_drop, max_latency, max_size, prefer)
    decision = decide(comparison, limits)

    def keeps(c):
        drop = c.drop.mean if c.drop else 0.0
        pairs = [(drop, max_drop), (c.latency_ms.mean, max_latency), (c.size_mb.mean, max_size)]
        return all(
            bound is None or value <= bound or math.isclose(value, bound, rel_tol=1e-6) for value, bound in pairs
        )

    fit = [c for c in comparison.configurations if c.variant == "int8" and keeps(c)]
    if not limits.given or not fit:
        assert decision.winner is None
        return
    assert decision.winner in fit
    best = {"score": lambda c: -c.score.mean, "latency": lambda c: c.latency_ms.mean, "size": lambda c: c.size_mb.mean}
    assert best[limits.goal](decision.winner) == min(map(best[limits.goal], fit))


def of_task(run, data):
    return dataclasses.replace(
        run, config=run.config | {"data": {"name": data, "datamodule": {"_target_": f"my.{data}"}}}
    )


def test_each_task_has_its_own_front_and_nothing_is_chosen_across_tasks():
    easy = [of_task(run, "digits") for run in RUNS]
    hard = [of_task(qat("fx", acc=0.7, latency=3.5, size=1.2), "photos")]
    both = compare([*hard, *easy])
    assert [str(c.task) for c in both.configurations] == ["photos", *["digits"] * 4]
    alone = {c.score.mean for c in compare(easy).front}
    assert {c.score.mean for c in both.front} == {*alone, 0.7}
    decision = decide(both, Limits(max_drop=0.5))
    assert decision.winner is None
    assert decision.reason == (
        "No run is chosen, because the runs are of 2 tasks (photos, digits), and scores compare only within a task: "
        "--only 'data.name=photos' compares one of them."
    )
    chosen = only([*hard, *easy], ["data.name=digits"])
    assert decide(compare(chosen), Limits(max_drop=0.5)).winner.label == "qat pt2e"


def test_networks_with_other_metrics_are_other_tasks_and_other_settings_are_not():
    def stating(run, **model):
        return dataclasses.replace(run, config=run.config | {"model": {"width": 8} | model})

    by_accuracy = stating(qat("fx"), metric={"name": "acc", "mode": "max"})
    by_loss = stating(qat("pt2e"), metric={"name": "loss", "mode": "min"})
    assert "2 tasks (acc, loss)" in decide(compare([by_accuracy, by_loss], metric="test/acc"), Limits()).reason
    assert len(compare([stating(qat("fx")), stating(qat("fx"), width=16)]).tasks) == 1


def test_a_setting_that_no_run_has_is_an_error_that_lists_the_values():
    with pytest.raises(
        ConfigurationError, match=r"'mode.name=eagre': no run has this setting. Values of mode.name: eager, fx"
    ):
        only(RUNS, ["mode.name=eagre"])
    with pytest.raises(ConfigurationError, match="give KEY=VALUE"):
        only(RUNS, ["mode.name"])
