"""`reach`: from a trained float network and a target to an int8 network that meets it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from rich.text import Text
from torch import nn

from qat_lightning.compare.metric import Metric, choose_metric
from qat_lightning.compare.run import Run
from qat_lightning.errors import ConfigurationError
from qat_lightning.ladder.climb import Climb, Floor, Loggers
from qat_lightning.ladder.clock import Clock
from qat_lightning.ladder.judgement import check_finite
from qat_lightning.ladder.parts import validate_parts, validate_whole
from qat_lightning.ladder.plan import Plan, PostTrainingKind
from qat_lightning.ladder.reached import Reached
from qat_lightning.ladder.rungs import FILES, RUNGS, Known, rungs_of
from qat_lightning.ladder.sources import ErrorSources
from qat_lightning.ladder.store import FLOAT_WEIGHTS, Store, digest_of
from qat_lightning.ladder.target import Target
from qat_lightning.ladder.workshop import Making, TrainerFactory, Workshop
from qat_lightning.numerics.sqnr import finite
from qat_lightning.recipes.blocks import found_blocks
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.run.app import close
from qat_lightning.run.evaluate import logged_behind, write_summary
from qat_lightning.settings.engines import onednn_is_exact
from qat_lightning.settings.recipe import Equalization, Recipe
from qat_lightning.settings.scheme import Scheme
from qat_lightning.sweep.stopping import terminable
from qat_lightning.terminal import console

BY_SOURCES = "sources, negligible last"
"""The order of the steps for accuracy: by the source of the error. Earlier versions always kept the order of the
table."""


def reach(
    trainer_factory: TrainerFactory,
    model: LightningModule,
    datamodule: LightningDataModule,
    target: Target,
    *,
    folder: str | Path = "ladder",
    resume: bool = False,
    metric: str | None = None,
    larger_is_better: bool | None = None,
    mode: str = "fx",
    backend: str = "x86",
    kind: PostTrainingKind = "static",
    scheme: Scheme | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    equalization: Equalization = "none",
    smoothquant: float | None = None,
    rotation: bool = False,
    bias_correction: bool = False,
    module: str | None = None,
    example_inputs: Any = None,
    calibration_batches: int = 32,
    on_fault: OnFault = "leave_float",
    short_epochs: int = 2,
    long_epochs: int = 8,
    distillation: bool = True,
    adaround_iterations: int = 1000,
    files: Sequence[str] = FILES,
    loggers: Loggers | None = None,
    seed: int = 0,
    test: bool = True,
) -> Reached:
    """Find an int8 network that meets a target, trying cheap methods first.

    The search starts with static ranges from a few batches. After that, the missed limit determines the next step:
    fewer bits for the size; other kernels and runtimes for the speed; for accuracy observers, bias correction,
    equalization, sequential MSE and AdaRound, the most sensitive layers left float, and a short and a long
    quantization-aware training with distillation. Whether most of the error comes from weights or from activations is
    measured, and determines which of the steps for accuracy come first. What helped is kept in the following steps, and
    the first network within all limits ends the search.

    Each network is judged as it is shipped: saved, loaded again and validated with the LightningModule's own metric, on
    parts of the validation data and paired with the float network (`qat_lightning.ladder.judgement`). Test data is used
    once, after the choice.

    Args:
        trainer_factory: Called with keyword arguments of `lightning.pytorch.Trainer`, which override its own: the class
            itself, or ``functools.partial(Trainer, accelerator="cpu")``. A training gets ``max_epochs`` and
            ``max_time`` from here.
        model: The trained LightningModule, without quantization. It is copied for each rung. Trainings use its
            ``configure_optimizers``, so give it the learning rate of a fine-tuning.
        datamodule: With training, validation and test loaders. It is set up once and copied for each rung.
        target: The target.
        folder: The folder for all measurements and networks. An interrupted search resumes from it, whatever ended it.
        resume: Resume the search in the folder; otherwise the folder must not hold one.
        metric: A key that ``validation_step`` logs; by default an accuracy, as in `qat_lightning.compare`.
        larger_is_better: Whether larger values of the metric are better; by default its name decides.
        mode: The mode of the first rung, as for `qat_lightning.PostTrainingQuantization`, like all down to
            ``on_fault``.
        backend: As there.
        kind: As there.
        scheme: As there.
        include: As there.
        exclude: As there; more layers may be left float.
        equalization: As there.
        smoothquant: As there; in trainings too, like ``rotation``.
        rotation: As there.
        bias_correction: As there.
        module: As there; one network only.
        example_inputs: As there.
        calibration_batches: As there.
        on_fault: As there.
        short_epochs: Epochs of the short training; 0 to leave it out.
        long_epochs: Epochs of the long training; 0 to leave it out.
        distillation: Let trainings learn from the float network's class scores; False for other outputs.
        adaround_iterations: Iterations for each layer or block; 0 to leave AdaRound out, the slowest step without
            training.
        files: The formats that may be shipped, of ``"torchscript"``, ``"onnx"``, ``"openvino"``, ``"pt2"`` and
            ``"executorch"``; those whose packages are installed are tried if the speed is missed.
        loggers: Creates the loggers of a rung from its name, so that each is a run of its own: for W&B ``lambda rung:
            [WandbLogger(name=rung, group="my-ladder")]``. The float network's is ``"float"``, the final one ``"test"``.
        seed: The seed of each rung, so that its result does not depend on the launch that runs it.
        test: Test the chosen network with `qat_lightning.evaluate_variants`.

    Returns:
        The attempts and the choice, whether or not the target is reached. A table is printed.

    Raises:
        ConfigurationError: The target cannot be reached by construction, the metric is ambiguous, an argument is
            invalid, or the folder holds another search; raised before anything is measured where possible.
        SystemExit: SIGTERM ended the search, at once; its status is 143.

    Example:
        After ``trainer.fit(model, datamodule=dm)``::

            found = reach(Trainer, model, dm, Target(max_drop=0.003, min_speedup=2), folder="outputs/ladder")
            found.kept, found.files
    """
    counts = {"short_epochs": short_epochs, "long_epochs": long_epochs, "adaround_iterations": adaround_iterations}
    _check(target, counts, files)
    start = Plan(
        mode,
        backend,
        kind,
        scheme or Scheme(),
        tuple(include),
        tuple(exclude),
        equalization,
        smoothquant,
        rotation,
        bias_correction,
    )
    if mode != "auto":
        Recipe(  # raises for unsupported combinations
            mode,
            backend,
            start.scheme,
            start.include,
            start.exclude,
            kind=kind,
            equalization=equalization,
            smoothquant=smoothquant,
            rotation=rotation,
        )
    store = Store(Path(folder))
    making = Making(module, example_inputs, calibration_batches, on_fault, seed)
    weights = (store.folder / FLOAT_WEIGHTS).absolute()
    workshop = Workshop(trainer_factory, model, datamodule, making, weights)
    target.check_size(sum(parameter.numel() for parameter in workshop.network.parameters()))
    known = Known((short_epochs, long_epochs), tuple(files), distillation=distillation, adaround=adaround_iterations)
    identity = {
        "weights": digest_of(model),
        "plan": start.to_dict(),
        "making": {key: repr(value) for key, value in vars(making).items()},
        "metric": [metric, larger_is_better],
        "limits": {k: v for k, v in dataclasses.asdict(target).items() if k != "max_minutes"},
        "known": _asked(known),
    }
    usual = {"plan": Plan().to_dict(), "known": _asked(Known()), "limits": {"confident": False}}
    steps = {"rungs": [rung.name for rung in RUNGS], "order": BY_SOURCES}
    as_begun = store.begin(identity, steps, resume=resume, usual=usual)
    rungs = rungs_of(as_begun["rungs"])
    known = dataclasses.replace(
        known,
        blocks=bool(found_blocks(workshop.network)),
        relu6=any(isinstance(module, nn.ReLU6) for module in workshop.network.modules()),
        exact=onednn_is_exact(),
        sources=None if as_begun["order"] == BY_SOURCES else ErrorSources(),
    )
    make_loggers: Loggers = loggers or (lambda rung: [])
    # Lightning's own handler of SIGTERM only ends trainings and evaluations.
    with terminable(), without_banners():
        floor = _floor(workshop, store, make_loggers, (metric, larger_is_better))
        _check_confident(target, floor)
        climb = Climb(workshop, store, floor, target, known, start, make_loggers, rungs)
        reached = climb.go()
        console().print(reached.table())
        console().print(Text(reached.conclusion(), style="bold" if reached.kept else "red"), soft_wrap=True)
        return dataclasses.replace(reached, metrics=climb.test(reached)) if test else reached


def _asked(known: Known) -> dict[str, Any]:
    """The settings in `Known`; the other fields are found in the network."""
    found = ("blocks", "relu6", "exact", "sources")
    values: dict[str, Any] = json.loads(json.dumps({k: v for k, v in vars(known).items() if k not in found}))
    return values


_BANNERS = ("GPU available", "TPU available", "HPU available", "💡 Tip", "`Trainer(limit_val_batches=1)`")


@contextmanager
def without_banners() -> Iterator[None]:
    """Suppress what each new Trainer logs: there are two for each rung."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_BANNERS)

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def _check(target: Target, counts: Mapping[str, int], files: Sequence[str]) -> None:
    if not isinstance(target, Target):
        raise ConfigurationError(f"target={target!r} is not valid: give a qat_lightning.Target.")
    for name, value in counts.items():
        if type(value) is not int or value < 0:
            raise ConfigurationError(f"{name}={value!r} is not valid: give an integer of at least 0.")
    if isinstance(files, str) or (unknown := [one for one in files if one not in FILES]):
        given = files if isinstance(files, str) else unknown
        raise ConfigurationError(f"files: {given!r} is not valid: give a list of some of {', '.join(FILES)}.")


