"""Testing every variant of a network, measuring it, and storing the comparison with the run's results."""

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
from qat_lightning.callbacks.parts.find_networks import find_networks
from qat_lightning.callbacks.parts.network import OWN_FORWARD, Slot
from qat_lightning.callbacks.quantized_model_export import exported
from qat_lightning.errors import NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.graph.signature import one_sample
from qat_lightning.measure.metrics import latency_interleaved, size_mb
from qat_lightning.measure.wandb_views import log_variants
from qat_lightning.modes.coverage import coverage_table, int8_share, under
from qat_lightning.modes.protocol import LayerCoverage
from qat_lightning.numerics.sqnr import finite
from qat_lightning.recipes.folding import fuse
from qat_lightning.terminal import LiteralTable, console

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
"""Key of the interquartile range of latencies, relative to the median; the largest of all timed networks."""

TIMED = ("float", "int8")  # fake-quant is only used in training

Call = tuple[tuple[Any, ...], dict[str, Any]]


class HasVariants(Protocol):
    """The interface of a quantization callback that evaluation uses."""

    variants: tuple[str, ...]
    chosen_variant: str | None
    fidelity: Mapping[str, float]
    example_inputs_: Call
    slots: Mapping[str, Slot]

    def use_variant(self, name: str | None) -> None:
        """Choose the variant that the Trainer evaluates; None for the default."""

    def network(self, name: str) -> nn.Module:
        """Return the network of a variant, on the CPU."""

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
    """Test the available variants (float, fake-quant, int8), measure float and int8, and compare them.

    Every metric of `trainer.test` is logged with the variant as prefix (``int8/test/acc``), never without. Everything
    that is returned is also logged: in W&B to the run's summary, in other loggers as metrics. A table is printed.

    Files written by `QuantizedModelExport` are tested too, each in its own runtime, with the format as prefix.

    Without a callback that has variants, the model is tested as ``float``, and measured if it is clear which network in
    the LightningModule is meant.

    Args:
        trainer: The Trainer that fitted the model. Without a fit, `PostTrainingQuantization` quantizes the model as it
            is.
        model: The LightningModule.
        datamodule: See `trainer.test`.
        dataloaders: See `trainer.test`.
        fused: Without such a callback, also test and measure the network with BatchNorm folded into the preceding
            layers (see `qat_lightning.fuse`), as ``fused``; ``fused/chains`` is the number of folded layers.

    Returns:
        The metrics of each variant and, as far as available: ``float/size_mb``, ``int8/size_mb``, ``size_ratio``,
        ``float/latency_ms`` and ``int8/latency_ms`` (one sample, on the CPU), ``latency_spread`` (the larger of their
        interquartile ranges, relative to the median), ``speedup``, ``int8/agreement``, ``int8/sqnr_db``, and
        ``int8/mac_share`` (share of the multiply-accumulates in int8, including products of two computed matrices,
        which torch's own kernel computes in float). With several processes, sizes and latencies are measured and
        returned only in the first.
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
                # A failed extra measurement must not discard the results of a whole training.
                rank_zero_warn(f"There is no fused variant: {error}")
    else:
        if not source.variants:
            test("calibration")  # no fit has run: a test triggers quantization
        summary |= _test_variants(source, test)
        for name, network, figures in exported(trainer):
            with source.running(network):
                summary |= test(name) | {f"{name}/{key}": value for key, value in figures.items()}
        networks = {name: source.network(name) for name in source.variants if name in TIMED}
        calls = [source.example_inputs_]
    if trainer.is_global_zero:
        summary |= measure_networks(networks, calls)
        int8 = networks.get("int8")
        rows = _coverage(source, int8) if source and isinstance(int8, QuantizedNetwork) else []
        share = int8_share(rows)
        if share is not None:
            summary["int8/mac_share"] = share
        write_summary(trainer.loggers, summary, trainer.global_step)
        origin = getattr(source, "float_source", "") if "float" in networks else ""
        console().print(variants_table(summary, float_source=origin))
        if rows and isinstance(int8, QuantizedNetwork):
            console().print(coverage_table(rows, title="What is int8", weight_bits=_weight_bits(int8)))
    return summary


def _coverage(source: HasVariants, int8: QuantizedNetwork) -> list[LayerCoverage]:
    """Return what is int8, with names relative to the LightningModule."""
    (slot,) = source.slots.values()
    return under(slot.prefix, (*int8.coverage, *int8.operations))


def _weight_bits(int8: QuantizedNetwork) -> Callable[[str], int]:
    return lambda name: int8.recipe.of(name).scheme.weight_bits


def _test_variants(source: HasVariants, test: Callable[[str], dict[str, float]]) -> dict[str, float]:
    """Test the variants that the Trainer can run, and restore the user's choice."""
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
    """Format the result of `evaluate_variants`: a row for each variant.

    Args:
        summary: The result, or a part of it.
        float_source: Where the float weights come from, shown below the table.

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
    table = LiteralTable(caption=_caption(summary, float_source), caption_justify="left")
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
    # Kinds without calibration have no fake-quant, and are compared with float.
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
    """Return the quantization callback: any callback with its own `use_variant`; None if there is none."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return cast("HasVariants | None", next((c for c in callbacks if hasattr(type(c), "use_variant")), None))


@contextmanager
def _watched(model: LightningModule) -> Iterator[tuple[dict[str, nn.Module], list[Call]]]:
    """Find the float network in a LightningModule, and record its first call within the block."""
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
    """Replace the float network by one with BatchNorm folded, within the block."""
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
    """Prefix everything that is logged with the variant's name, except Lightning's epoch count.

    The loggers are not replaced, so `self.logger.experiment` in a LightningModule still works.
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
    """Return size and latency of each network, and their ratios."""
    return _sizes(networks) | (_latencies(networks, calls[0]) if networks and calls else {})


def _sizes(networks: Mapping[str, nn.Module]) -> dict[str, float]:
    try:
        sizes = {f"{name}/size_mb": _size_mb(network) for name, network in networks.items()}
    except Exception as error:  # noqa: BLE001 (a failed measurement must not discard trained and tested results)
        rank_zero_warn(f"Sizes are not measured: {type(error).__name__}: {error}")
        return {}
    if all(name in networks for name in TIMED):
        sizes["size_ratio"] = sizes["float/size_mb"] / sizes["int8/size_mb"]
    return sizes


def _latencies(networks: Mapping[str, nn.Module], call: Call) -> dict[str, float]:
    try:
        one = one_sample(Example(*call))
        latencies = latency_interleaved(networks, one.args, one.kwargs)
    except Exception as error:  # noqa: BLE001 (likewise; some networks do not run on a single sample)
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
    """Return the size of the deployed file: an int8 file, or the ``state_dict`` of any other network."""
    return artifact_size_mb(network) if isinstance(network, QuantizedNetwork) else size_mb(network)


def write_summary(loggers: Sequence[Logger], summary: Mapping[str, float], step: int) -> None:
    """Write to W&B's summary, where runs are compared; other loggers only have metrics.

    W&B stores infinity as text and does not plot it, so only `finite` values are written.
    """
    metrics = finite(summary)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            log_variants(logger, metrics, step)
        else:
            logger.log_metrics(metrics, step)
            logger.save()
