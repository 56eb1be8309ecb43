"""The search itself: try the next rung, store and judge it, until the target is reached or no rung is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from rich.text import Text

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.compare.ladder import FILE
from qat_lightning.compare.metric import Metric
from qat_lightning.errors import QuantizationError
from qat_lightning.ladder.choice import Attempt, Step, next_step, to_go_on_from
from qat_lightning.ladder.clock import Clock, OutOfTime, ends_after
from qat_lightning.ladder.costs import PARTS, Part, expected_minutes, unknown_parts
from qat_lightning.ladder.estimates import Estimates
from qat_lightning.ladder.judgement import paired_drop
from qat_lightning.ladder.parts import Parts
from qat_lightning.ladder.pieces import minutes_of
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.ranking import choose_bits, find_sources, output_sqnr, rank_layers
from qat_lightning.ladder.reached import Reached
from qat_lightning.ladder.rungs import RUNGS, Known, Rung
from qat_lightning.ladder.sources import ErrorSources
from qat_lightning.ladder.store import Store
from qat_lightning.ladder.target import Target
from qat_lightning.ladder.workshop import Standing, Validation, Workshop
from qat_lightning.numerics.sqnr import finite
from qat_lightning.run.app import close
from qat_lightning.run.evaluate import evaluate_variants, logged_behind, write_summary
from qat_lightning.terminal import console

Loggers = Callable[[str], Sequence[Logger]]

RESERVE = 1.5
"""The time kept for evaluating a trained network, as a multiple of the duration of the first rung."""

_AS_KNOWN: dict[str, Callable[[Any], Any]] = {
    "ranking": tuple,
    "bits": dict,
    "sources": lambda found: ErrorSources(**found),
}
"""How the JSON of each measurement becomes a field of `Known`."""

_WITHOUT = {
    "ranking": "{rung} and similar rungs are skipped: {why}",
    "bits": "{rung} and similar rungs are skipped: {why}",
    "sources": "Whether the error comes from weights or activations is not known, so cheap rungs come first: {why}",
}


@dataclass(frozen=True)
class Floor:
    """The measurements of the float network.

    Attributes:
        metric: The metric that is judged.
        parts: That metric on the parts of the validation data.
        metrics: All metrics of the validation, under the keys of the loggers.
        minutes: Duration of the measurement.
        batches: The number of validation batches; None if the loader has no length, or an earlier version measured.
    """

    metric: Metric
    parts: Parts
    metrics: dict[str, float]
    minutes: float
    batches: int | None = None

    @property
    def validation(self) -> Validation:
        """How the other networks are validated."""
        whole = {key.removeprefix("float/"): value for key, value in self.metrics.items()}
        return Validation(self.metric.name, self.batches, self.parts.tell(whole))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self)) | {"metric": vars(self.metric), "parts": vars(self.parts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Floor:
        """Undo `to_dict`."""
        found = values["parts"]
        parts = Parts(tuple(found["values"]), tuple(found["samples"]), found.get("means", {}))
        return cls(Metric(**values["metric"]), parts, values["metrics"], values["minutes"], values.get("batches"))


class Climb:
    """One search.

    Args:
        workshop: Creates and evaluates networks.
        store: Stores the measurements.
        floor: The measurements of the float network.
        target: The target.
        known: What rungs may ask besides the plan.
        start: The plan of the first rung.
        loggers: Creates the loggers of a rung, by its name.
        rungs: The rungs of the search.
    """

    def __init__(
        self,
        workshop: Workshop,
        store: Store,
        floor: Floor,
        target: Target,
        known: Known,
        start: Plan,
        loggers: Loggers,
        rungs: Sequence[Rung] = RUNGS,
    ) -> None:
        self.workshop, self.store, self.floor, self.target = workshop, store, floor, target
        self.known, self.start, self.loggers, self.rungs = known, start, loggers, rungs
        self.attempts: list[Attempt] = []
        self._why_ended = "Nothing is left to try."
        self._estimates = Estimates(partial(output_sqnr, workshop))
        self._too_long: set[Part] = set()

    def go(self) -> Reached:
        """Try the next rung until the target is reached, the time is over or no rung is left.

        Returns:
            The result, without a test.
        """
        clock = Clock(self.target.max_minutes, self._spent())
        while (step := self._next()) is not None:
            if step.first:
                if not self._learn(step, clock):
                    break
                continue
            attempt = self._stored(step)
            if attempt is None and clock.left <= 0:
                self._out_of_time()
                break
            attempt = attempt or self._tried(step, clock)
            self.attempts.append(attempt)
            self._report()
        return self._report()

    def _next(self) -> Step | None:
        return next_step(self.attempts, self.start, self.target, self.known, self.rungs)

    def _spent(self) -> float:
        """Minutes that earlier launches spent on finished measurements."""
        once = ("float", "sources", "ranking", "bits", *(f"cost_{part}" for part in PARTS))
        found = [self.store.read(name) for name in once]
        for path in (self.store.folder / "rungs").glob("*"):
            found.append(self.store.read(f"rungs/{path.name}/measured") or self.store.read(f"rungs/{path.name}/made"))
        return sum(float(one["minutes"]) for one in found if one is not None)

    def _report(self) -> Reached:
        reached = Reached(
            self.target,
            self.floor.metric,
            tuple(self.attempts),
            self._why_ended,
            self.store.folder,
            self.floor.metrics,
            sources=self.known.sources or ErrorSources(),
        )
        self.store.write(FILE.removesuffix(".json"), reached.ladder().to_dict())
        return reached

    # What is measured once, before the first rung that needs it

    def _learn(self, step: Step, clock: Clock) -> bool:
        """Measure what the rung needs, for all rungs that need it, unless the time is over."""
        kept = self.store.read(step.first)
        if kept is None:
            if clock.left <= 0:
                self._out_of_time()
                return False
            began = time.monotonic()
            try:
                with ends_after(clock.left):
                    found, why = self._measure_layers(step)
            except OutOfTime:
                found, why = {}, "there was no time to measure the layers"
            kept = {"found": found, "why": why, "minutes": Clock.since(began)}
            if why:
                _say(_WITHOUT[step.first].format(rung=step.rung.name, why=why))
            if clock.left > 0:
                self.store.write(step.first, kept)
        self.known = replace(self.known, **{step.first: _AS_KNOWN[step.first](kept["found"])})
        if step.first == "sources" and not kept["why"]:
            _say(ErrorSources(**kept["found"]).words())
        return True

    def _measure_layers(self, step: Step) -> tuple[Any, str]:
        """The measurement that a step needs, for JSON, and the reason if it is empty."""
        try:
            if step.first == "sources":
                return find_sources(self.workshop, step.plan), ""
            if step.first == "ranking":
                return list(rank_layers(self.workshop, step.plan)), ""
            assert self.target.max_size_mb is not None, "bits are only chosen if the size limit is missed"
            return choose_bits(self.workshop, step.plan, self.target.max_size_mb), ""
        except QuantizationError as error:
            return {}, f"{type(error).__name__}: {error}"

    def _out_of_time(self) -> None:
        self._why_ended = f"The {self.target.max_minutes:g} minutes are used up."

    # A rung

    def _stored(self, step: Step) -> Attempt | None:
        kept = self.store.read(f"rungs/{step.rung.name}/measured")
        return None if kept is None else Attempt.from_dict(kept)

    def _tried(self, step: Step, clock: Clock) -> Attempt:
        """Try a rung, unless it does not fit in what is left of the time."""
        name, limited = step.rung.name, self.target.max_minutes is not None
        needs = self._expected(step.plan, clock) if limited else 0.0
        left = clock.left
        if needs > left:
            self._why_ended = f"The remaining steps do not fit in the {self.target.max_minutes:g} minutes."
            about = "longer" if math.isinf(needs) else f"about {needs:.1f} minutes"
            why = f"not started: it takes {about}, and {left:.1f} minutes are left"
            return Attempt(name, step.plan, started=False, error=why)
        _say(f"{name}: {step.plan.words()}" + (f", about {needs:.1f} minutes" if limited else ""))
        began = time.monotonic()
        try:
            with ends_after(left):
                if why := self._no_closer(step):
                    attempt = Attempt(name, step.plan, minutes=Clock.since(began), error=why)
                else:
                    attempt = self._made_and_measured(step, began, left)
        except OutOfTime:
            self._out_of_time()
            return Attempt(name, step.plan, minutes=Clock.since(began), error="its time was used up before it finished")
        self.store.write(f"rungs/{name}/measured", attempt.to_dict())
        return attempt

    def _no_closer(self, step: Step) -> str:
        """Why a recipe for accuracy is not worth a conversion and a validation; empty if it may be."""
        best = to_go_on_from(self.attempts, self.target)
        if not step.rung.side or best is None or self.store.read(f"rungs/{step.rung.name}/made") is not None:
            return ""
        return self._estimates.no_closer(step.plan, best.plan)

    def _expected(self, plan: Plan, clock: Clock) -> float:
        """The expected duration of a plan in minutes."""
        costs = {part: self._cost(part, plan, clock.left) for part in sorted(unknown_parts(plan, self.attempts))}
        return expected_minutes(plan, self.attempts, costs)

    def _cost(self, part: Part, plan: Plan, left: float) -> float:
        """Minutes of a part of a plan, extrapolated from a small piece that is measured once.

        If the piece does not fit into half of the remaining time, the whole does not fit either.
        """
        kept = self.store.read(f"cost_{part}")
        if kept is None and part in self._too_long:
            return math.inf
        if kept is None:
            _say(f"Measuring how long it takes: {part}.")
            began = time.monotonic()
            found, why = 0.0, ""
            try:
                with ends_after(left / 2):
                    found = minutes_of(part, plan, self.workshop)
            except OutOfTime:
                self._too_long.add(part)
                return math.inf
            except QuantizationError as error:  # as the rung itself will say
                why = f"{type(error).__name__}: {error}"
            kept = {"found": found, "why": why, "minutes": Clock.since(began)}
            self.store.write(f"cost_{part}", kept)
        return float(kept["found"])

    def _made_and_measured(self, step: Step, began: float, left: float) -> Attempt:
        name = step.rung.name
        loggers = list(self.loggers(name))
        for logger in loggers:
            logger.log_hyperparams({"rung": name, "plan": step.plan.to_dict()})
        try:
            attempt = self._attempt(step, loggers, began, left)
        except QuantizationError as error:
            attempt = Attempt(name, step.plan, minutes=Clock.since(began), error=f"{type(error).__name__}: {error}")
        finally:
            close(loggers)
        return attempt

    def _attempt(self, step: Step, loggers: Sequence[Logger], began: float, left: float) -> Attempt:
        name, workshop = step.rung.name, self.workshop
        folder, earlier = self.store.rung(name), 0.0
        made = self.store.read(f"rungs/{name}/made")
        if made is None:
            folder.mkdir(parents=True, exist_ok=True)
            reserve = RESERVE * self.attempts[0].minutes if self.attempts else 0.0
            plan, cut_short = workshop.make(step.plan, folder, loggers, left - min(reserve, left / 2))
            made = {"plan": plan.to_dict(), "cut_short": cut_short, "minutes": Clock.since(began)}
            self.store.write(f"rungs/{name}/made", made)
        else:
            earlier = float(made["minutes"])
        plan = Plan.from_dict(made["plan"])
        found = workshop.measure(
            workshop.load(folder),
            plan,
            folder,
            loggers,
            self.floor.validation,
            steady=self.target.min_speedup is not None,
        )
        drop = paired_drop(
            self.floor.parts.values,
            found.parts.values,
            found.parts.samples,
            larger_is_better=self.floor.metric.larger_is_better,
        )
        attempt = Attempt(
            name,
            plan,
            drop,
            found.speedup,
            found.size_mb,
            found.metrics,
            earlier + Clock.since(began),
            bool(made["cut_short"]),
        )
        self._log(attempt, loggers)
        return attempt

    def _log(self, attempt: Attempt, loggers: Sequence[Logger]) -> None:
        """Log all measurements to the run of a rung."""
        assert attempt.drop is not None
        figures = {
            "ladder/drop": attempt.drop.mean,
            "ladder/drop_low": attempt.drop.low,
            "ladder/drop_high": attempt.drop.high,
            "ladder/speedup": attempt.speedup,
            "ladder/size_mb": attempt.size_mb,
            "ladder/minutes": attempt.minutes,
            **{f"ladder/sqnr_{name}": value for name, value in vars(self.known.sources or ErrorSources()).items()},
        }
        known = {key: value for key, value in figures.items() if value is not None and math.isfinite(value)}
        write_summary(loggers, self.floor.metrics | attempt.metrics | known, 0)

    # The test, once

    def test(self, reached: Reached) -> dict[str, float]:
        """Test the float network and the chosen one, unless that was done: the only use of the test data.

        Returns:
            The result of `qat_lightning.evaluate_variants`; empty without a network.
        """
        kept = self.store.read("test")
        best = reached.best
        if best is None:
            return {}
        if kept is not None and kept["rung"] == best.rung:
            return dict(kept["metrics"])
        folder, loggers = self.store.rung(best.rung), list(self.loggers("test"))
        network = self.workshop.load(folder)
        try:
            trainer, callback, model, datamodule = self.workshop.standing(loggers, network, network.example)
            metrics = evaluate_variants(trainer, model, datamodule=datamodule)
            if best.plan.file:
                metrics |= self._test_file(best, folder, network, (trainer, callback, model, datamodule))
                write_summary(trainer.loggers, metrics, 0)
        finally:
            close(loggers)
        metrics = finite(metrics)
        self.store.write("test", {"rung": best.rung, "metrics": metrics})
        return metrics

    def _test_file(
        self, best: Attempt, folder: Path, network: QuantizedNetwork, standing: Standing
    ) -> dict[str, float]:
        """Test the shipped file in its own runtime."""
        trainer, callback, model, datamodule = standing
        name = best.plan.file
        with (
            self.workshop.shipped(network, best.plan, folder) as (artifact, figures),
            callback.running(artifact),
            logged_behind(name, trainer.loggers),
        ):
            results = trainer.test(model, datamodule=datamodule, verbose=False)
        found = {key: float(value) for one in results for key, value in one.items()} | figures
        return {f"{name}/{key}": value for key, value in found.items()}


def _say(words: str) -> None:
    console().print(Text(words), soft_wrap=True)
