"""Bits by budget: what each number of bits costs in each layer, the best choice of all, and what that really gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.artifact.tensors import TensorWriter
from qat_lightning.artifact.write import artifact_bytes
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.signature import one_sample
from qat_lightning.layers.integer.weight_only import weights_of
from qat_lightning.measure.metrics import latency_ms, size_mb
from qat_lightning.modes.prepared import cpu_copy
from qat_lightning.numerics.sqnr import EQUAL_DB
from qat_lightning.rehearsal.faults import convert_what_can_be
from qat_lightning.sensitivity.bit_choice import BitChoice, BitLimits, Candidate, LayerBits, Measured
from qat_lightning.sensitivity.choice import Cost, Goal, Limits, choose, total
from qat_lightning.sensitivity.measured import Sensitivity
from qat_lightning.sensitivity.switches import Switches
from qat_lightning.sensitivity.times import float_times
from qat_lightning.settings.overrides import FLOAT
from qat_lightning.settings.recipe import Recipe

_ROUNDS = 6
"""Choices that are verified, one after the other, until one keeps the limits."""

_ALIGNED = 64
_POINTS = 24
"""Sizes for which the picture has the best choice."""


def bits_within(found: Sensitivity, candidates: Sequence[Candidate], limits: BitLimits) -> BitChoice:
    """Choose the bits of each layer, or float, so that the limits are kept.

    For each number of bits the network is prepared and calibrated once, and its layers are rounded one at a time: that
    is what the candidate loses there. What it takes in the file is what the file's own writer makes of the weight, and
    what it takes of the latency is measured on networks with that layer float (`float_times`): no kernel is faster for
    fewer bits than 8, so that latency is a question of int8 or float only. Then one integer program chooses for all
    layers (`choose`), and the choice is prepared anew, calibrated, converted, saved and timed. If that is past a limit,
    which sums of single layers need not show, the limit is drawn in by as much, and chosen again.

    Args:
        found: The ranking, which has the network, its data and its metric.
        candidates: Numbers of bits from 2 to 8, and ``"float"``; two at least, and one of them bits.
        limits: With a largest drop the smallest file is looked for that keeps it; without one the least loss.

    Returns:
        The choice that keeps the limits, or the one that came nearest, with what was measured.

    Raises:
        ConfigurationError: Invalid candidates, a scheme without an int8 network, or a limit on latency in a mode
            that compiles for long.
        MissingExtraError: scipy is not installed.
    """
    return _Search(found, _checked(found.recipe, candidates, limits), limits).run()


class _Search:
    def __init__(self, found: Sensitivity, candidates: tuple[Candidate, ...], limits: BitLimits) -> None:
        self.found, self.candidates, self.limits = found, candidates, limits
        self.names = [row.name for row in found.rows if row.excludable and row.parameters]
        if not self.names:
            raise ConfigurationError("There is no layer to choose bits for: none that exclude= could name was ranked.")
        self.bits = [candidate for candidate in candidates if candidate != FLOAT]
        self.uniform: list[Measured] = []
        self.times: dict[str, float] = {}
        self.losses: dict[str, dict[Candidate, float]] = {name: {"float": 0.0} for name in self.names}

    def run(self) -> BitChoice:
        for bits in self.bits:
            choice = dict.fromkeys(self.names, bits)
            prepared = self.found.prepare(self.recipe_with(choice))
            quantized, measured = self._measured(f"{bits} bits", choice, prepared)
            self.uniform.append(measured)
            if bits == max(self.bits) and self.limits.max_latency_ms is not None:
                assert isinstance(quantized, QuantizedNetwork)
                self.times = float_times(prepared, quantized, self.names, self.found.example)
            self._measure_layers(prepared, bits)
        layers = [self._layer(name) for name in self.names]
        costs = [layer.costs(self.candidates) for layer in layers]
        whole, widest = self.uniform[self.bits.index(max(self.bits))], self.candidates.index(max(self.bits))
        weights = total(costs, [widest] * len(layers), "size")
        rest = Cost(size=whole.size_mb * 1e6 - weights, time=whole.latency_ms or 0.0)
        chosen = self._search(costs, rest)
        curve = _curve(self, costs, rest)
        return BitChoice(
            self.limits, self.found.metric_name, self.found.float_metric, layers, *chosen, tuple(self.uniform), curve
        )

    def recipe_with(self, choice: dict[str, Candidate]) -> Recipe:
        return replace(self.found.recipe, scheme=replace(self.found.recipe.scheme, overrides=self.overrides(choice)))

    def overrides(self, choice: dict[str, Candidate]) -> dict[str, Any]:
        """What of the scheme a choice changes, behind what the scheme has of its own already."""
        scheme = self.found.recipe.scheme
        made: dict[str, Any] = dict(scheme.overrides or {})
        for name, candidate in choice.items():
            full = self.found.full_name(name)
            if candidate == FLOAT:
                made[full] = FLOAT
                continue
            fields: dict[str, Any] = next((f for p, f in reversed(made.items()) if f != FLOAT and p == full), {})
            if scheme.of(full).weight_bits != candidate or fields:
                made[full] = {**fields, "weight_bits": candidate}
        return made

    def _measure_layers(self, prepared: nn.Module, bits: Candidate) -> None:
        switches = Switches(prepared)
        for name in self.names:
            switches.only([name])
            self.losses[name][bits] = max(0.0, self.loss_of(self.found.measure(prepared)))

    def loss_of(self, metric: float) -> float:
        """What a metric is short of the float network's, in a unit in which the losses of layers add up.

        Of an SQNR it is the noise as a share of the signal.
        """
        if self.found.in_decibel:
            return float(10 ** (-metric / 10) - 10 ** (-EQUAL_DB / 10))
        return self.found.float_metric - metric

    def metric_of(self, loss: float) -> float:
        """Undo `loss_of`."""
        if self.found.in_decibel:
            return -10 * math.log10(max(loss, 0.0) + 10 ** (-EQUAL_DB / 10))
        return self.found.float_metric - loss

    def _measured(
        self, label: str, choice: dict[str, Candidate], prepared: nn.Module | None = None
    ) -> tuple[nn.Module, Measured]:
        """Prepare a choice, calibrate, measure, convert, save and time it."""
        recipe = self.recipe_with(choice)
        one = one_sample(self.found.example) if self.limits.max_latency_ms is not None else None
        if set(choice.values()) == {FLOAT}:
            # There is nothing to prepare: what is between the layers is float with them.
            network = self.found.network.eval()
            time = None if one is None else latency_ms(network, one.args, one.kwargs).median_ms
            return network, Measured(label, self.found.float_metric, size_mb(network), time)
        prepared = self.found.prepare(recipe) if prepared is None else prepared
        metric = self.found.measure(prepared)
        conversion = convert_what_can_be(cpu_copy(prepared), self.found.example)
        quantized = QuantizedNetwork(conversion.converted, recipe, self.found.example)
        time = None if one is None else latency_ms(quantized, one.args, one.kwargs).median_ms
        return quantized, Measured(label, metric, len(artifact_bytes(quantized)) / 1e6, time)

    def _layer(self, name: str) -> LayerBits:
        module = self.found.network.get_submodule(name)
        row = next(row for row in self.found.rows if row.name == name)
        return LayerBits(
            name,
            row.kind,
            row.parameters,
            {candidate: self.losses[name][candidate] for candidate in self.candidates},
            {candidate: bytes_in_file(module, candidate) for candidate in self.candidates},
            {candidate: self.times.get(name, 0.0) if candidate == FLOAT else 0.0 for candidate in self.candidates},
        )

    def _search(self, costs: list[list[Cost]], rest: Cost) -> tuple[dict[str, Any], dict[str, Candidate], Measured]:
        limits, goal = self._in_sums(rest)
        tried: dict[tuple[int, ...], Measured] = {}
        for _ in range(_ROUNDS):
            chosen = choose(costs, limits, goal)
            if chosen is None or chosen in tried:
                break
            _, measured = self._measured("chosen", self._named(chosen))
            tried[chosen] = measured
            excess = self.limits.excess(self.found.float_metric, measured)
            if not excess:
                break
            limits = self._drawn_in(limits, chosen, costs, measured)
        if not tried:
            slow = self.limits.max_latency_ms is not None and self.limits.max_size_mb is None
            nearest = choose(costs, Limits(), "time" if slow else "size") or ()
            tried[nearest] = self._measured("nearest", self._named(nearest))[1]
        # Of those that keep the limits the last, else what is past them by the least.
        best = min(reversed(tried), key=lambda c: self.limits.distance(self.found.float_metric, tried[c]))
        choice = self._named(best)
        return self.overrides(choice), choice, tried[best]

    def _named(self, chosen: tuple[int, ...]) -> dict[str, Candidate]:
        return {name: self.candidates[index] for name, index in zip(self.names, chosen, strict=True)}

    def _in_sums(self, rest: Cost) -> tuple[Limits, Goal]:
        """The limits on what layers add up to, and what is to be least."""
        most = self.limits
        size = math.inf if most.max_size_mb is None else most.max_size_mb * 1e6 - rest.size
        time = math.inf if most.max_latency_ms is None else most.max_latency_ms - rest.time
        if most.max_drop is None:
            return Limits(size=size, time=time), "loss"
        return Limits(self.loss_of(self.found.float_metric - most.max_drop), size, time), "size"

    def _drawn_in(self, limits: Limits, chosen: tuple[int, ...], costs: list[list[Cost]], measured: Measured) -> Limits:
        """Limits for the next choice, so that the sums leave room for what was measured beyond them."""
        excess = self.limits.excess(self.found.float_metric, measured)
        loss, size, time = limits.loss, limits.size, limits.time
        if "drop" in excess:
            # By what the layers lose together beyond the sum, and at least below this choice.
            really, added = self.loss_of(measured.metric), total(costs, chosen, "loss")
            loss = min(limits.loss * added / really if really > 0 else 0.0, added * (1 - 1e-9) - 1e-12)
        if "size" in excess:
            size = min(size, total(costs, chosen, "size")) - excess["size"] * 1e6
        if "latency" in excess:
            time = min(time, total(costs, chosen, "time")) - excess["latency"]
        return Limits(loss, size, time)


def bytes_in_file(layer: nn.Module, candidate: Candidate) -> int:
    """What the weights of a layer take in the file of an int8 network, by the file's own writer.

    Args:
        layer: The float layer.
        candidate: Its bits, or ``"float"``.

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> [bytes_in_file(layer, candidate) for candidate in (4, 8, "float")]
        [2048, 4096, 16384]
    """
    taken = 0
    for name in weights_of(layer):
        weight: Tensor = layer.get_parameter(name).detach().float()
        if candidate != FLOAT:
            # The largest integer there is with so many bits, in each place.
            weight = torch.full_like(weight, 2 ** (int(candidate) - 1) - 1, dtype=torch.int8)
        writer = TensorWriter()
        writer.encode(weight.cpu())
        taken += -(-len(writer.data) // _ALIGNED) * _ALIGNED
    return taken


def _curve(search: _Search, costs: list[list[Cost]], rest: Cost) -> tuple[tuple[float, float], ...]:
    """The best choices of all sizes, as the size in MB and the metric that the sum of the losses of layers predicts."""
    smallest, largest = (total(costs, choose(costs, Limits(), goal) or (), "size") for goal in ("size", "loss"))
    points: dict[float, float] = {}
    for step in range(_POINTS + 1):
        chosen = choose(costs, Limits(size=smallest + (largest - smallest) * step / _POINTS), "loss")
        if chosen is not None:
            size = (total(costs, chosen, "size") + rest.size) / 1e6
            points[size] = search.metric_of(total(costs, chosen, "loss"))
    return tuple(sorted(points.items()))


def _checked(recipe: Recipe, candidates: Sequence[Candidate], limits: BitLimits) -> tuple[Candidate, ...]:
    unique = tuple(dict.fromkeys(candidates))
    possible = [c for c in unique if c == FLOAT or (type(c) is int and 2 <= c <= 8)]
    if list(unique) != possible or len(unique) < 2 or set(unique) == {FLOAT}:
        raise ConfigurationError(
            f"bits={list(candidates)!r} leaves no choice: give two or more of 2 to 8 and 'float', such as 4 8 float."
        )
    if recipe.simulated:
        raise ConfigurationError(f"There is no int8 network to choose bits for: {recipe.simulated}.")
    if limits.max_latency_ms is not None and recipe.mode == "pt2e":
        raise ConfigurationError(
            "A limit on latency needs the time of each layer, and mode='pt2e' compiles all layers into one function: "
            "use mode='fx' or mode='eager' (quantization.mode=fx mode.name=fx), or another limit."
        )
    return unique
