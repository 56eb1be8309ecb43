"""The compared metric: its choice, direction and display."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qat_lightning.compare.run import Run
from qat_lightning.errors import ConfigurationError
from qat_lightning.run.evaluate import MEASURED
from qat_lightning.run.metric import ModelMetric, settled
from qat_lightning.settings.variants import VARIANTS

_BEST_FIRST = ("acc", "accuracy", "top1", "f1", "auroc", "map", "iou", "miou", "dice", "r2", "psnr")
_LARGER_IS_BETTER = (
    *_BEST_FIRST,
    *("agreement", "ap", "auc", "bleu", "correct", "hit", "jaccard", "kappa", "match", "mcc", "meteor", "mrr", "ndcg"),
    *("pearson", "precision", "quality", "recall", "rouge", "score", "sensitivity", "similarity", "snr", "spearman"),
    *("specificity", "ssim", "top5"),
)
_SMALLER_IS_BETTER = (
    *("loss", "error", "err", "mse", "rmse", "mae", "perplexity", "ppl", "wer", "cer", "nll"),
    *("bce", "brier", "cost", "deviation", "distance", "divergence", "entropy", "fid", "kl", "lpips", "mape", "smape"),
)


@dataclass(frozen=True)
class Metric:
    """The metric by which networks are compared.

    Args:
        name: Its key without the variant's name: ``test/acc`` for ``int8/test/acc``.
        larger_is_better: Its direction.
        is_share: Whether it is shown in percent, and drops in percentage points.
    """

    name: str
    larger_is_better: bool = True
    is_share: bool = False

    @property
    def drop_unit(self) -> str:
        """Unit of a drop: ``pp`` (percentage points), or empty."""
        return "pp" if self.is_share else ""

    def text(self, value: float) -> str:
        """Format a value.

        Example:
            >>> Metric("test/acc", is_share=True).text(0.9821), Metric("test/loss").text(0.1)
            ('98.21 %', '0.1000')
        """
        return f"{100 * value:.2f} %" if self.is_share else f"{value:.4f}"

    def shown(self, value: float) -> float:
        """Return a value in the displayed unit."""
        return 100 * value if self.is_share else value

    def loss(self, value: float, baseline: float) -> float:
        """Return how much worse a value is than the baseline, in the displayed unit; negative if it is better.

        Example:
            >>> Metric("test/acc", is_share=True).loss(0.97, 0.98)
            1.0
        """
        worse = baseline - value if self.larger_is_better else value - baseline
        return self.shown(settled(worse, max(abs(value), abs(baseline))))


def choose_metric(runs: Sequence[Run], name: str | None = None, larger_is_better: bool | None = None) -> Metric:
    """Find the metric to compare by.

    Args:
        runs: The finished runs.
        name: Its name without the variant's; by default the models' own (``model.metric``), otherwise an accuracy,
            another known score, a loss, or the only metric that exists.
        larger_is_better: Its direction; by default as stated by the models, or guessed from its name.

    Returns:
        The metric. A score between 0 and 1 in every run is shown in percent.

    Raises:
        ConfigurationError: There is no such metric, or the choice is not clear; the message lists the metrics.

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
            f"No finished run has the metric {name!r} of a variant. Available: {', '.join(names) or 'none'}."
        )
    if larger_is_better is None and stated is not None and name.rpartition("/")[2] == stated.name:
        larger_is_better = stated.larger_is_better
    elif larger_is_better is None:
        larger_is_better = _direction(name)
    values = [value for run in runs for key, value in run.metrics.items() if key.partition("/")[2] == name]
    share = larger_is_better and all(0 <= value <= 1 for value in values)
    return Metric(name, larger_is_better, share)


def _direction(name: str) -> bool:
    """Whether larger is better, as the name says."""
    if _is_called(name, _SMALLER_IS_BETTER):
        return False
    if _is_called(name, _LARGER_IS_BETTER):
        return True
    raise ConfigurationError(
        f"Is a larger {name!r} better or worse? Its name does not say: use --goal max or --goal min, in Python "
        "larger_is_better=, or let the model state its metric."
    )


def _stated(runs: Sequence[Run]) -> ModelMetric | None:
    """Return the metric stated by the models; None if they differ."""
    metrics = {metric for run in runs if (metric := ModelMetric.of(run.config)) is not None}
    return metrics.pop() if len(metrics) == 1 else None


def _own(keys: Iterable[str]) -> list[str]:
    """Return the LightningModule's own metrics among those of a variant."""
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
        else "No finished run has a metric of a variant, such as int8/test/acc. "
        "evaluate_variants(trainer, model) logs them."
    )


def _is_called(name: str, words: Sequence[str]) -> bool:
    """Whether a name has one of the words, in any spelling: ``word_error``, ``test/Word-Error``, ``WordErrorRate``."""
    parts = re.split(r"[^a-zA-Z0-9]+", name)
    within = [word for part in parts for word in _CASE_CHANGES.split(part)]
    return any(word.lower() in words for word in (name.rpartition("/")[2], *parts, *within))


_CASE_CHANGES = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
