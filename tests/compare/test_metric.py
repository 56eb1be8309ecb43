import pytest

from qat_lightning.compare import Run
from qat_lightning.compare.metric import choose_metric
from qat_lightning.errors import ConfigurationError


def runs(*names, value=0.5):
    return [Run("a", "a", metrics=dict.fromkeys(names, value))]


@pytest.mark.parametrize(
    ("names", "chosen", "larger"),
    [
        (["int8/test/loss", "int8/test/acc"], "test/acc", True),
        (["int8/test/loss", "int8/test/top1_accuracy"], "test/top1_accuracy", True),
        (["float/test/loss", "float/size_mb"], "test/loss", False),
        (["int8/test/rmse"], "test/rmse", False),
        (["int8/test/quality"], "test/quality", True),
        (["int8/test_f1"], "test_f1", True),
    ],
)
def test_the_metric_is_found_with_its_direction(names, chosen, larger):
    metric = choose_metric(runs(*names))
    assert (metric.name, metric.larger_is_better) == (chosen, larger)


def of_models(*metrics, **logged):
    return [Run("a", "a", config={"model": {"metric": metric}}, metrics=logged) for metric in metrics]


def test_the_metric_of_the_models_is_compared():
    logged = {"int8/test/acc": 0.5, "int8/test/perplexity": 4.0, "int8/test/wealth": 3.0}
    by_name, either = {"name": "perplexity", "mode": "min"}, {"name": "wealth", "mode": "min"}
    for stated, name in ((by_name, "test/perplexity"), (either, "test/wealth")):
        metric = choose_metric(of_models(stated, None, **logged))
        assert (metric.name, metric.larger_is_better, metric.is_share) == (name, False, False)
    assert choose_metric(of_models(by_name, either, **logged)).name == "test/acc"
    assert choose_metric(of_models({"name": "miou", "mode": "max"}, **logged)).name == "test/acc"
    assert choose_metric(of_models(either, **logged), "test/perplexity").larger_is_better is False


@pytest.mark.parametrize("model", ["resnet", {"metric": "acc"}, {"metric": {"name": "x"}}, None])
def test_the_configuration_of_another_program_states_no_metric(model):
    assert choose_metric([Run("a", "a", config={"model": model}, metrics={"int8/test/acc": 0.5})]).name == "test/acc"


def test_only_scores_within_0_and_1_are_shares():
    assert choose_metric(runs("int8/test/acc")).is_share
    assert not choose_metric(runs("int8/test/acc", value=97.0)).is_share
    assert not choose_metric(runs("int8/test/loss")).is_share


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        *(
            (name, False)
            for name in ("test/MeanSquaredError", "test_WordErrorRate", "test/BCELoss", "testLoss", "mape")
        ),
        *((name, True) for name in ("test/MulticlassAccuracy", "test/F1Score", "test/mAP", "val-AUROC", "test/top5")),
    ],
)
def test_the_direction_is_read_from_a_name_in_any_spelling(name: str, larger: bool) -> None:
    assert choose_metric(runs(f"int8/{name}"), name).larger_is_better is larger


def test_a_direction_that_no_name_says_is_asked_for() -> None:
    with pytest.raises(ConfigurationError, match="--goal max or --goal min"):
        choose_metric(runs("int8/test/wibble"))
    assert choose_metric(runs("int8/test/wibble"), larger_is_better=True).larger_is_better


def test_what_is_said_wins():
    metric = choose_metric(runs("int8/test/acc", "int8/test/loss"), "test/loss", larger_is_better=True)
    assert (metric.name, metric.larger_is_better) == ("test/loss", True)


@pytest.mark.parametrize(
    ("names", "said", "message"),
    [
        (["int8/test/a", "int8/test/b"], None, "--metric with one of test/a, test/b"),
        (["int8/test/acc"], "test/accc", "Available: test/acc"),
        (["train/loss", "int8/size_mb"], None, "evaluate_variants"),
    ],
)
def test_an_unclear_metric_is_an_error_that_lists_what_there_is(names, said, message):
    with pytest.raises(ConfigurationError) as error:
        choose_metric(runs(*names), said)
    assert message in str(error.value)


def test_drops_are_in_percentage_points_and_a_larger_loss_is_a_drop():
    assert choose_metric(runs("int8/test/acc")).loss(0.97, 0.98) == pytest.approx(1.0)
    assert choose_metric(runs("int8/test/loss")).loss(0.3, 0.1) == pytest.approx(0.2)
