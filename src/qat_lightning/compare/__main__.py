"""Compare runs on the command line: python -m qat_lightning.compare multirun/2026-01-31/12-00-00."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from qat_lightning.compare.comparison import compare
from qat_lightning.compare.decision import Limits, decide
from qat_lightning.compare.find import find_runs
from qat_lightning.compare.online import find_online
from qat_lightning.compare.page import page
from qat_lightning.compare.remeasure import remeasure
from qat_lightning.compare.settings import unmatched
from qat_lightning.compare.table import as_csv, as_json, markdown, rich_table
from qat_lightning.compare.tasks import only
from qat_lightning.errors import ConfigurationError
from qat_lightning.terminal import console, status_of

NONE_QUALIFIES = 1


def main(words: Sequence[str] | None = None) -> int:
    """Read runs, compare them, and print and write the requested output.

    Args:
        words: The command line; by default that of the process.

    Returns:
        The exit status: 0; 1 with ``--fail-if-none`` if nothing is within the limits; 2 if there is nothing to compare.
    """
    options = _parser().parse_args(words)
    return status_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if not options.paths and not options.wandb:
        raise ConfigurationError("There is nothing to compare: name folders of runs, or --wandb entity/project.")
    limits = Limits(options.max_drop, options.max_latency, options.max_size, options.prefer)
    if options.fail_if_none and not limits.given:
        raise ConfigurationError("--fail-if-none needs a limit: --max-drop, --max-latency or --max-size.")
    targets = [options.json, options.csv, options.markdown, options.html]
    _check(targets)
    runs = find_runs(options.paths) if options.paths else []
    runs += [run for address in options.wandb for run in find_online(address)]
    runs = only(runs, options.only)
    for glob in unmatched(runs, options.ignore):
        _say(f"--ignore {glob!r} matches no setting of these runs.")
    settings = {"metric": options.metric, "larger_is_better": _LARGER[options.goal], "ignore": options.ignore}
    comparison = compare(runs, **settings)
    if options.remeasure:
        runs = remeasure(runs, _say)
        comparison = compare(runs, **settings)
    decision = decide(comparison, limits)
    writers: list[Callable[[], str]] = [
        partial(as_json, comparison, decision),
        partial(as_csv, comparison),
        partial(markdown, comparison, decision),
        partial(page, comparison, decision, limits, title=options.title),
    ]
    for target, text in zip(targets, writers, strict=True):
        if target is not None:
            _write(target, text())
    if "-" not in targets:
        console().print(rich_table(comparison, decision))
    return NONE_QUALIFIES if options.fail_if_none and decision.winner is None else 0


def _say(text: str) -> None:
    Console(stderr=True).print(Text(text), soft_wrap=True)


def _check(targets: Sequence[str | None]) -> None:
    """Refuse files that cannot be written, before anything is read or timed."""
    if targets.count("-") > 1:
        raise ConfigurationError(
            "Only one of --json, --csv and --markdown can go to stdout: name files for the others."
        )
    for target in targets:
        if target not in (None, "-") and not Path(target).absolute().parent.is_dir():
            raise ConfigurationError(f"{target} cannot be written: there is no folder {Path(target).parent}.")


_LARGER = {"max": True, "min": False, None: None}


def _write(target: str, text: str) -> None:
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{target} cannot be written: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qat_lightning.compare",
        description="Compare runs: mean and spread over seeds, the Pareto front, and which one to ship.",
    )
    parser.add_argument(
        "paths", nargs="*", help="folders of sweeps, of single runs, of offline W&B runs or of CSV logs"
    )
    parser.add_argument(
        "--wandb", action="append", default=[], metavar="ENTITY/PROJECT[/GROUP]", help="runs on W&B's server"
    )
    what = parser.add_argument_group("what to compare")
    what.add_argument("--metric", help="metric without its variant, such as test/acc (default: the models' own)")
    what.add_argument(
        "--goal", choices=["max", "min"], help="direction of the metric (default: from the model, else its name)"
    )
    what.add_argument(
        "--ignore", action="append", default=[], metavar="GLOB", help="settings to ignore, such as 'trainer.*'"
    )
    what.add_argument(
        "--only", action="append", default=[], metavar="KEY=VALUE", help="compare only runs with it: 'data.name=digits'"
    )
    what.add_argument(
        "--remeasure",
        action="store_true",
        help="time the int8 files and float again, alternately; runs the code that the configurations name",
    )
    limits = parser.add_argument_group("limits for the mean over seeds")
    limits.add_argument(
        "--max-drop", type=float, metavar="POINTS", help="largest drop relative to float, in percentage points"
    )
    limits.add_argument("--max-latency", type=float, metavar="MS", help="largest latency of one sample on the CPU")
    limits.add_argument("--max-size", type=float, metavar="MB", help="largest size of the int8 file")
    limits.add_argument(
        "--prefer",
        choices=["score", "latency", "size"],
        help="what decides (default: latency if the drop is limited, else the score)",
    )
    limits.add_argument(
        "--fail-if-none", action="store_true", help="exit with status 1 if nothing is within the limits"
    )
    out = parser.add_argument_group("output in addition to the table; - for stdout instead of the table")
    for kind, text in (("json", "all figures"), ("csv", "a row for each configuration"), ("markdown", "for a comment")):
        out.add_argument(f"--{kind}", nargs="?", const="-", metavar="FILE", help=text)
    out.add_argument("--html", metavar="FILE", help="one self-contained page")
    out.add_argument("--title", default="Comparison of runs", help="title of the page")
    return parser


if __name__ == "__main__":
    sys.exit(main())
