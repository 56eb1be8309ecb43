"""A comparison as one self-contained HTML page, which loads no other files."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import resources
from string import Template
from typing import Any

from qat_lightning.compare.comparison import Comparison, Configuration, front_of_each_task
from qat_lightning.compare.decision import Decision, Limits
from qat_lightning.compare.run import Curve, Run
from qat_lightning.compare.settings import differing, only_present, seed_of, settings_of
from qat_lightning.compare.spread import Spread, spread
from qat_lightning.compare.table import markdown, shipped
from qat_lightning.settings.variants import VARIANTS

_SCRIPTS = ("core.js", "columns.js", "table.js", "scatter.js", "curves.js", "layers.js", "ladder.js", "main.js")
_POINTS = 240  # per curve: more cannot be distinguished on a screen
_EVENTS = (
    ("rounding on", "quant/fake_quant_enabled", 1.0),
    ("ranges frozen", "quant/observers_enabled", 0.0),
    ("BatchNorm frozen", "quant/batchnorm_frozen", 1.0),
)
_VARIANTS = tuple(f"{variant}/" for variant in VARIANTS)


def page(
    comparison: Comparison, decision: Decision, limits: Limits | None = None, *, title: str = "Comparison of runs"
) -> str:
    """Render a comparison as one HTML page.

    Script, style and data are in the page, and its content security policy forbids everything else. Names and settings
    are treated as data, never as markup.

    Args:
        comparison: The comparison.
        decision: The decision.
        limits: Its limits, which are the initial filters of the page.
        title: Title of the page.

    Returns:
        The page, to be written as UTF-8.
    """
    style = _asset("page.css")
    script = '(() => {\n"use strict";\n' + "\n".join(_asset(name) for name in _SCRIPTS) + "\n})();\n"
    return Template(_asset("page.html")).substitute(
        title=html.escape(title),
        policy=f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}",
        style=style,
        script=script,
        data=_embedded(page_data(comparison, decision, limits or Limits(), title)),
        plain=html.escape(markdown(comparison, decision)),
    )


def page_data(comparison: Comparison, decision: Decision, limits: Limits, title: str) -> dict[str, Any]:
    """Return the data for the page's script, as plain values."""
    configurations = comparison.configurations
    fronts = {axis: _front(comparison, axis) for axis in ("latency_ms", "size_mb")}
    if comparison.noisy:
        fronts["latency_ms"] = [False] * len(configurations)
    firsts = [configuration.runs[0] for configuration in configurations]
    metric = comparison.metric
    return {
        "title": title,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "metric": {"name": metric.name, "larger": metric.larger_is_better, "share": metric.is_share},
        "limits": {"drop": limits.max_drop, "latency": limits.max_latency, "size": limits.max_size},
        "reason": decision.reason,
        "winner": _place(configurations, decision.winner),
        "runnerUp": _place(configurations, decision.runner_up),
        "shipped": shipped(decision.winner) if decision.winner else [],
        "settings": [setting.label for setting in comparison.settings],
        "metrics": _metric_names(comparison),
        "noisy": comparison.noisy,
        "configurations": [
            _configuration(configuration, fronts["latency_ms"][i], fronts["size_mb"][i])
            for i, configuration in enumerate(configurations)
        ],
        "differences": [
            {"key": setting.key, "values": setting.values, "part": only_present(setting.values)}
            for setting in differing(firsts, every=True)
        ],
        "same": _same(firsts),
        "ladders": [
            {"label": configuration.label, "seed": seed_of(run), **run.ladder.to_dict()}
            for configuration in configurations
            for run in configuration.runs
            if run.ladder is not None
        ],
        "leftOut": [
            {"name": " ".join(run.overrides) or run.name, "status": run.status, "reason": run.reason}
            for run in comparison.left_out
        ],
    }


