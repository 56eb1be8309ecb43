"""Killed fits and invalid settings: ``python -m benchmarks.stress [--kills 200] [--malformed 200]``.

Fits of a small network in the three modes are killed with SIGKILL at random points, resumed from their last checkpoint
in another process, possibly killed again, and compared bit by bit with the uninterrupted run: weights, ranges,
BatchNorm statistics, optimizer, int8 outputs. The fits include: plain, manual optimization, stochastic weight
averaging, weight averaging by exponential moving average, two networks, post-training quantization, and kinds without
calibration (dynamic, weight-only, 4 bits in groups with per-token activations; with distillation, with peft's
adapters).

Random invalid settings, networks, data and files are tried too, including saved int8 files with flipped bytes,
truncated members and replaced values. Each has to end in one of our errors that names it, with the LightningModule
unchanged; a damaged file may also load as the saved network. Both are drawn from the seed; `tests/stress` does the same
in CI with fewer cases. The exit status is 1 if anything was lost or handled otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# Before torch is imported: one thread, so that results are bit-equal.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("QAT_LIGHTNING_COMPILE", "0")

from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import describe
from tests.stress.campaign import Life, campaign, modes_of, tally
from tests.stress.kinds import KINDS
from tests.stress.malformed import Files, Malformed, complaint, malformed


def kill_fits(kills: int, seed_: int, kinds: Sequence[str] = KINDS, minutes: float = math.inf) -> list[Life]:
    """Kill fits until the number of kills or the time limit is reached, cycling through types of fits and modes."""
    end = time.monotonic() + 60 * minutes
    lives: list[Life] = []
    with campaign(seed_) as drawn:
        for count in track(range(kills), "killing fits", transient=True):
            while sum(len(life.kills) for life in lives) <= count and time.monotonic() < end:
                left = kills - sum(len(life.kills) for life in lives)
                kind = kinds[len(lives) % len(kinds)]
                modes = modes_of(kind)
                mode = modes[len(lives) // len(kinds) % len(modes)]
                lives.append(drawn.live(mode, min(left, drawn.random.choice((1, 1, 2, 3))), kind))
    return lives


def try_malformed(count: int, seed_: int) -> tuple[Counter[str], list[str]]:
    """Try malformed cases of all types; return how many of each, and the complaints."""
    tried: Counter[str] = Counter()
    complaints: list[str] = []

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet:  # noqa: PTH123
        files = Files(Path(folder))

        @seed(seed_)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(malformed)
        def check(case: Malformed) -> None:
            tried[case.kind] += 1
            found = complaint(case, files)
            if found:
                complaints.append(f"{case.kind} | {case.what} | {found}")

        # Suppress what Lightning and torch print.
        with contextlib.redirect_stderr(quiet):
            check()
    return tried, complaints


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--malformed", type=int, default=200)
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="of the fits; by default all (adapters: needs peft)",
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="of kills at most; by default no limit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    began = time.monotonic()
    lives = kill_fits(options.kills, options.seed, options.kinds, options.minutes) if options.kills else []
    between = time.monotonic()
    tried, complaints = try_malformed(options.malformed, options.seed) if options.malformed else (Counter[str](), [])
    ended = time.monotonic()

    modes = Counter(life.run.mode for life in lives for _ in life.kills)
    table = Table(title=f"Stress run, seed {options.seed}", caption=describe())
    table.add_column("what")
    for column in ("times", "as it should be", "not"):
        table.add_column(column, justify="right")
    for place, counts in tally(lives).items():
        table.add_row(f"killed {place}", *(str(counts[key]) for key in ("killed", "equal", "lost")))
    table.add_section()
    for kind in options.kinds:
        of_kind = [life for life in lives if life.run.kind == kind]
        killed, lost = (sum(len(life.kills) for life in some) for some in (of_kind, [x for x in of_kind if x.differ]))
        table.add_row(f"of them {kind}", str(killed), str(killed - lost), str(lost))
    lost = sum(len(life.kills) for life in lives if life.differ)
    total = sum(modes.values())
    shares = ", ".join(f"{mode} {count}" for mode, count in modes.items())
    table.add_row(f"killed, of {len(lives)} fits ({shares})", str(total), str(total - lost), str(lost), style="bold")
    table.add_section()
    wrong = Counter(line.split(" | ")[0] for line in complaints)
    for kind, count in sorted(tried.items()):
        table.add_row(f"malformed: {kind}", str(count), str(count - wrong[kind]), str(wrong[kind]))
    count = tried.total()
    table.add_row("malformed", str(count), str(count - len(complaints)), str(len(complaints)), style="bold")
    console = Console(width=110)
    console.print(table)
    console.print(f"{between - began:.0f} s of kills, {ended - between:.0f} s of malformed cases.")
    for line in [str(life) for life in lives if life.differ] + complaints:
        console.print(line, markup=False)
    sys.exit(bool(lost or complaints))


if __name__ == "__main__":
    main()
