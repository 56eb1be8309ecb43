"""Which metric is compared, which way it is better, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qat_lightning.compare.run import Run
from qat_lightning.errors import ConfigurationError
from qat_lightning.run.evaluate import MEASURED
from qat_lightning.run.metric import ModelMetric
from qat_lightning.settings.variants import VARIANTS

_BEST_FIRST = ("acc", "accuracy", "top1", "f1", "auroc", "map", "iou", "miou", "dice", "r2", "psnr")
_SMALLER_IS_BETTER = ("loss", "error", "err", "mse", "rmse", "mae", "perplexity", "ppl", "wer", "cer", "nll")


@dataclass(frozen=True)
class Metric:
    """The metric that stands for how good a network is.

    Args:
        name: Its key behind a variant's name: ``test/acc`` of ``int8/test/acc``.
        larger_is_better: Which way.
        is_share: Whether it is shown in percent, and drops in percentage points.
    """

    name: str
    larger_is_better: bool = True
    is_share: bool = False

    @property
    def drop_unit(self) -> str:
        """Of a drop: percentage points, or nothing."""
        return "pp" if self.is_share else ""

    def text(self, value: float) -> str:
        """A value as it is shown.

        Example:
            >>> Metric("test/acc", is_share=True).text(0.9821), Metric("test/loss").text(0.1)
            ('98.21 %', '0.1000')
        """
        return f"{100 * value:.2f} %" if self.is_share else f"{value:.4f}"

    def shown(self, value: float) -> float:
        """A value in the unit that is shown."""
        return 100 * value if self.is_share else value

    def loss(self, value: float, baseline: float) -> float:
        """How much worse a value is than the baseline, in the unit that is shown; negative where it is better.

        Example:
            >>> round(Metric("test/acc", is_share=True).loss(0.97, 0.98), 6)
            1.0
        """
        worse = baseline - value if self.larger_is_better else value - baseline
        return self.shown(worse)


def choose_metric(runs: Sequence[Run], name: str | None = None, larger_is_better: bool | None = None) -> Metric:
    """Find the metric to compare by.

    Args:
        runs: The runs.
        name: Its name behind the variant's; by default what the models of the runs are judged by (``model.metric``), or
            else an accuracy if there is one, another known score, a loss, or the only metric that there is.
        larger_is_better: Which way; by default as the models say of their metric, and of another one as its name says.

    Returns:
        The metric. A score within 0 and 1 in every run is shown in percent.

    Raises:
        ConfigurationError: There is no such metric, or the choice is not clear, with those that there are.

    Example:
        >>> choose_metric([Run("a", "a", metrics={"int8/test/loss": 0.1, "int8/test/acc": 0.9})])
        Metric(name='test/acc', larger_is_better=True, is_share=True)
    """
    names = list(dict.fromkeys(key for run in runs for key in _own(run.metrics)))
    stated = _stated(runs)
    if name is None:
        name = stated.logged("test") if stated and stated.logged("test") in names else _best(names)
    elif name not in names:
        raise ConfigurationError(
            f"No run has the metric {name!r} of a variant. Available: {', '.join(names) or 'none'}."
        )
    if larger_is_better is None and stated is not None and name.rpartition("/")[2] == stated.name:
        larger_is_better = stated.larger_is_better
    elif larger_is_better is None:
        larger_is_better = not _is_called(name, _SMALLER_IS_BETTER)
    values = [value for run in runs for key, value in run.metrics.items() if key.partition("/")[2] == name]
    share = larger_is_better and all(0 <= value <= 1 for value in values)
    return Metric(name, larger_is_better, share)


def _stated(runs: Sequence[Run]) -> ModelMetric | None:
    """What all models are judged by that say it; None where they differ."""
    metrics = {metric for run in runs if (metric := ModelMetric.of(run.config)) is not None}
    return metrics.pop() if len(metrics) == 1 else None


def _own(keys: Iterable[str]) -> list[str]:
    """The LightningModule's metrics among those of a variant."""
    parted = [key.partition("/")[::2] for key in keys]
    return [rest for variant, rest in parted if variant in VARIANTS and rest and rest not in MEASURED]


def _best(names: Sequence[str]) -> str:
    for words in (*((word,) for word in _BEST_FIRST), _SMALLER_IS_BETTER):
        if found := next((name for name in names if _is_called(name, words)), None):
            return found
    if len(names) == 1:
        return names[0]
    raise ConfigurationError(
        f"Which metric is compared? Use --metric with one of {', '.join(names)}."
        if names
        else "No run has a metric of a variant, such as int8/test/acc. evaluate_variants(trainer, model) logs them."
    )


def _is_called(name: str, words: Sequence[str]) -> bool:
    return name.rpartition("/")[2].lower().replace("-", "_") in words or any(
        part in words for part in name.lower().replace("/", "_").replace("-", "_").split("_")
    )
