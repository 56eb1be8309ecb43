"""What each recipe wins by itself, or does not: ``python -m benchmarks.recipes --data PATH [--rows …]``.

On the photos of `benchmarks.efficientnet_lite`, first split. Each recipe is added alone to the plain row of its kind:
post-training quantization to 8 bits per tensor or to 4-bit weights, or training with 4-bit weights.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from benchmarks.efficientnet_lite import FOUR_BITS, PER_TENSOR, Row, measure, parse
from benchmarks.machine import describe
from benchmarks.photos import read_photos
from benchmarks.training import silent
from qat_lightning import BatchNormReestimation, Distillation, Scheme

PTQ_8 = "PTQ, 8 bit, per tensor"
PTQ_4 = "PTQ, 4-bit weights"
QAT_4 = "QAT, 4-bit weights, on labels"

ROWS = {
    PTQ_8: Row("ptq", PER_TENSOR),
    PTQ_4: Row("ptq", FOUR_BITS),
    QAT_4: Row("qat", FOUR_BITS, lr=1e-4, callbacks=list),
    "distillation": Row("qat", FOUR_BITS, QAT_4, 1e-4),
    "distillation and labels": Row("qat", FOUR_BITS, QAT_4, 1e-4, callbacks=lambda: [Distillation(temperature=2.0)]),
    "learned step size": Row("qat", Scheme(weight_bits=4, learned_step="lsq"), QAT_4, 1e-4, callbacks=list),
    "BatchNorm re-estimation": Row("qat", FOUR_BITS, QAT_4, 1e-4, callbacks=lambda: [BatchNormReestimation()]),
}


def main() -> None:
    """Measure what is not in the file of results yet, and print the table."""
    options = parse(__doc__.splitlines()[0], ROWS, "recipes.jsonl", [0])
    silent()
    photos = read_photos(options.data)
    plain = {row.against for row in map(ROWS.get, options.rows) if row.against}
    figures = measure(
        {n: r for n, r in ROWS.items() if n in options.rows or n in plain}, photos, options.splits, options
    )
    table = Table(title="EfficientNet-Lite0, recipes one by one, top-1 in %", caption=describe())
    for column in ("recipe", "added to", "top-1", "gain"):
        table.add_column(column, justify="left" if column in ("recipe", "added to") else "right")
    for name, values in figures.items():
        mean = sum(values) / len(values)
        against = ROWS[name].against
        gain = mean - sum(figures[against]) / len(values) if against else 0.0
        table.add_row(name, against, f"{100 * mean:.1f}", f"{100 * gain:+.1f}" if against else "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
