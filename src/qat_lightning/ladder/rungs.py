"""The rungs, as a table: the limit that each is for, and what it changes in the best plan so far.

A new rung is one more entry. A rung is a pure function of a plan and of what is known. It returns None if it has
nothing to change, and is then skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from qat_lightning.errors import ConfigurationError, MissingExtraError
from qat_lightning.export.formats import check_formats
from qat_lightning.ladder.plan import Plan
from qat_lightning.ladder.sources import ErrorSources, Side
from qat_lightning.ladder.target import LIMITS, Limit
from qat_lightning.recipes.sequential_mse import clipping
from qat_lightning.settings.overrides import Overrides
from qat_lightning.settings.recipe import Kind, Recipe
from qat_lightning.settings.scheme import ActivationObserver, Scheme

FILES = ("torchscript", "onnx", "openvino", "pt2", "executorch")
"""The formats to try for speed, cheapest first."""


@dataclass(frozen=True)
class Known:
    """What a rung may ask besides the plan.

    Attributes:
        epochs: Epochs of the short and of the long training; 0 to leave a training out.
        files: The formats that may be shipped.
        ranking: Globs of the most sensitive layers, most sensitive first; None until it is measured.
        bits: Overrides of the scheme with each layer's bits within the size; None until they are chosen, empty if none
            fits.
        distillation: Whether trainings learn from the float network; False once such a training has failed.
        adaround: Iterations for each layer or block; 0 to leave AdaRound out.
        blocks: Whether the network has blocks whose layers AdaRound can learn together.
        relu6: Whether the network has a ReLU6, which equalization can replace by ReLU.
        exact: Whether oneDNN's kernels are exact on this CPU. If not, only FBGEMM's can be fast.
        sources: The source of the error; None until it is measured.
    """

    epochs: tuple[int, int] = (2, 8)
    files: tuple[str, ...] = FILES
    ranking: tuple[str, ...] | None = None
    bits: Mapping[str, Any] | None = None
    distillation: bool = True
    adaround: int = 1000
    blocks: bool = False
    relu6: bool = False
    exact: bool = True
    sources: ErrorSources | None = None


Need = Literal["", "ranking", "bits", "sources"]

Change = Callable[[Plan, Known], "Plan | None"]


@dataclass(frozen=True)
class Rung:
    """One thing to try.

    Attributes:
        name: Its name in tables and runs, and of its folder.
        limit: The limit that it is for; None for the first rung.
        change: The function that changes the best plan so far.
        needs: The field of `Known` to measure before it; empty for none.
        side: Whether it reduces the error of weights or of activations; empty for both or neither.
    """

    name: str
    limit: Limit | None
    change: Change
    needs: Need = ""
    side: Side = ""


def _first(plan: Plan, known: Known) -> Plan | None:
    return plan


def _other_mode(plan: Plan, known: Known) -> Plan | None:
    """After the first rung has failed: the best mode that supports the network."""
    return None if plan.mode == "auto" else replace(plan, mode="auto")


def _calibrated(change: Callable[..., Plan | None], **settings: Any) -> Change:
    """A change for static quantization without training."""

    def changed(plan: Plan, known: Known) -> Plan | None:
        if plan.kind != "static" or plan.epochs:
            return None
        return change(plan, known, **settings)

    return changed


def _observer(plan: Plan, known: Known, *, name: ActivationObserver) -> Plan | None:
    taken = {"auto": "histogram_mse"}.get(plan.scheme.activation_observer, plan.scheme.activation_observer)
    return None if taken == name else replace(plan, scheme=replace(plan.scheme, activation_observer=name))


def _recipe(plan: Plan, known: Known, **settings: Any) -> Plan | None:
    changed = replace(plan, **settings)
    return None if changed == plan else changed


def _equalization_of_relu6(plan: Plan, known: Known) -> Plan | None:
    """If there is a ReLU6 to replace: this changes the network, and the validation shows whether that matters."""
    return _recipe(plan, known, equalization="replace_relu6") if known.relu6 else None


def _for_few_bits(change: Change) -> Change:
    """Where weights have few bits, for which what takes long comes before float layers, and otherwise after them."""

    def changed(plan: Plan, known: Known) -> Plan | None:
        return change(plan, known) if _fewest_bits(plan.scheme) <= _FEW_BITS else None

    return changed


def _sequential_mse(plan: Plan, known: Known) -> Plan | None:
    """Unless the scheme requires the full range of weights."""
    try:
        clipping(plan.scheme)
    except ConfigurationError:
        return None
    return _recipe(plan, known, sequential_mse=True)


def _adaround_by_blocks(plan: Plan, known: Known) -> Plan | None:
    """If there are blocks: an iteration costs about as much for a block as for its layers one by one."""
    if not known.adaround or not known.blocks:
        return None
    return _recipe(plan, known, adaround=known.adaround, adaround_blocks=True)


def _adaround(plan: Plan, known: Known) -> Plan | None:
    """Unless the best plan uses AdaRound by blocks."""
    return None if plan.adaround_blocks else _recipe(plan, known, adaround=known.adaround)


def _fewest_bits(scheme: Scheme) -> int:
    return min([scheme.weight_bits, *(own.weight_bits for _, own in scheme.own())])


_FEW_BITS = 4


def _wide(plan: Plan, known: Known, *, count: int) -> Plan | None:
    """8 bits for the most sensitive layers, if weights have fewer and these are at most half of all layers."""
    scheme, ranking = plan.scheme, known.ranking
    if plan.epochs or ranking is None or 2 * count > len(ranking) or _fewest_bits(scheme) == _WIDE["weight_bits"]:
        return None
    changes = dict.fromkeys(ranking[:count], _WIDE)
    overrides = Overrides.checked(scheme.overrides).with_layers(changes, {"weight_bits": scheme.weight_bits})
    wide = replace(plan, scheme=replace(scheme, overrides=overrides))
    return None if wide == plan else wide


_WIDE = {"weight_bits": 8}


def _left_float(plan: Plan, known: Known, *, count: int) -> Plan | None:
    """The most sensitive layers, if these are at most half of all layers."""
    ranking = known.ranking
    if plan.epochs or ranking is None or 2 * count > len(ranking):
        return None
    added = [name for name in ranking[:count] if name not in plan.exclude]
    if not added:
        return None
    overrides = {name: fields for name, fields in (plan.scheme.overrides or {}).items() if name not in added}
    return replace(plan, exclude=(*plan.exclude, *added), scheme=replace(plan.scheme, overrides=overrides))


def _training(plan: Plan, known: Known, *, which: int, distillation: bool = True) -> Plan | None:
    epochs = known.epochs[which]
    if epochs <= plan.epochs or distillation != known.distillation:
        return None
    return plan.trained(epochs, distillation=distillation)


def _bits(plan: Plan, known: Known, *, bits: int) -> Plan | None:
    if plan.scheme.weight_bits <= bits:
        return None
    return replace(plan, scheme=replace(plan.scheme, weight_bits=bits, overrides=None))


def _bits_by_layer(plan: Plan, known: Known) -> Plan | None:
    """Bits for each layer within the size, most where they help most."""
    if plan.kind != "static" or plan.epochs or not known.bits or plan.scheme.overrides:
        return None
    return replace(plan, scheme=replace(plan.scheme, overrides=dict(known.bits)))


def _weight_only(plan: Plan, known: Known, *, bits: int) -> Plan | None:
    if plan.kind == "weight_only" and plan.scheme.weight_bits <= bits:
        return None
    fewer = replace(
        plan.scheme, weight_bits=min(bits, plan.scheme.weight_bits), activation_observer="auto", overrides=None
    )
    return replace(plan.without_recipes(), kind="weight_only", scheme=fewer)


def _kernels(plan: Plan, known: Known, *, mode: str, backend: str) -> Plan | None:
    """Other kernels for the same machine: FBGEMM's where oneDNN's are not exact, and only there."""
    if known.exact == (backend == "fbgemm") or plan.epochs or plan.backend not in ("x86", "fbgemm", "onednn"):
        return None
    if (plan.mode, plan.backend) == (mode, backend):
        return None
    return replace(plan, mode=mode, backend=backend, file="")


def _file(plan: Plan, known: Known, *, name: str) -> Plan | None:
    """Another runtime, if its package is installed and it supports such networks."""
    if plan.file == name or name not in known.files:
        return None
    kind: Kind = "qat" if plan.epochs and plan.kind == "static" else plan.kind
    try:
        check_formats([name], Recipe(plan.mode, plan.backend, plan.scheme, kind=kind))
    except (ConfigurationError, MissingExtraError):
        return None
    return replace(plan, file=name)


STATIC = Rung("static", None, _first)
OTHER_MODE = Rung("mode_auto", None, _other_mode)

RUNGS: tuple[Rung, ...] = (
    STATIC,
    OTHER_MODE,
    Rung("bits_by_layer", "size", _bits_by_layer, needs="bits"),
    Rung("weights_4bit", "size", partial(_bits, bits=4)),
    Rung("weight_only_4bit", "size", partial(_weight_only, bits=4)),
    Rung("weights_2bit", "size", partial(_bits, bits=2)),
    Rung("backend_fbgemm", "speedup", partial(_kernels, mode="fx", backend="fbgemm")),
    Rung("backend_onednn", "speedup", partial(_kernels, mode="fx", backend="onednn")),
    *(Rung(f"file_{name}", "speedup", partial(_file, name=name)) for name in FILES),
    Rung("mode_pt2e", "speedup", partial(_kernels, mode="pt2e", backend="x86")),
    Rung("observer_min_max", "drop", _calibrated(_observer, name="min_max"), side="activations"),
    Rung("observer_percentile", "drop", _calibrated(_observer, name="percentile"), side="activations"),
    Rung("observer_histogram_kl", "drop", _calibrated(_observer, name="histogram_kl"), side="activations"),
    Rung("bias_correction", "drop", _calibrated(_recipe, bias_correction=True), side="weights"),
    Rung("equalization", "drop", _calibrated(_recipe, equalization="exact"), side="weights"),
    Rung("equalization_relu6", "drop", _calibrated(_equalization_of_relu6), side="weights"),
    Rung("sequential_mse", "drop", _for_few_bits(_calibrated(_sequential_mse)), side="weights"),
    Rung("adaround_blocks", "drop", _for_few_bits(_calibrated(_adaround_by_blocks)), side="weights"),
    Rung("adaround", "drop", _for_few_bits(_calibrated(_adaround)), side="weights"),
    *(Rung(f"wide_{n}_layers", "drop", partial(_wide, count=n), needs="ranking") for n in (1, 2, 4, 8)),
    *(Rung(f"float_{n}_layers", "drop", partial(_left_float, count=n), needs="ranking") for n in (1, 2, 4, 8)),
    Rung("sequential_mse", "drop", _calibrated(_sequential_mse)),
    Rung("adaround", "drop", _calibrated(_adaround)),
    Rung("qat_short", "drop", partial(_training, which=0)),
    Rung("qat_short_plain", "drop", partial(_training, which=0, distillation=False)),
    Rung("qat_long", "drop", partial(_training, which=1)),
    Rung("qat_long_plain", "drop", partial(_training, which=1, distillation=False)),
)
"""All rungs; those for the same limit are tried in this order, cheap ones first. For the drop, those for the larger
part of the error come first; see `in_order`. A name that is there twice has two places, of which the first that applies
is taken."""

assert {rung.limit for rung in RUNGS} == {None, *LIMITS}

_NOT_IN_EARLIER_SEARCHES = {"backend_fbgemm", "equalization_relu6", "sequential_mse", "adaround_blocks"}


def in_order(rungs: Sequence[Rung], sources: ErrorSources) -> list[Rung]:
    """Rungs in the order in which they are tried: those for the larger part of the error first.

    Rungs that are not for one side alone (more bits, layers left float, training) come after those for one side, but
    before those for a side whose part is negligible, which can bring next to nothing.

    Example:
        >>> [rung.name for rung in in_order(RUNGS, ErrorSources(10.0, 30.0)) if rung.side][:2]
        ['bias_correction', 'equalization']
        >>> [rung.name for rung in in_order(RUNGS, ErrorSources(30.0, 10.0)) if rung.side][:2]
        ['observer_min_max', 'observer_percentile']
        >>> in_order(RUNGS, ErrorSources(10.0, 30.0))[-1].name
        'observer_histogram_kl'
    """
    if not sources.larger:
        return list(rungs)

    def place(rung: Rung) -> int:
        if not rung.side:
            return 2
        return 0 if rung.side == sources.larger else 3 if rung.side == sources.negligible else 1

    return sorted(rungs, key=place)


def rungs_of(names: Collection[str] | None) -> tuple[Rung, ...]:
    """The rungs of a search; it keeps them when a later version continues it, so that the choice stays the same.

    Args:
        names: The names that the folder of the search lists; None for a folder of a version that did not list them.

    Raises:
        ConfigurationError: There is no rung of a name.

    Example:
        >>> [rung.name for rung in rungs_of(["static", "equalization"])]
        ['static', 'equalization']
    """
    if names is None:
        return tuple(rung for rung in RUNGS if rung.name not in _NOT_IN_EARLIER_SEARCHES)
    if unknown := sorted({*names} - {rung.name for rung in RUNGS}):
        raise ConfigurationError(
            f"The search was started by a version of qat-lightning that has more steps ({', '.join(unknown)}): "
            "continue it with that version, or give another folder=."
        )
    return tuple(rung for rung in RUNGS if rung.name in names)
