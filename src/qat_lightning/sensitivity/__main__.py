"""Rank layers by sensitivity: python -m qat_lightning.sensitivity outputs/2026-01-31/12-00-00 --max-drop 0.3."""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from rich.text import Text

from qat_lightning.errors import ConfigurationError
from qat_lightning.run.app import quiet
from qat_lightning.sensitivity.bit_choice import BitLimits, Candidate
from qat_lightning.sensitivity.bits import bits_within
from qat_lightning.sensitivity.budget import Budget
from qat_lightning.sensitivity.draw import draw, draw_bits
from qat_lightning.sensitivity.measured import Sensitivity
from qat_lightning.sensitivity.run import SQNR_BATCHES, Options, composed, config_of_run, measure_run
from qat_lightning.terminal import console, errors_only, status_of

NOT_REACHED = 1


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and write the ranking, and choose within a budget.

    Args:
        words: The command line; by default that of the process.

    Returns:
        The exit status: 0; 1 if the budget cannot be kept; 2 if the input is invalid.
    """
    options = _parser().parse_intermixed_args(words)
    return status_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    _check(options)  # invalid options raise before anything is measured
    folders = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if len(folders) > 1:
        raise ConfigurationError(f"Give the folder of one run, not {', '.join(folders)}.")
    if not folders and options.checkpoint is None:
        raise ConfigurationError(
            "There is nothing to measure: give the folder of a run (outputs/2026-01-31/12-00-00), or --checkpoint "
            "with --config-dir conf and the overrides that it was trained with."
        )
    run = Path(folders[0]) if folders else None
    cfg = config_of_run(run, overrides) if run else composed(options.config_dir, overrides)
    checkpoint = options.checkpoint or (run or Path()) / "checkpoints" / "last.ckpt"
    asked = Options(
        options.metric,
        options.smaller_is_better,
        options.calibration_batches,
        options.validation_batches,
        options.rank_by,
    )
    quiet()
    # Each layer is measured by a Trainer of its own.
    with errors_only("lightning.pytorch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        seed_everything(cfg.get("seed", 0), workers=True, verbose=False)
        found = measure_run(cfg, checkpoint, asked)
        return _show(found, options, run)


def _show(found: Sensitivity, options: argparse.Namespace, run: Path | None) -> int:
    """Print and write the ranking, and choose within a budget."""
    shown = console()
    shown.print(found.table())
    for note in found.notes:
        shown.print(Text(note), soft_wrap=True)
    out = options.out or (run / "sensitivity" if run else Path("sensitivity"))
    out.mkdir(parents=True, exist_ok=True)
    _write_csv([asdict(row) for row in found.rows], out / "layers.csv")
    if not options.no_plot:
        draw(found, out / "layers.png")
    shown.print(f"Written: {out}", soft_wrap=True)
    if options.bits:
        return _choose_bits(found, options, out)
    if options.max_drop is None and options.min_size_ratio is None:
        return 0
    limit = None if options.max_drop is None else options.max_drop / found.points
    plan = found.within(Budget(limit, options.min_size_ratio))
    plan.write(out / "mixed_precision.yaml")
    shown.print(Text(plan.summary(), style="" if plan.reached else "red"), soft_wrap=True)
    shown.print(Text(f"python train.py '{plan.override()}'"), soft_wrap=True)
    return 0 if plan.reached else NOT_REACHED


def _check(options: argparse.Namespace) -> None:
    if options.bits:
        if options.min_size_ratio is not None:
            raise ConfigurationError("--min-size-ratio is for layers left float: with --bits give --max-size-mb.")
        BitLimits(options.max_drop, options.max_size_mb, options.max_latency_ms)
        return
    for name in ("max_size_mb", "max_latency_ms"):
        if getattr(options, name) is not None:
            raise ConfigurationError(f"--{name.replace('_', '-')} is for --bits: give it too, as --bits 4 8 float.")
    if options.max_drop is not None or options.min_size_ratio is not None:
        Budget(options.max_drop, options.min_size_ratio)


def _choose_bits(found: Sensitivity, options: argparse.Namespace, out: Path) -> int:
    shown = console()
    limit = None if options.max_drop is None else options.max_drop / found.points
    choice = bits_within(found, options.bits, BitLimits(limit, options.max_size_mb, options.max_latency_ms))
    shown.print(choice.table())
    _write_csv(choice.rows(), out / "bits.csv")
    choice.write(out / "mixed_bits.yaml")
    if not options.no_plot:
        draw_bits(choice, out / "bits.png")
    shown.print(Text(choice.summary(), style="" if choice.reached else "red"), soft_wrap=True)
    shown.print(Text(f"python train.py '{choice.override()}'"), soft_wrap=True)
    return 0 if choice.reached else NOT_REACHED


def _write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qat_lightning.sensitivity", description=__doc__)
    add = parser.add_argument
    add("words", nargs="*", metavar="RUN or KEY=VALUE", help="a run's folder, and overrides of its configuration")
    add("--config-dir", type=Path, default=Path("conf"), help="without a run's folder: train.py's configurations")
    add("--checkpoint", type=Path, help="by default the run's checkpoints/last.ckpt")
    add("--metric", help="what validation_step logs, or sqnr of the outputs (default: the model's own metric)")
    add("--smaller-is-better", action="store_true", help="smaller values of the metric are better")
    add(
        "--rank-by",
        choices=["alone", "without"],
        default="alone",
        help="measure each layer quantized alone, or all but it",
    )
    add("--max-drop", type=float, help="largest drop, in percentage points of a score between 0 and 1")
    add("--min-size-ratio", type=float, help="how many times smaller the weights have to be")
    add("--bits", type=_candidate, nargs="+", metavar="BITS", help="candidate bits of each layer, such as 4 8 float")
    add("--max-size-mb", type=float, help="with --bits: largest size of the int8 file, in 10^6 bytes")
    add("--max-latency-ms", type=float, help="with --bits: largest latency of one sample on this machine")
    add("--calibration-batches", type=_positive, default=8, help="training batches for calibration (default: 8)")
    add("--validation-batches", type=_positive, help=f"by default all; {SQNR_BATCHES} for sqnr")
    add("--out", type=Path, help="folder for results (default: sensitivity, in the run's folder)")
    add("--no-plot", action="store_true", help="leave out the picture, which needs matplotlib (the extra plots)")
    return parser


def _candidate(word: str) -> Candidate:
    if word == "float":
        return "float"
    if not word.isdigit() or not 2 <= int(word) <= 8:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a number of bits from 2 to 8 nor float")
    return int(word)


def _positive(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of 1 or more")
    return int(word)


if __name__ == "__main__":
    sys.exit(main())
