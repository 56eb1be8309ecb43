"""The effect of each recipe alone: ``python -m benchmarks.recipes --data PATH [--rows …]``.

On the photos of `benchmarks.efficientnet_lite`, first split. Each recipe is added alone to a baseline row:
post-training quantization to 8 bits per tensor or to 4-bit weights, or training with 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table

from benchmarks.efficientnet_lite import FEATURES, FOUR_BITS, PER_TENSOR, Row, distillation, measure, parse, with_bases
from benchmarks.machine import describe
from benchmarks.photos import read_photos
from benchmarks.training import silent
from qat_lightning import AdaRound, BatchNormReestimation, Distillation, Scheme, WeightOscillations
from qat_lightning.settings.scheme import ActivationObserver

PTQ_8 = "PTQ, 8 bit, per tensor"
PTQ_4 = "PTQ, 4-bit weights, per channel"
QAT_4 = "QAT, 4-bit weights, on labels"
QAT_44 = "QAT, 4-bit weights and activations, on features"
ALL_FOUR = Scheme(weight_bits=4, activation_bits=4)


def _ptq(against: str, **arguments: Any) -> Row:
    return Row("ptq", ROWS[against].scheme, against, arguments=arguments)


def _qat(*callbacks: Callable[[], Callback], scheme: Scheme = FOUR_BITS, against: str = QAT_4, **arguments: Any) -> Row:
    return Row("qat", scheme, against, arguments=arguments, callbacks=lambda: [make() for make in callbacks])


def _features() -> Distillation:
    return Distillation(task_weight=0.0, weight=0.0, features=FEATURES, feature_weight=30.0)


def _observed(observer: ActivationObserver, scheme: Scheme = FOUR_BITS) -> dict[str, Scheme]:
    return {"scheme": replace(scheme, activation_observer=observer, activation_percentile=99.9)}


ROWS = {
    PTQ_8: Row("ptq", PER_TENSOR),
    PTQ_4: Row("ptq", FOUR_BITS),
    QAT_4: Row("qat", FOUR_BITS, callbacks=list),
    QAT_44: Row("qat", ALL_FOUR, callbacks=lambda: [_features()]),
}
ROWS |= {
    "equalization, exact": _ptq(PTQ_8, equalization="exact"),
    "equalization, replace_relu6": _ptq(PTQ_8, equalization="replace_relu6"),
    "bias correction": _ptq(PTQ_8, bias_correction=True),
    "bias correction, 4 bit": _ptq(PTQ_4, bias_correction=True),
    "sequential MSE": _ptq(PTQ_8, sequential_mse=True),
    "sequential MSE, 4 bit": _ptq(PTQ_4, sequential_mse=True),
    "AdaRound": _ptq(PTQ_4, adaround=AdaRound(iterations=200)),
    "AdaRound by blocks": _ptq(PTQ_4, adaround=AdaRound(iterations=200, blocks="auto")),
    "sequential MSE before training": _qat(sequential_mse_batches=8),
    "distillation instead of labels": _qat(lambda: Distillation(temperature=2.0, task_weight=0.0)),
    "distillation of outputs and features": Row(
        "qat", FOUR_BITS, QAT_4, callbacks=lambda: distillation(feature_weight=30.0)
    ),
    "distillation of features alone": _qat(_features),
    "distillation and labels": _qat(lambda: Distillation(temperature=2.0)),
    "bias correction before training": _qat(bias_correction_batches=8),
    "equalization before training": _qat(equalization="exact"),
    "learned step size": _qat(scheme=Scheme(weight_bits=4, learned_step="lsq")),
    "learned step size, from a tenth on": _qat(scheme=Scheme(weight_bits=4, learned_step="lsq"), learn_scales=0.1),
    "learned step size, slower": _qat(
        scheme=Scheme(weight_bits=4, learned_step="lsq", learned_rate=0.1), learn_scales=0.1
    ),
    "learned step size and zero point": _qat(
        scheme=Scheme(weight_bits=4, learned_step="lsq+", learned_rate=0.1), learn_scales=0.1
    ),
    "ranges of least error": _qat(**_observed("histogram_mse")),
    "ranges by percentile": _qat(**_observed("percentile")),
    "ranges of least error, 4 bit": _qat(_features, against=QAT_44, **_observed("histogram_mse", ALL_FOUR)),
    "ranges by percentile, 4 bit": _qat(_features, against=QAT_44, **_observed("percentile", ALL_FOUR)),
    "oscillating weights frozen": _qat(WeightOscillations),
    "oscillating weights dampened": _qat(lambda: WeightOscillations(freezing=None, dampening=(0.0, 0.1))),
    "BatchNorm not folded, and frozen": _qat(batchnorm="fused", freeze_batchnorm=0),
    "BatchNorm re-estimation": _qat(BatchNormReestimation, batchnorm="fused", freeze_batchnorm=0),
}


def main() -> None:
    """Compute missing results, and print the table."""
    options = parse(__doc__.splitlines()[0], ROWS, "recipes.jsonl", [0])
    silent()
    photos = read_photos(options.data)
    figures = measure(with_bases(ROWS, options.rows), photos, options)
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
