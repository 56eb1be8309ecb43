"""The ranking as a picture: what each layer costs by itself, and what leaving it float wins back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qat_lightning.errors import MissingExtraError

if TYPE_CHECKING:
    from qat_lightning.sensitivity.measured import Sensitivity

SHOWN = 40


def draw(found: Sensitivity, path: str | Path, *, shown: int = SHOWN) -> None:
    """Write the ranking as bars, the worst layer on top.

    Args:
        found: What was measured.
        path: Of an image; its ending says which kind (.png, .svg, .pdf).
        shown: How many layers, at most.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("A picture needs matplotlib: pip install 'qat-lightning[plots]'.") from error
    rows = found.rows[:shown]
    # Not pyplot, which keeps every figure and wants a display.
    figure = Figure(figsize=(9, 1.6 + 0.28 * len(rows)), layout="constrained")
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
