"""Many fits, killed at random points, resumed and compared with the uninterrupted one."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.stress.kinds import FREEZE_BATCHNORM, FREEZE_OBSERVERS, MODES, MODES_OF, START
from tests.stress.server import Outcome, Server
from tests.stress.worker import DIGEST, STEPS, Kill, Run


def modes_of(kind: str) -> tuple[str, ...]:
    """The modes for a kind of fit."""
    return MODES_OF.get(kind, MODES)


PLACES = (
    "while preparing",
    "before start",
    "between start and the freezes",
    "between the freezes",
    "after the freezes",
    "while saving",
    "while validating",
    "while converting",
)

PARTS = {"step": 8, "save": 2, "save_last": 3, "validate": 1, "prepare": 1, "convert": 1}
"""How often a fit is killed in each part."""


NOT_RESUMED = {"swa": ("validate", "convert")}
"""Parts in which fits of a kind are not killed: Lightning goes on with no fit, float ones neither, whose last
checkpoint is of the end of the last epoch that stochastic weight averaging averages (it raises AttributeError)."""


NOT_FROM = {"swa": STEPS}
"""The step from which on fits of a kind are not killed. Resumed from a checkpoint of the last step, Lightning takes one
batch for the whole epoch in which stochastic weight averaging estimates statistics, of float fits too."""


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: its final state, and its parts.

    Attributes:
        digest: Hashes of its final state.
        calls: Number of function calls in each part.
        seconds: Duration of each part.
    """

    digest: dict[str, str]
    calls: dict[str, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Life:
    """A fit that was killed one or more times, and whether it ended like the uninterrupted run.

    Attributes:
        run: The fit.
        kills: Each effective kill, and where.
        differ: Differences between its final state and the uninterrupted run's; empty if there are none.
    """

    run: Run
    kills: list[tuple[Kill, str]]
    differ: tuple[str, ...]

    def __str__(self) -> str:
        kills = "; ".join(f"{place}: {kill}" for kill, place in self.kills)
        settings = (
            f"{self.run.kind}, mode={self.run.mode}, accumulate={self.run.accumulate}, save_every={self.run.save_every}"
        )
        return f"{settings} | {kills} | differ: {', '.join(self.differ) or 'nothing'}"


@dataclass
class Campaign:
    """Draws fits and kills, and runs them.

    Args:
        server: Runs the fits.
        seed: Seed of the random draws.
        folder: Folder for checkpoints.
        temporary: Folder for temporary files, if not the default.
    """

    server: Server
    seed: int
    folder: Path
    temporary: str | None = None
    random: random.Random = field(init=False)
    _references: dict[tuple[str, int, int, str], Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def live(self, mode: str, kills: int, kind: str = "plain") -> Life:
        """Run one fit that is killed and resumed up to ``kills`` times, and compare its final state."""
        run = Run(
            mode,
            tempfile.mkdtemp(dir=self.folder),
            accumulate=1 if kind == "manual" else self.random.choice((1, 1, 2, 3)),
            save_every=self.random.choice((1, 2)),
            kind=kind,
            temporary=self.temporary,
        )
        reference = self.reference(run)
        hit: list[tuple[Kill, str]] = []
        while len(hit) < kills:
            kill = self._draw(reference, run.kind, after=_last_step(hit))
            outcome = self.server.run(replace(run, kill=kill))
            if outcome.status == "ended":
                break
            if outcome.status != "killed":
                return Life(run, hit, (f"{outcome.status} {outcome.where}: {_log(run)}",))
            hit.append((kill, place(outcome)))
        if not (Path(run.folder) / DIGEST).exists():
            outcome = self.server.run(run)
            if outcome.status != "ended":
                return Life(run, hit, (f"{outcome.status} {outcome.where}: {_log(run)}",))
        return Life(run, hit, tuple(differences(reference, run)))

    def reference(self, run: Run) -> Reference:
        """The uninterrupted run with the same settings, run once."""
        settings = (run.mode, run.accumulate, run.save_every, run.kind)
        if settings not in self._references:
            whole = replace(run, folder=tempfile.mkdtemp(dir=self.folder), count=True)
            outcome = self.server.run(whole)
            _check(outcome, whole, "ended")
            read = _read(whole)
            times = dict(outcome.parts)
            ends = dict(zip(times, [*list(times.values())[1:], outcome.seconds], strict=True))
            seconds = {part: ends[part] - began for part, began in times.items()}
            self._references[settings] = Reference(read["digest"], read["calls"], seconds)
        return self._references[settings]

    def _draw(self, reference: Reference, kind: str, after: int) -> Kill:
        weights = {name: weight for name, weight in PARTS.items() if name not in NOT_RESUMED.get(kind, ())}
        name = self.random.choices(list(weights), list(weights.values()))[0]
        parts = [part for part in reference.seconds if part.split()[0] == name]
        if name in ("step", "save", "save_last"):
            parts = [part for part in parts if int(part.split()[1]) < NOT_FROM.get(kind, math.inf)]
            parts = [part for part in parts if int(part.split()[1]) >= after] or parts[-1:]
        part = self.random.choice(parts)
        at = int(part.split()[1])
        # One kill in four comes from outside, at a time; the others after a number of calls, which can be repeated.
        if name == "prepare" or self.random.random() < 0.25:
            return Kill(name, at, seconds=self.random.uniform(0, reference.seconds[part]))
        return Kill(name, at, calls=self.random.randrange(reference.calls[part]))


def differences(reference: Reference, run: Run) -> list[str]:
    """The differences between a fit's final state and its reference's."""
    ended = _read(run)["digest"]
    return sorted(key for key in reference.digest.keys() | ended.keys() if reference.digest.get(key) != ended.get(key))


def place(outcome: Outcome) -> str:
    """The one of `PLACES` in which a fit ended."""
    name = outcome.where.split()[0] if outcome.where else "prepare"
    named = {"prepare": 0, "save": 5, "save_last": 5, "validate": 6, "convert": 7, "done": 7}
    if name in named:
        return PLACES[named[name]]
    step = int(outcome.where.split()[1])
    return PLACES[1 + sum(step >= point for point in sorted((START, FREEZE_BATCHNORM, FREEZE_OBSERVERS)))]


def tally(lives: list[Life]) -> dict[str, Counter[str]]:
    """For each place the number of kills, and how many of them led to an equal final state."""
    found = {name: Counter[str]() for name in PLACES}
    for life in lives:
        for _, where in life.kills:
            found[where]["killed"] += 1
            found[where]["lost" if life.differ else "equal"] += 1
    return found


@contextmanager
def campaign(seed: int, temporary: str | None = None) -> Iterator[Campaign]:
    """A campaign with its own server and folder."""
    with tempfile.TemporaryDirectory() as folder, Server() as server:
        yield Campaign(server, seed, Path(folder), temporary)


def _last_step(kills: list[tuple[Kill, str]]) -> int:
    return max((kill.at for kill, _ in kills if kill.part in ("step", "save", "save_last")), default=0)


def _check(outcome: Outcome, run: Run, wanted: str) -> None:
    if outcome.status != wanted:
        raise RuntimeError(f"{run} {outcome.status} in {outcome.where!r}:\n{_log(run)}")


def _log(run: Run) -> str:
    return (Path(run.folder) / "log.txt").read_text()[-3000:]


def _read(run: Run) -> dict[str, dict[str, Any]]:
    read: dict[str, dict[str, Any]] = json.loads((Path(run.folder) / DIGEST).read_text())
    return read