def _asset(name: str) -> str:
    return resources.files("qat_lightning.compare").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """Return JSON that is safe in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(_finite(data), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return float(f"{data:.7g}") if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data if isinstance(data, int | str | type(None)) else str(data)


def _place(configurations: Sequence[Configuration], wanted: Configuration | None) -> int | None:
    return next((i for i, configuration in enumerate(configurations) if configuration is wanted), None)


def _front(comparison: Comparison, axis: str) -> list[bool]:
    """Return the Pareto front of the score and one other figure, for a two-dimensional plot."""
    sign = 1 if comparison.metric.larger_is_better else -1
    figures: list[Spread | None] = [getattr(configuration, axis) for configuration in comparison.configurations]
    points = [
        None if figure is None else (sign * configuration.score.mean, -figure.mean)
        for configuration, figure in zip(comparison.configurations, figures, strict=True)
    ]
    return front_of_each_task(comparison.configurations, points)


def _configuration(configuration: Configuration, on_latency_front: bool, on_size_front: bool) -> dict[str, Any]:
    return {
        "label": configuration.label,
        "values": list(configuration.values.values()),
        "variant": configuration.variant,
        "float": configuration.is_float,
        "baseline": configuration.baseline,
        "front": configuration.on_front,
        "noise": configuration.noise,
        "metrics": _metrics(configuration),
        "fronts": {"latency": on_latency_front, "size": on_size_front},
        "score": configuration.score,
        "drop": configuration.drop,
        "latency": configuration.latency_ms,
        "size": configuration.size_mb,
        "speedup": configuration.speedup,
        "agreement": configuration.agreement,
        "runs": [_run(run) for run in configuration.runs],
    }


def _metric_names(comparison: Comparison) -> list[str]:
    """Return all logged metrics, for the columns of the table."""
    return sorted(
        {key for configuration in comparison.configurations for run in configuration.runs for key in run.metrics}
    )


def _metrics(configuration: Configuration) -> dict[str, Spread]:
    names = sorted({key for run in configuration.runs for key in run.metrics})
    found = {
        key: spread((seed_of(run), run.metrics[key]) for run in configuration.runs if key in run.metrics)
        for key in names
    }
    return {key: figure for key, figure in found.items() if figure is not None}


def _run(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": run.folder,
        "seed": seed_of(run),
        "seconds": run.seconds,
        "curves": {key: _thinned(curve) for key, curve in sorted(run.curves.items()) if _is_drawn(key, curve)},
        "events": _events(run),
        "layers": run.layers,
    }


def _is_drawn(key: str, curve: Curve) -> bool:
    """Whether to draw a curve; not flags of the schedule (drawn as vertical lines), curves per layer, single points."""
    flags = [flag for _, flag, _ in _EVENTS]
    is_layer = key.startswith("quant/") and key.count("/") > 1
    return len(curve.steps) > 1 and key not in flags and not key.startswith(_VARIANTS) and not is_layer


def _thinned(curve: Curve) -> Curve:
    """Keep every n-th point and the last one."""
    stride = math.ceil(len(curve.steps) / _POINTS)
    last = len(curve.steps) - 1
    kept = [i for i in range(len(curve.steps)) if i % stride == 0 or i == last]
    return Curve([curve.steps[i] for i in kept], [curve.values[i] for i in kept])


def _events(run: Run) -> list[dict[str, Any]]:
    """Return the step at which each schedule point first appears in the logs, also if that is the first step."""
    events = []
    for name, key, wanted in _EVENTS:
        curve = run.curves.get(key)
        step = next((step for step, value in zip(*curve, strict=True) if value == wanted), None) if curve else None
        if step is not None:
            events.append({"name": name, "step": step})
    return events


def _same(runs: Sequence[Run]) -> dict[str, str]:
    """Return the settings that all configurations share."""
    flat = [settings_of(run) for run in runs]
    return {key: value for key, value in (flat[0] if flat else {}).items() if all(s.get(key) == value for s in flat)}
