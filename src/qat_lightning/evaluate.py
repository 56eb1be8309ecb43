"""Test every variant of a network, measure it, and write the comparison where the run's results are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from rich.console import Console
from rich.table import Table
from torch import nn

from qat_lightning.measure import latency_interleaved, size_mb

TIMED = ("float", "int8")  # fake-quant is a step of training, nothing that is shipped


class HasVariants(Protocol):
    """What a quantization callback offers for evaluation."""

    variants: tuple[str, ...]
    fidelity: Mapping[str, float]
    example_inputs_: tuple[tuple[Any, ...], dict[str, Any]]

    def use_variant(self, name: str | None) -> None:
        """Choose what the Trainer evaluates."""

    def network(self, name: str) -> nn.Module:
        """The network of a variant, on the CPU."""


def evaluate_variants(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    dataloaders: Any = None,
) -> dict[str, float]:
    """Test the float, fake-quant and int8 variants that there are, measure float and int8, and compare.

    Every metric of `trainer.test` is logged behind the name of its variant (``int8/test/acc``), never bare. All that is
    returned is also in the loggers: in W&B in the run's summary, in others as metrics. A table goes to the terminal.

    Args:
        trainer: The Trainer that fitted the model. Without a callback that has variants, only ``float`` is tested.
        model: The fitted LightningModule.
        datamodule: As for `trainer.test`.
        dataloaders: As for `trainer.test`.

    Returns:
        The metrics of each variant, ``float/size_mb``, ``int8/size_mb``, ``size_ratio``, ``float/latency_ms``,
        ``int8/latency_ms``, ``speedup``, ``int8/agreement`` and ``int8/sqnr_db``: those that exist.
    """
    source = _source(trainer)
    summary: dict[str, float] = {}
    for name in source.variants if source else ("float",):
        summary |= _test(trainer, model, name, source, datamodule=datamodule, dataloaders=dataloaders)
        if source and name == "int8":
            summary |= {f"int8/{key}": value for key, value in source.fidelity.items()}
    if trainer.is_global_zero:
        summary |= _measure(source)
        _write(trainer.loggers, summary, trainer.global_step)
        Console().print(variants_table(summary))
    return summary


def variants_table(summary: Mapping[str, float]) -> Table:
    """Lay out what `evaluate_variants` returns: a row for each variant.

    Args:
        summary: Its result, or a part of it.

    Returns:
        A table for `rich.print`.

    Example:
        >>> table = variants_table({"float/test/acc": 0.981, "int8/test/acc": 0.98, "speedup": 2.5})
        >>> table.row_count, [column.header for column in table.columns]
        (2, ['variant', 'test/acc', 'size', 'latency', 'speed-up'])
    """
    names = list(dict.fromkeys(key.partition("/")[0] for key in summary if "/" in key))
    metrics = list(dict.fromkeys(key.partition("/")[2] for key in summary if key.partition("/")[2].count("/")))
    table = Table(title="Float against int8" if len(names) > 1 else None, title_justify="left")
    table.add_column("variant")
    for metric in (*metrics, "size", "latency", "speed-up"):
        table.add_column(metric, justify="right")
    for name in names:
        table.add_row(
            name,
            *(_cell(summary.get(f"{name}/{metric}"), "{:.4f}") for metric in metrics),
            _cell(summary.get(f"{name}/size_mb"), "{:.3f} MB"),
            _cell(summary.get(f"{name}/latency_ms"), "{:.3f} ms"),
            _cell(summary.get("speedup") if name == "int8" else None, "{:.2f} x"),
        )
    return table


def _source(trainer: Trainer) -> HasVariants | None:
    """The quantization callback, if there is one. Any callback with a `use_variant` of its own is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return cast("HasVariants | None", next((c for c in callbacks if hasattr(type(c), "use_variant")), None))


def _cell(value: float | None, layout: str) -> str:
    return "–" if value is None else layout.format(value)


def _test(
    trainer: Trainer, model: LightningModule, name: str, source: HasVariants | None, **data: Any
) -> dict[str, float]:
    """The metrics of one variant, behind its name."""
    with _logged_behind(name, trainer.loggers):
        if source:
            source.use_variant(name)
        try:
            results = trainer.test(model, verbose=False, **data)
        finally:
            if source:
                source.use_variant(None)
    return {f"{name}/{key}": value for result in results for key, value in result.items()}


@contextmanager
def _logged_behind(name: str, loggers: Sequence[Logger]) -> Iterator[None]:
    """Put the variant's name before whatever the loggers are given, except Lightning's own count of epochs.

    The loggers stay where they are, so that a LightningModule which uses `self.logger.experiment` still can.
    """

    def prefixed(logger: Logger) -> Any:
        log_metrics = logger.log_metrics

        def log(metrics: dict[str, float], step: int | None = None) -> None:
            log_metrics({key if key == "epoch" else f"{name}/{key}": value for key, value in metrics.items()}, step)

        return log

    for logger in loggers:
        vars(logger)["log_metrics"] = prefixed(logger)
    try:
        yield
    finally:
        for logger in loggers:
            del vars(logger)["log_metrics"]


def _measure(source: HasVariants | None) -> dict[str, float]:
    """Size and latency of the variants that are shipped, and their ratios."""
    if source is None:
        return {}
    networks = {name: source.network(name) for name in source.variants if name in TIMED}
    args, kwargs = source.example_inputs_
    measured = {f"{name}/size_mb": size_mb(network) for name, network in networks.items()}
    if all(f"{name}/size_mb" in measured for name in TIMED):
        measured["size_ratio"] = measured["float/size_mb"] / measured["int8/size_mb"]
    latencies = latency_interleaved(networks, args, kwargs)
    measured |= {f"{name}/latency_ms": latency.median_ms for name, latency in latencies.items()}
    if all(name in latencies for name in TIMED):
        measured["speedup"] = latencies["float"].median_ms / latencies["int8"].median_ms
    return measured


def _write(loggers: Sequence[Logger], summary: Mapping[str, float], step: int) -> None:
    """Into W&B's summary, where runs are compared; other loggers know metrics only."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(dict(summary))
        else:
            logger.log_metrics(dict(summary), step)
            logger.save()
