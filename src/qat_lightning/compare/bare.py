"""Metrics of float runs without our callbacks: ``test/acc`` as ``trainer.test`` logs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from qat_lightning.compare.quantizing import quantizes
from qat_lightning.compare.run import Run
from qat_lightning.compare.settings import flatten
from qat_lightning.settings.variants import VARIANTS

_TEST = re.compile(r"test(?![a-z])", re.IGNORECASE)


def was_tested(metrics: Mapping[str, float]) -> bool:
    """Whether there is a metric of a variant, or one whose name is that of a test metric.

    Example:
        >>> was_tested({"int8/acc": 0.9}), was_tested({"test_acc": 0.9}), was_tested({"val/acc": 0.9})
        (True, True, False)
    """
    return _has_variant(metrics) or any(_TEST.match(key) for key in metrics)


def with_bare_tests(run: Run) -> Run:
    """Return a run with its plain test metrics added as those of float, unless one of our callbacks logged variants.

    Example:
        >>> with_bare_tests(Run("a", "a", metrics={"test/acc": 0.9, "val/acc": 0.8})).metrics
        {'test/acc': 0.9, 'val/acc': 0.8, 'float/test/acc': 0.9}
    """
    if _has_variant(run.metrics):
        return run
    if quantizes(flatten(run.config)):
        return run
    found = {f"float/{key}": value for key, value in run.metrics.items() if _TEST.match(key)}
    return replace(run, metrics={**run.metrics, **found}) if found else run


def _has_variant(metrics: Mapping[str, float]) -> bool:
    return any(key.startswith(tuple(f"{variant}/" for variant in VARIANTS)) for key in metrics)