def _floor(workshop: Workshop, store: Store, loggers: Loggers, asked: tuple[str | None, bool | None]) -> Floor:
    """The measurements of the float network, made once."""
    kept = store.read("float")
    if kept is not None:
        return Floor.from_dict(kept)
    began = time.monotonic()
    made = list(loggers("float"))
    try:
        trainer, _, model, datamodule = workshop.standing(made, None, None)
        with logged_behind("float", trainer.loggers):
            found = validate_whole(trainer, model, datamodule)
        metric = _metric(found, *asked)
        (batches,) = trainer.num_val_batches
        parts = validate_parts(trainer, model, datamodule, metric.name, workshop.making.seed, batches)
        check_finite(parts.values)
        trainer.save_checkpoint(store.folder / FLOAT_WEIGHTS, weights_only=True)
        metrics = finite({f"float/{key}": value for key, value in found.items()})
        write_summary(made, metrics, 0)
    finally:
        close(made)
    floor = Floor(metric, parts, metrics, Clock.since(began), None if math.isinf(batches) else int(batches))
    store.write("float", floor.to_dict())
    return floor


def _check_confident(target: Target, floor: Floor) -> None:
    """Refuse a target that cannot be reached: with one part of the validation data there is no interval."""
    if target.confident and len(floor.parts.values) == 1:
        raise ConfigurationError(
            "target.confident=True needs several batches of validation data, and there is one: use smaller batches."
        )


def _metric(found: dict[str, float], name: str | None, larger_is_better: bool | None) -> Metric:
    if name is not None and name not in found:
        raise ConfigurationError(f"metric={name!r}: validation logs {', '.join(found) or 'nothing'}. Use one of these.")
    if not found:
        raise ConfigurationError("Validation logs nothing, and a target is judged by what validation_step logs.")
    run = Run("float", "float", metrics={f"float/{key}": value for key, value in found.items()})
    try:
        metric = choose_metric([run], name, larger_is_better)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"Which metric is judged? Give metric= with one of {', '.join(found)}, and larger_is_better= where the "
            "name does not say it."
        ) from error
    if not math.isfinite(found[metric.name]):
        raise ConfigurationError(
            f"{metric.name} of the float network is {found[metric.name]}, so networks cannot be judged by it."
        )
    return metric
