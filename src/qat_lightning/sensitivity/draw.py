"""Plots of the ranking (cost of quantizing each layer alone, gain of leaving it float) and of chosen bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat_lightning.errors import MissingExtraError
from qat_lightning.numerics.sqnr import EQUAL_DB

if TYPE_CHECKING:
    from qat_lightning.sensitivity.bit_choice import BitChoice
    from qat_lightning.sensitivity.measured import Sensitivity

SHOWN = 40


def draw(found: Sensitivity, path: str | Path, *, shown: int = SHOWN) -> None:
    """Plot the ranking as bars, the most sensitive layer on top.

    Args:
        found: The ranking.
        path: Path of the image; its suffix determines the format (.png, .svg, .pdf).
        shown: Largest number of layers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = found.rows[:shown]
    figure = _figure(9, 1.6 + 0.28 * len(rows))
    axes = figure.subplots()
    positions = range(len(rows))
    alone = [found.float_metric - row.alone for row in rows]
    won = [row.without - found.quantized_metric for row in rows]
    axes.barh([p - 0.2 for p in positions], alone, 0.38, color="#c44e52", label="lost by quantizing it alone")
    axes.barh([p + 0.2 for p in positions], won, 0.38, color="#4c72b0", label="won back by leaving it float")
    names = [row.name if row.excludable else f"{row.name} (op)" for row in rows]
    axes.set_yticks(list(positions), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel(found.metric_name)
    more = f", {len(rows)} of {len(found.rows)} shown" if len(found.rows) > len(rows) else ""
    axes.set_title(
        f"float {found.float_metric:.4g}, all quantized {found.quantized_metric:.4g} "
        f"({found.recipe.mode}, {found.recipe.backend}, W{found.recipe.scheme.weight_bits}"
        f"A{found.recipe.scheme.activation_bits}){more}",
        fontsize=10,
    )
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


def draw_bits(found: BitChoice, path: str | Path) -> None:
    """Plot the metric over the file size: measured, and predicted by the sums of single layers' losses.

    Args:
        found: The choice.
        path: Path of the image; its suffix determines the format (.png, .svg, .pdf).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    axes.plot(*zip(*found.curve, strict=True), "--", color="#8c8c8c", label="best of each size, predicted", zorder=1)
    in_decibel = found.float_metric >= EQUAL_DB  # the finite value that stands for infinite SQNR
    if not in_decibel:
        axes.axhline(found.float_metric, color="black", linewidth=0.8, label=f"float: {found.float_metric:.4g}")
    for row in found.uniform:
        axes.scatter(row.size_mb, row.metric, s=60, color="#4c72b0", zorder=2)
        axes.annotate(row.label, (row.size_mb, row.metric), xytext=(6, -12), textcoords="offset points", fontsize=9)
    row = found.measured
    color = "#55a868" if found.reached else "#c44e52"
    axes.scatter(row.size_mb, row.metric, s=110, marker="*", color=color, label="chosen, measured", zorder=3)
    if found.limits.max_size_mb is not None:
        axes.axvline(found.limits.max_size_mb, color=color, linewidth=0.8, linestyle=":", label="largest size")
    if found.limits.max_drop is not None:
        lowest = found.float_metric - found.limits.max_drop
        axes.axhline(lowest, color=color, linewidth=0.8, linestyle=":", label="largest drop")
    axes.set_xlim(right=1.15 * max(point.size_mb for point in (*found.uniform, row)))
    if in_decibel:
        shown = [point.metric for point in (*found.uniform, row)]
        axes.set_ylim(min(shown) - 3, max(shown) + 6)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("file in MB")
    axes.set_ylabel(found.metric_name)
    axes.set_title(f"{row.size_mb:.4g} MB, {found.metric_name} {row.metric:.4g}", fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("A picture needs matplotlib: pip install 'qat-lightning[plots]'.") from error
    # Not pyplot, which keeps figures in memory and needs a display.
    return Figure(figsize=(width, height), layout="constrained")
