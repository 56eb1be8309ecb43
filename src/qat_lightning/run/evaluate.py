"""Test every variant of a network, measure it, and write the comparison where the run's results are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from rich.table import Table
from torch import nn

from qat_lightning.artifact import artifact_size_mb
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.parts.network import OWN_FORWARD, Slot, find_networks
from qat_lightning.callbacks.quantized_model_export import exported
from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.graph.signature import one_sample
from qat_lightning.measure.metrics import latency_interleaved, size_mb
from qat_lightning.measure.wandb_views import log_variants
from qat_lightning.modes.coverage import coverage_table, int8_share
from qat_lightning.numerics.sqnr import EQUAL_DB
from qat_lightning.recipes.folding import fuse
from qat_lightning.terminal import console

MEASURED = (
    "size_mb",
    "size_ratio",
    "latency_ms",
    "float_latency_ms",
    "eager_latency_ms",
    "agreement",
    "sqnr_db",
    "max_difference",
    "step",
    "speedup",
    "speedup_in_runtime",
    "chains",
    "mac_share",
)  # what is added to the model's own metrics
SPREAD = "latency_spread"
"""The key of the interquartile range of a latency, as a share of the median; the largest of what was timed."""

TIMED = ("float", "int8")  # fake-quant is a step of training, nothing that is shipped

Call = tuple[tuple[Any, ...], dict[str, Any]]


class HasVariants(Protocol):
    """What a quantization callback offers for evaluation."""

    variants: tuple[str, ...]
    chosen_variant: str | None
    fidelity: Mapping[str, float]
    example_inputs_: Call

    def use_variant(self, name: str | None) -> None:
        """Choose what the Trainer evaluates; None for the default."""

    def network(self, name: str) -> nn.Module:
        """The network of a variant, on the CPU."""

    def running(self, network: nn.Module) -> AbstractContextManager[None]:
        """Within the block, the Trainer tests this network."""


def evaluate_variants(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    dataloaders: Any = None,
    *,
    fused: bool = False,
) -> dict[str, float]:
    """Test the float, fake-quant and int8 variants that there are, measure float and int8, and compare.

    Every metric of `trainer.test` is logged behind the name of its variant (``int8/test/acc``), never bare. All that is
    returned is also in the loggers: in W&B in the run's summary, in others as metrics. A table goes to the terminal.

    What `QuantizedModelExport` wrote is tested as well, each artifact by its own runtime, behind the format's name.

    Without a callback that has variants, the run is tested as ``float``, and measured where it is clear which network
    in the LightningModule is meant.

    Args:
        trainer: The Trainer that fitted the model. Without a fit, `PostTrainingQuantization` quantizes what is there.
        model: The LightningModule.
        datamodule: As for `trainer.test`.
        dataloaders: As for `trainer.test`.
        fused: Without such a callback, also test and measure the network with BatchNorm folded into the layers before
            it (see `qat_lightning.fuse`), as ``fused``; ``fused/chains`` is how many were folded.

    Returns:
        The metrics of each variant, ``float/size_mb``, ``int8/size_mb``, ``size_ratio``, ``float/latency_ms``,
        ``int8/latency_ms`` (of one sample, on the CPU), ``latency_spread`` (the larger of their interquartile ranges
        while they were measured, as a share of the median), ``speedup``, ``int8/agreement`` and ``int8/sqnr_db``, and
        ``int8/mac_share`` (the share of the multiply-accumulates in int8, products of two computed matrices among them,
        for which torch's own kernel is float inside): those that exist. With several processes, sizes and latencies are
        those of the first one, and only it has them.
    """

    def test(name: str) -> dict[str, float]:
        with logged_behind(name, trainer.loggers):
            results = trainer.test(model, datamodule=datamodule, dataloaders=dataloaders, verbose=False)
        return {f"{name}/{key}": value for result in results for key, value in result.items()}

    source = _source(trainer)
    summary: dict[str, float] = {}
    if source is None:
        with _watched(model) as (networks, calls):
            summary |= test("float")
        if fused:
            try:
                with _fused(model, calls) as (network, count):
                    summary |= test("fused") | {"fused/chains": float(count)}
                networks = networks | {"fused": network}
            except NetworkError as error:
                # After a whole training, what was asked for besides must not cost its results.
                rank_zero_warn(f"There is no fused variant: {error}")
    else:
        if not source.variants:
            test("calibration")  # nothing was fitted: a test quantizes what is there
        summary |= _test_variants(source, test)
        for name, network, figures in exported(trainer):
            with source.running(network):
                summary |= test(name) | {f"{name}/{key}": value for key, value in figures.items()}
        networks = {name: source.network(name) for name in source.variants if name in TIMED}
        calls = [source.example_inputs_]
    if trainer.is_global_zero:
        summary |= measure_networks(networks, calls)
        int8 = networks.get("int8")
        rows = [*int8.coverage, *int8.operations] if isinstance(int8, QuantizedNetwork) else []
        share = int8_share(rows)
        if share is not None:
            summary["int8/mac_share"] = share
        write_summary(trainer.loggers, summary, trainer.global_step)
        origin = getattr(source, "float_source", "") if "float" in networks else ""
        console().print(variants_table(summary, float_source=origin))
        if rows:
            console().print(coverage_table(rows, title="What is int8"))
    return summary


def _test_variants(source: HasVariants, test: Callable[[str], dict[str, float]]) -> dict[str, float]:
    """Test what a callback can let the Trainer run, and choose what was chosen again."""
    summary: dict[str, float] = {}
    before = source.chosen_variant
    for name in source.variants:
        source.use_variant(name)
        try:
            summary |= test(name)
        finally:
            source.use_variant(before)
        if name == "int8":
            summary |= {f"int8/{key}": value for key, value in source.fidelity.items()}
    if "float" in source.variants and getattr(source, "float_step", None) is not None:
        summary["float/step"] = float(source.float_step)  # type: ignore[attr-defined]
    return summary


def variants_table(summary: Mapping[str, float], *, float_source: str = "") -> Table:
    """Lay out what `evaluate_variants` returns: a row for each variant.

    Args:
        summary: Its result, or a part of it.
        float_source: Where the float weights come from, to say below the table.

    Returns:
        A table for `rich.print`.

    Example:
        >>> table = variants_table({"float/test/acc": 0.981, "int8/test/acc": 0.98, "speedup": 2.5})
        >>> table.row_count, [column.header for column in table.columns]
        (2, ['variant', 'test/acc', 'size', 'latency', 'speed-up'])
    """
    keys = [key.partition("/")[::2] for key in summary if "/" in key]
    names = list(dict.fromkeys(name for name, _ in keys))
    metrics = list(dict.fromkeys(metric for _, metric in keys if metric not in MEASURED))
    table = Table(caption=_caption(summary, float_source), caption_justify="left")
    table.add_column("variant")
    for metric in (*metrics, "size", "latency", "speed-up"):
        table.add_column(metric, justify="right")
    for name in names:
        table.add_row(
            name,
            *(_cell(summary.get(f"{name}/{metric}"), "{:.4f}") for metric in metrics),
            _cell(summary.get(f"{name}/size_mb"), "{:.3f} MB"),
            _cell(summary.get(f"{name}/latency_ms"), "{:.3f} ms"),
            _cell(summary.get("speedup" if name == "int8" else f"{name}/speedup"), "{:.2f} x"),
        )
    return table


def _caption(summary: Mapping[str, float], float_source: str) -> str:
    lines = [f"float: {float_source}"] if float_source else []
    if "fused/chains" in summary:
        lines.append(f"fused: BatchNorm folded into {summary['fused/chains']:.0f} layers")
    # The kinds without calibration have no fake-quant to be compared with.
    other = "fake_quant" if any(key.startswith("fake_quant/") for key in summary) else "float"
    if "int8/agreement" in summary:
        lines.append(f"int8 chooses the same class as {other} for {summary['int8/agreement']:.2%} of the outputs")
    if "int8/sqnr_db" in summary:
        sqnr = summary["int8/sqnr_db"]
        lines.append(f"int8 equals {other}" if math.isinf(sqnr) else f"int8 is {sqnr:.1f} dB from {other}")
    if any(key.endswith("/latency_ms") for key in summary):
        threads = torch.get_num_threads()
        lines.append(f"latency: one sample on the CPU, {threads} thread{'' if threads == 1 else 's'}")
    return "\n".join(lines)


def _cell(value: float | None, layout: str) -> str:
    return "–" if value is None else layout.format(value)


def _source(trainer: Trainer) -> HasVariants | None:
    """The quantization callback, if there is one: any callback with a `use_variant` of its own."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return cast("HasVariants | None", next((c for c in callbacks if hasattr(type(c), "use_variant")), None))


@contextmanager
def _watched(model: LightningModule) -> Iterator[tuple[dict[str, nn.Module], list[Call]]]:
    """The float network in a LightningModule, and what it is first called with meanwhile."""
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            calls.append(move_data_to_device((args, kwargs), "cpu"))

    try:
        name, *others = find_networks(model, None)
    except NetworkError:
        yield {}, calls
        return
    called = model if name == OWN_FORWARD else model.get_submodule(name)
    handle = called.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield ({} if others else {"float": Slot(model, name).get()}), calls
    finally:
        handle.remove()


@contextmanager
def _fused(model: LightningModule, calls: Sequence[Call]) -> Iterator[tuple[nn.Module, int]]:
    """The float network of a LightningModule with BatchNorm folded, in its place meanwhile."""
    names = find_networks(model, None)
    if len(names) > 1 or not calls:
        raise NetworkError(
            f"Which network of {type(model).__name__} to fuse is not clear, or a test does not call it: "
            f"{', '.join(names)}. Use qat_lightning.fuse(network, example_inputs) on it."
        )
    slot = Slot(model, names[0])
    args, kwargs = calls[0]
    network, count = fuse(slot.get(), Example(args, kwargs))
    before = slot.run_instead(network)
    try:
        yield network, count
    finally:
        slot.run_again(before)


@contextmanager
def logged_behind(name: str, loggers: Sequence[Logger]) -> Iterator[None]:
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


def measure_networks(networks: Mapping[str, nn.Module], calls: Sequence[Call]) -> dict[str, float]:
    """Size and latency of each network, and their ratios."""
    return _sizes(networks) | (_latencies(networks, calls[0]) if networks and calls else {})


def _sizes(networks: Mapping[str, nn.Module]) -> dict[str, float]:
    try:
        sizes = {f"{name}/size_mb": _size_mb(network) for name, network in networks.items()}
    except Exception as error:  # noqa: BLE001 (a measurement does not cost what was trained and tested)
        rank_zero_warn(f"Sizes are not measured: {type(error).__name__}: {error}")
        return {}
    if all(name in networks for name in TIMED):
        sizes["size_ratio"] = sizes["float/size_mb"] / sizes["int8/size_mb"]
    return sizes


def _latencies(networks: Mapping[str, nn.Module], call: Call) -> dict[str, float]:
    try:
        one = one_sample(Example(*call))
        latencies = latency_interleaved(networks, one.args, one.kwargs)
    except Exception as error:  # noqa: BLE001 (likewise: a network need not run on a single sample)
        rank_zero_warn(f"The latency of one sample is not measured: {type(error).__name__}: {error}")
        return {}
    measured = {f"{name}/latency_ms": latency.median_ms for name, latency in latencies.items()}
    measured[SPREAD] = max(latency.spread for latency in latencies.values())
    if "fused" in latencies:
        measured["fused/speedup"] = latencies["float"].median_ms / latencies["fused"].median_ms
    if all(name in networks for name in TIMED):
        measured["speedup"] = latencies["float"].median_ms / latencies["int8"].median_ms
    return measured


def _size_mb(network: nn.Module) -> float:
    """What a user ships: the file of an int8 network, the ``state_dict`` of any other."""
    return artifact_size_mb(network) if isinstance(network, QuantizedNetwork) else size_mb(network)


def write_summary(loggers: Sequence[Logger], summary: Mapping[str, float], step: int) -> None:
    """Into W&B's summary, where runs are compared; other loggers know metrics only.

    Equal outputs have no noise, and W&B shows infinity as a word that no plot takes: `EQUAL_DB` stands for it.
    """
    finite = {key: value if math.isfinite(value) else EQUAL_DB for key, value in summary.items()}
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            log_variants(logger, finite, step)
        else:
            logger.log_metrics(finite, step)
            logger.save()
