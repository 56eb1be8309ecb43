"""Logging to W&B for comparing runs: summaries, plots of the variants, the int8 file, a report."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from qat_lightning.errors import ConfigurationError, MissingExtraError
from qat_lightning.settings.variants import VARIANTS
from qat_lightning.storage import Place

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import Report

STEP = "trainer/global_step"  # WandbLogger's own axis
COSTS = ("size_mb", "latency_ms")


def define_summaries(logger: WandbLogger, callbacks: Iterable[Callback]) -> None:
    """Let W&B keep the best and the last value of metrics that select checkpoints, instead of the last only.

    Args:
        logger: A logger with an active run.
        callbacks: The Trainer's callbacks: what a ModelCheckpoint or an EarlyStopping monitors is summarized according
            to its mode.
    """
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and callback.monitor is not None:
            best = f"{callback.mode},last"
            logger.experiment.define_metric(callback.monitor, step_metric=STEP, step_sync=True, summary=best)


def log_variants(logger: WandbLogger, summary: Mapping[str, float], step: int) -> None:
    """Log the comparison of the variants: in the summary, as a table, as bars, and as plots of metric against cost.

    If several runs are selected, W&B merges their plots.

    Args:
        logger: The logger.
        summary: Result of `qat_lightning.run.evaluate.evaluate_variants`; finite.
        step: The optimizer step of the variants' weights.
    """
    import wandb

    run = logger.experiment
    names, columns = _axes(summary)
    views: dict[str, Any] = {}
    if names:
        rows = [[name, *(summary.get(f"{name}/{column}") for column in columns)] for name in names]
        views["variants/table"] = wandb.Table(columns=["variant", *columns], data=rows)
    for metric in (column for column in columns if column not in COSTS):
        bars = [[name, summary[f"{name}/{metric}"]] for name in names if f"{name}/{metric}" in summary]
        table = wandb.Table(columns=["variant", metric], data=bars)
        views[f"variants/{metric}"] = wandb.plot.bar(table, "variant", metric, title=f"{metric} of the variants")
        for cost in COSTS:
            both = [name for name in names if {f"{name}/{metric}", f"{name}/{cost}"} <= summary.keys()]
            if both:
                points = [[name, summary[f"{name}/{cost}"], summary[f"{name}/{metric}"]] for name in both]
                table = wandb.Table(columns=["variant", cost, metric], data=points)
                title = f"{metric} against {cost}"
                views[f"variants/{metric}_against_{cost}"] = wandb.plot.scatter(table, cost, metric, title=title)
    run.log({**views, STEP: step})
    run.summary.update(dict(summary))


def log_int8(logger: WandbLogger, path: Place, summary: Mapping[str, float], aliases: Sequence[str] = ()) -> None:
    """Log the file of an int8 network as an artifact, with its figures.

    The file is not copied: it is uploaded from its path; offline, when the run is synced.

    Args:
        logger: The logger.
        path: The file, written by ``qat.save(path)``.
        summary: Figures; the finite ones of int8 become the artifact's metadata.
        aliases: Aliases of the artifact besides ``latest``, such as ``seed-0``.
    """
    figures = {key: value for key, value in summary.items() if not key.startswith(("float/", "fake_quant/"))}
    log_artifact(logger, "int8-network", [path], figures, aliases)


def log_artifact(
    logger: WandbLogger, kind: str, files: Sequence[Place], figures: Mapping[str, float], aliases: Sequence[str] = ()
) -> None:
    """Log files as one artifact of W&B, named after the run; they are uploaded from their paths.

    Args:
        logger: The logger.
        kind: Type of the artifact: ``int8-network``, ``onnx-network``.
        files: The files; those in other storage are stored as references to their URLs.
        figures: Figures; the finite ones become its metadata.
        aliases: Aliases besides ``latest``.
    """
    import wandb

    run = logger.experiment
    of_run = f"{run.group}-{run.name}" if run.group else run.name or run.id
    name = re.sub(r"[^\w.-]+", "-", of_run if kind == "int8-network" else f"{of_run}-{kind}")
    finite = {key: value for key, value in figures.items() if math.isfinite(value)}
    artifact = wandb.Artifact(name[-128:], type=kind, metadata=finite)
    for file in files:
        if isinstance(file, str):
            artifact.add_reference(file, checksum=False)
        else:
            artifact.add_file(str(file), policy="immutable")
    run.log_artifact(artifact, aliases=["latest", *aliases])


def report(
    entity: str, project: str, group: str, *, metric: str = "test/acc", title: str | None = None, save: bool = True
) -> Report:
    """Make a W&B Report that compares the runs of a group.

    It has the metric against latency and against size, bars by configuration, training curves, and the table of runs.

    Args:
        entity: Owner of the project.
        project: Name of the project.
        group: The runs' group; train.py names it after data and network.
        metric: The metric, without the variant's name before it.
        title: Title of the report.
        save: Whether to save it on W&B's server, which requires a login; ``report.url`` is its address.

    Returns:
        The report.

    Raises:
        MissingExtraError: wandb-workspaces is not installed.
        ConfigurationError: A name is empty.

    Example:
        >>> report("me", "qat-lightning", "digits-small_mobilenet", save=False).title
        'Int8 networks of digits-small_mobilenet'
    """
    for name, value in {"entity": entity, "project": project, "group": group, "metric": metric}.items():
        if not value:
            raise ConfigurationError(f"{name}={value!r} is empty: a report needs entity, project, group and metric.")
    try:
        reports: Any = importlib.import_module("wandb_workspaces.reports.v2")
        expr: Any = importlib.import_module("wandb_workspaces.expr")
    except ImportError as error:
        raise MissingExtraError("A report needs wandb-workspaces: pip install 'qat-lightning[reports]'.") from error
    runs = reports.Runset(entity=entity, project=project, name=group, filters=[expr.Metric("group") == group])
    made: Report = reports.Report(
        entity=entity,
        project=project,
        title=title or f"Int8 networks of {group}",
        description=f"Float, fake-quant and int8 of every run in {group}, from qat-lightning.",
        width="fluid",
        blocks=[
            reports.H2(text="What each network costs"),
            reports.PanelGrid(runsets=[runs], panels=_cost_panels(reports, metric)),
            reports.H2(text="How they trained"),
            reports.PanelGrid(runsets=[runs], panels=_training_panels(reports, metric)),
            reports.H2(text="What they differ in"),
            reports.PanelGrid(
                runsets=[runs], panels=[reports.RunComparer(diff_only=True, layout=_place(reports, 0, 24))]
            ),
        ],
    )
    return made.save() if save else made


def _axes(summary: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """The variants in a summary, and the figures that they have."""
    keys = [key.partition("/")[::2] for key in summary]
    names: list[str] = [name for name in VARIANTS if any(variant == name for variant, _ in keys)]
    found = dict.fromkeys(rest for variant, rest in keys if variant in VARIANTS and rest not in ("step", *COSTS))
    metrics = [metric for metric in found if metric not in ("agreement", "sqnr_db")]
    return names, [*metrics, *(cost for cost in COSTS if any(f"{name}/{cost}" in summary for name in names))]


def _place(reports: Any, column: int, width: int, row: int = 0, height: int = 8) -> Any:
    """A panel's place on W&B's grid of 24 columns."""
    return reports.Layout(x=column, y=row, w=width, h=height)


def _cost_panels(reports: Any, metric: str) -> list[Any]:
    def figure(name: str) -> Any:
        return reports.SummaryMetric(name)

    scores = [f"{variant}/{metric}" for variant in VARIANTS]
    return [
        reports.ScatterPlot(
            title=f"{metric} against latency",
            x=figure("int8/latency_ms"),
            y=figure(f"int8/{metric}"),
            layout=_place(reports, 0, 12),
        ),
        reports.ScatterPlot(
            title=f"{metric} against size",
            x=figure("int8/size_mb"),
            y=figure(f"int8/{metric}"),
            layout=_place(reports, 12, 12),
        ),
        reports.BarPlot(
            title=f"{metric} of the variants, mean over runs of one name",
            metrics=scores,
            groupby="Name",
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            layout=_place(reports, 0, 12, row=8),
        ),
        reports.ParallelCoordinatesPlot(
            title="From settings to figures",
            columns=[
                reports.ParallelCoordinatesPlotColumn(metric=reports.Config(setting))
                for setting in ("method.name", "quantization.mode", "quantization.backend")
            ]
            + [
                reports.ParallelCoordinatesPlotColumn(metric=figure(name))
                for name in ("int8/size_mb", "int8/latency_ms", f"int8/{metric}")
            ],
            layout=_place(reports, 12, 12, row=8),
        ),
    ]


def _training_panels(reports: Any, metric: str) -> list[Any]:
    validated = f"val/{metric.rpartition('/')[2]}"
    schedule = ["quant/fake_quant_enabled", "quant/observers_enabled", "quant/batchnorm_frozen"]
    return [
        reports.LinePlot(title=validated, x=STEP, y=[validated], layout=_place(reports, 0, 12)),
        reports.LinePlot(title="Schedule", x=STEP, y=schedule, layout=_place(reports, 12, 12)),
    ]
