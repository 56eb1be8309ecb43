"""Measuring the sensitivity of layers: quantizing one at a time, or all but one."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example, few_samples, from_user
from qat_lightning.graph.scopes import join
from qat_lightning.measure.layer_figures import decibel
from qat_lightning.modes.layer_schemes import check_overrides_of
from qat_lightning.modes.registry import mode_for
from qat_lightning.numerics.sqnr import EQUAL_DB
from qat_lightning.rehearsal.auto import Decision, decide
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.sensitivity.budget import Budget, MixedPrecision, drop_points, shown_drop, size_ratio
from qat_lightning.sensitivity.switches import Switches, Unit
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe, check_globs
from qat_lightning.settings.scheme import Scheme, stored_bits
from qat_lightning.terminal import LiteralTable

Metric = Callable[[nn.Module], float]
Calibrate = Callable[[nn.Module], Any]
RankBy = Literal["alone", "without"]


@dataclass(frozen=True)
class LayerSensitivity:
    """The cost of quantizing one layer.

    Attributes:
        name: The layer, relative to the network; or an op.
        kind: Its type.
        parameters: Number of values in its weight.
        excludable: Whether it is a module, which ``exclude`` can name.
        alone: The metric with only this layer quantized.
        without: The metric with all layers but this one quantized.
        loss: Its cost. By ``alone``: the float metric minus ``alone``. By ``without``: ``without`` minus the metric
            with all layers quantized.
    """

    name: str
    kind: str
    parameters: int
    excludable: bool
    alone: float
    without: float
    loss: float


class Sensitivity:
    """Layers of a network, ranked by the cost of quantizing them.

    Attributes:
        rows: A `LayerSensitivity` for each layer, the most costly first.
        metric_name: The metric; larger is better.
        float_metric: The metric of the float network.
        quantized_metric: The metric with all layers quantized.
        rank_by: What the order is based on.
        recipe: The recipe that was measured.
        prefix: The network's name in the LightningModule, for overrides.
        network: The float network.
        example: One call of it.
        notes: Deviations from the request, one sentence each.
    """

    def __init__(
        self, network: nn.Module, example: Example, recipe: Recipe, metric: Metric, calibrate_on: Calibrate, **told: Any
    ) -> None:
        self.recipe = recipe
        self.metric_name: str = told["metric_name"]
        self.rank_by: RankBy = told["rank_by"]
        self.prefix: str = told["prefix"]
        self.notes: Sequence[str] = told["notes"]
        self.network, self.example = network, example
        self._metric, self._calibrate = metric, calibrate_on
        self.float_metric = _finite(metric(copy.deepcopy(network).eval()))
        self._prepared = self.prepare(recipe)
        self._switches = Switches(self._prepared)
        self.quantized_metric = self._measure_without([])
        self.rows = self._ranked()

    @property
    def points(self) -> float:
        """The factor for displayed drops: 100 (percentage points) for a score between 0 and 1, otherwise 1."""
        return drop_points((self.float_metric, self.quantized_metric))

    def prepare(self, recipe: Recipe) -> nn.Module:
        """Return a copy of the network, prepared with a recipe and calibrated."""
        prepared = mode_for(recipe).prepare(copy.deepcopy(self.network), self.example, recipe, prefix=self.prefix)
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        prepared.to(device)
        self._calibrate(prepared)
        return prepared

    def measure(self, network: nn.Module) -> float:
        """Return the metric of a network in evaluation mode; larger is better."""
        return _finite(self._metric(network))

    @property
    def in_decibel(self) -> bool:
        """Whether the metric is the SQNR of the outputs."""
        return isinstance(self._metric, OutputSqnr)

    def full_name(self, name: str) -> str:
        """Return the name of a layer in the LightningModule."""
        return join(self.prefix, name)

    def _measure_without(self, names: Sequence[str]) -> float:
        self._switches.all_but(names)
        return self.measure(self._prepared)

    def _ranked(self) -> list[LayerSensitivity]:
        rows = [self._row(unit) for unit in self._switches.units]
        return sorted(rows, key=lambda row: row.loss, reverse=True)

    def _row(self, unit: Unit) -> LayerSensitivity:
        self._switches.only([unit.name])
        alone = self.measure(self._prepared)
        without = self._measure_without([unit.name])
        loss = self.float_metric - alone if self.rank_by == "alone" else without - self.quantized_metric
        return LayerSensitivity(unit.name, unit.kind, unit.parameters, unit.module, alone, without, loss)

    def within(self, budget: Budget) -> MixedPrecision:
        """Choose the layers to leave float so that a budget is kept.

        Layers are left float in the order of the ranking until the drop is small enough. Then layers are quantized
        again, the largest first, if the drop allows it. This uses switched fake-quantization. The result is verified
        with the float network, prepared with that ``exclude``, calibrated and measured; if it exceeds the budget, more
        layers are left float.

        Args:
            budget: A largest drop, a smallest size ratio, or both.

        Returns:
            What to exclude, the measured figures, and whether the budget is kept; if not, the reason.
        """
        layers = [row for row in self.rows if row.excludable]
        if budget.min_size_ratio is not None:
            if self._ratio(()) < budget.min_size_ratio:
                return self._plan((), budget, self.quantized_metric)
            layers = self._that_fit(layers, budget.min_size_ratio)
        candidates = _prefixes(layers)
        if budget.max_drop is None:
            # The best metric that the size allows.
            best = max(candidates, key=lambda c: (self._measure_without(c), -len(c)))
            return self._plan(best, budget, self._verified(best))
        tried = [(c, self._measure_without(c)) for c in candidates]
        enough = [c for c, value in tried if self.float_metric - value <= budget.max_drop]
        rest = candidates[candidates.index(enough[0]) :] if enough else []
        rest = [self._fewer(rest[0], budget), *rest] if rest else []
        outcomes = []
        for chosen in rest:
            value = self._verified(chosen)
            outcomes.append((chosen, value))
            if self.float_metric - value <= budget.max_drop:
                return self._plan(chosen, budget, value)
        if not outcomes:
            chosen = max(tried, key=lambda pair: pair[1])[0]
            outcomes.append((chosen, self._verified(chosen)))
        chosen, value = max(outcomes, key=lambda pair: pair[1])
        return self._plan(chosen, budget, value)

    def _that_fit(self, layers: Sequence[LayerSensitivity], least: float) -> list[LayerSensitivity]:
        """Return layers that can stay float together, in ranking order; layers that are too large are skipped."""
        fit: list[LayerSensitivity] = []
        for row in layers:
            if self._ratio([other.name for other in (*fit, row)]) >= least:
                fit.append(row)
        return fit

    def _fewer(self, names: tuple[str, ...], budget: Budget) -> tuple[str, ...]:
        """Quantize layers again that need not be float, the largest first."""
        assert budget.max_drop is not None
        sizes = {row.name: row.parameters for row in self.rows}
        for name in sorted(names, key=lambda name: sizes[name], reverse=True):
            trial = tuple(other for other in names if other != name)
            if self.float_metric - self._measure_without(trial) <= budget.max_drop:
                names = trial
        return names

    def _verified(self, names: Sequence[str]) -> float:
        """Return the metric of a network that is prepared with these layers excluded."""
        if len(names) == len([row for row in self.rows if row.excludable]):
            return self.float_metric  # no layer is quantized
        globs = tuple(map(self.full_name, names))
        return self.measure(self.prepare(replace(self.recipe, exclude=(*self.recipe.exclude, *globs))))

    def _ratio(self, names: Sequence[str]) -> float:
        kept = [row for row in self.rows if row.name not in names]
        total = sum(parameter.numel() for parameter in self.network.parameters())
        bits = [stored_bits(self.recipe.of(self.full_name(row.name)).scheme.weight_bits) for row in kept]
        stored = sum(row.parameters * each for row, each in zip(kept, bits, strict=True))
        return size_ratio(total, sum(row.parameters for row in kept), stored)

    def _plan(self, names: Sequence[str], budget: Budget, value: float) -> MixedPrecision:
        globs = tuple(map(self.full_name, names))
        return MixedPrecision(
            exclude=(*self.recipe.exclude, *globs),
            budget=budget,
            metric_name=self.metric_name,
            metric=value,
            float_metric=self.float_metric,
            quantized_metric=self.quantized_metric,
            size_ratio=self._ratio(names),
        )

    def table(self) -> Table:
        """Return the ranking for `rich.print`."""
        caption = f"{self.metric_name}: float {self.float_metric:.4f}, all quantized {self.quantized_metric:.4f}"
        table = LiteralTable(title="Sensitivity", title_justify="left", caption=caption, caption_justify="left")
        loss = "loss (pp)" if self.points > 1 else "loss"
        for column in ("layer", "kind", "parameters", "alone", "all but it", loss):
            table.add_column(column, justify="left" if column in ("layer", "kind") else "right", overflow="fold")
        for row in self.rows:
            name = row.name if row.excludable else f"{row.name} (op)"
            numbers = f"{row.alone:.4f}", f"{row.without:.4f}", shown_drop(row.loss, self.points)
            table.add_row(name, row.kind, str(row.parameters or ""), *numbers)
        return table


def sensitivity(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "fx",
    backend: str = "x86",
    scheme: Scheme | None = None,
    metric: Metric | None = None,
    metric_name: str = "",
    calibrate_on: Calibrate | None = None,
    rank_by: RankBy = "alone",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    prefix: str = "",
    kind: Literal["static", "dynamic", "weight_only"] = "static",
) -> Sensitivity:
    """Rank layers by the accuracy that quantizing them costs.

    The network is prepared and calibrated once; then fake-quantization is switched layer by layer. Quantizing one layer
    alone shows its cost; quantizing all but one shows what leaving it float wins back (Wu et al., 2020, section 5.2,
    https://arxiv.org/abs/2004.09602).

    Args:
        network: A trained float network; not changed.
        batches: Inputs for calibration and for the default metric, each a tensor, a tuple of positional inputs or a
            dict of keyword inputs. Each is used many times, so pass a few.
        mode: ``"eager"``, ``"fx"`` or ``"pt2e"``, or ``"auto"`` for the best supported one, which the notes name.
        backend: The backend.
        scheme: Bits and granularity. Learned scales are calibrated instead, which `Sensitivity.notes` reports.
        metric: Called with a network in evaluation mode; larger is better. By default the SQNR of its outputs on
            ``batches`` against the float network's, in dB.
        metric_name: For tables.
        calibrate_on: Called with the prepared network instead of calibrating on ``batches``.
        rank_by: ``"alone"`` or ``"without"``.
        include: Globs of layers to quantize.
        exclude: Globs of layers that always stay float.
        prefix: The network's name in the LightningModule, to which globs are relative.
        kind: ``"static"``, ``"dynamic"`` or ``"weight_only"``.

    Raises:
        ConfigurationError: An argument is invalid.

    Example:
        >>> torch.manual_seed(0) and None
        >>> network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> found = sensitivity(network, [torch.randn(32, 8)])
        >>> sorted(row.name for row in found.rows if row.excludable), found.float_metric
        (['0', '2'], 300.0)
    """
    if kind not in ("static", *DIRECT):
        raise ConfigurationError(f"kind={kind!r} is not valid: use 'static', 'dynamic' or 'weight_only'.")
    if rank_by not in ("alone", "without"):
        raise ConfigurationError(f"rank_by={rank_by!r} is not valid: use 'alone' or 'without'.")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ConfigurationError(f"batches is a {type(batches).__name__}: give a list of calls, like [x].")
    examples = [batch if isinstance(batch, Example) else _example(batch) for batch in batches]
    if not examples:
        raise ConfigurationError("batches is empty: give at least one call of the network.")
    _check_call(network, examples[0])
    first = few_samples(network, from_user(examples[0]))
    scheme, notes = _without_learning(scheme or Scheme())

    def recipe_of(mode: str) -> Recipe:
        direct = kind in DIRECT
        return Recipe(mode, backend, scheme, tuple(include), tuple(exclude), kind=kind, trained=direct)

    # The mode that a fit would choose.
    decision = decide(mode, network, first, recipe_of, prefix=prefix) if mode == "auto" else Decision(mode)
    notes += [f"{decision.why}."] if decision.why else []
    recipe = recipe_of(decision.mode)
    check_overrides_of({prefix: network}, recipe)
    check_globs(recipe, [join(prefix, name) for name, _ in network.named_modules() if name])
    return Sensitivity(
        network,
        first,
        recipe,
        metric or OutputSqnr(network, examples),
        calibrate_on or (lambda prepared: calibrate(prepared, examples)),
        metric_name=metric_name or ("metric" if metric else "SQNR of the outputs in dB"),
        rank_by=rank_by,
        prefix=prefix,
        notes=notes,
    )


def _without_learning(scheme: Scheme) -> tuple[Scheme, list[str]]:
    """Return the scheme with calibrated instead of learned scales, and a note if it differs."""
    if not scheme.learned:
        return scheme, []
    note = f"Measured with calibrated steps instead of learned_step={scheme.learned_step!r}, which needs training."
    return replace(scheme, learned_step="none"), [note]


class OutputSqnr:
    """The default metric: the SQNR of a network's outputs against the float network's, in dB.

    Args:
        network: The float network.
        examples: Calls to run both on.
    """

    def __init__(self, network: nn.Module, examples: Sequence[Example]) -> None:
        self.examples = examples
        self.expected = self._outputs(copy.deepcopy(network).eval())

    @torch.no_grad()
    def _outputs(self, network: nn.Module) -> list[Tensor]:
        results = [network(*copy.deepcopy(e.args), **copy.deepcopy(e.kwargs)) for e in self.examples]
        return [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def __call__(self, network: nn.Module) -> float:
        """The SQNR of another network's outputs; `EQUAL_DB` where they are equal."""
        pairs = list(zip(self.expected, self._outputs(network), strict=True))
        signal = sum(float(wanted.double().square().sum()) for wanted, _ in pairs)
        noise = sum(float((wanted.double() - got.double()).square().sum()) for wanted, got in pairs)
        found = decibel(signal, noise)
        return -EQUAL_DB if found is None else found


def _example(batch: Any) -> Example:
    if isinstance(batch, Mapping):
        return Example((), dict(batch))
    return Example(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))


def _check_call(network: nn.Module, example: Example) -> None:
    if not isinstance(network, nn.Module):
        raise ConfigurationError(f"The network is a {type(network).__name__}: give an nn.Module.")
    try:
        inspect.signature(network.forward).bind(*example.args, **example.kwargs)
    except TypeError as error:
        raise ConfigurationError(
            f"batches does not hold calls of {type(network).__name__} ({error}): a tuple is its positional inputs, a "
            "dict its keyword inputs. Leave labels out: [x for x, _ in loader]."
        ) from error


def _prefixes(rows: Sequence[LayerSensitivity]) -> list[tuple[str, ...]]:
    """Return no layer, the first, the first two, and so on."""
    names = [row.name for row in rows]
    return [tuple(names[:count]) for count in range(len(names) + 1)]


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ConfigurationError(f"The metric is {number}: there is nothing to rank layers by. Give a finite metric.")
    return number
