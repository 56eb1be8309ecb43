"""Choosing bits per layer within limits: measure each layer's cost, solve for the best choice, and verify it."""

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
from qat_lightning.settings.overrides import FLOAT, Overrides
from qat_lightning.settings.recipe import Recipe

_ROUNDS = 6
"""Largest number of choices that are verified, until one is within the limits."""

_ALIGNED = 64
_POINTS = 24
"""Number of file sizes for which the plot shows the best choice."""


def bits_within(found: Sensitivity, candidates: Sequence[Candidate], limits: BitLimits) -> BitChoice:
    """Choose bits or float for each layer within limits.

    The steps:

    1. For each number of bits, prepare and calibrate the network once and quantize its layers one at a time: this gives
       the loss of a candidate. Its size is that of the weight in the int8 file. Its latency is measured on networks
       with that layer float (`float_times`): no kernel is faster with fewer than 8 bits, so only int8 or float matters.
    2. Solve one integer program over all layers (`choose`).
    3. Verify: prepare the choice from the float network, calibrate, convert, save and time it. If a limit is exceeded,
       which sums over single layers do not always predict, tighten that limit by the excess and repeat step 2.

    Args:
        found: The ranking, which has the network, its data and its metric.
        candidates: Bits from 2 to 8, and ``"float"``; at least two, including one number of bits.
        limits: With ``max_drop``, the smallest file within the limits is searched for; otherwise the smallest loss.

    Returns:
        The choice within the limits, or the closest one, with its measured figures.

    Raises:
        ConfigurationError: Invalid candidates, a scheme without an int8 network, or a limit on latency in a mode
            with long compile times.
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
        """Return the choice as overrides, after the scheme's own."""
        scheme = self.found.recipe.scheme
        changes = {
            self.found.full_name(name): FLOAT if candidate == FLOAT else {"weight_bits": candidate}
            for name, candidate in choice.items()
        }
        made = Overrides.checked(scheme.overrides).with_layers(changes, {"weight_bits": scheme.weight_bits})
        return dict(made)  # YAML writes no subclass

    def _measure_layers(self, prepared: nn.Module, bits: Candidate) -> None:
        switches = Switches(prepared)
        for name in self.names:
            switches.only([name])
            self.losses[name][bits] = max(0.0, self.loss_of(self.found.measure(prepared)))

    def loss_of(self, metric: float) -> float:
        """Return the difference to the float network's metric, in a unit in which the losses of layers add up.

        For SQNR this is the noise relative to the signal.
        """
        if self.found.in_decibel:
            return float(10 ** (-metric / 10) - 10 ** (-EQUAL_DB / 10))
        return self.found.float_metric - metric

    def metric_of(self, loss: float) -> float:
        """Return the metric for a loss of `loss_of`."""
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
            # Nothing to prepare: ops between float layers are float too.
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
            limits = self._tightened(limits, chosen, costs, measured)
        if not tried:
            slow = self.limits.max_latency_ms is not None and self.limits.max_size_mb is None
            nearest = choose(costs, Limits(), "time" if slow else "size") or ()
            tried[nearest] = self._measured("nearest", self._named(nearest))[1]
        # The last one within the limits, otherwise the closest.
        best = min(reversed(tried), key=lambda c: self.limits.distance(self.found.float_metric, tried[c]))
        choice = self._named(best)
        return self.overrides(choice), choice, tried[best]

    def _named(self, chosen: tuple[int, ...]) -> dict[str, Candidate]:
        return {name: self.candidates[index] for name, index in zip(self.names, chosen, strict=True)}

    def _in_sums(self, rest: Cost) -> tuple[Limits, Goal]:
        """Return the limits on the sums over layers, and which sum to minimize."""
        most = self.limits
        size = math.inf if most.max_size_mb is None else most.max_size_mb * 1e6 - rest.size
        time = math.inf if most.max_latency_ms is None else most.max_latency_ms - rest.time
        if most.max_drop is None:
            return Limits(size=size, time=time), "loss"
        return Limits(self.loss_of(self.found.float_metric - most.max_drop), size, time), "size"

    def _tightened(
        self, limits: Limits, chosen: tuple[int, ...], costs: list[list[Cost]], measured: Measured
    ) -> Limits:
        """Return tightened limits for the next choice, which account for the measured excess over the sums."""
        excess = self.limits.excess(self.found.float_metric, measured)
        loss, size, time = limits.loss, limits.size, limits.time
        if "drop" in excess:
            # By the measured excess of the loss over the sum, and at least enough to exclude this choice.
            really, added = self.loss_of(measured.metric), total(costs, chosen, "loss")
            loss = min(limits.loss * added / really if really > 0 else 0.0, added * (1 - 1e-9) - 1e-12)
        if "size" in excess:
            size = min(size, total(costs, chosen, "size")) - excess["size"] * 1e6
        if "latency" in excess:
            time = min(time, total(costs, chosen, "time")) - excess["latency"]
        return Limits(loss, size, time)


def bytes_in_file(layer: nn.Module, candidate: Candidate) -> int:
    """Return the size of a layer's weights in an int8 file, computed by the file's own writer.

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
            # Every value is the largest integer with this number of bits.
            weight = torch.full_like(weight, 2 ** (int(candidate) - 1) - 1, dtype=torch.int8)
        writer = TensorWriter()
        writer.encode(weight.cpu())
        taken += -(-len(writer.data) // _ALIGNED) * _ALIGNED
    return taken


def _curve(search: _Search, costs: list[list[Cost]], rest: Cost) -> tuple[tuple[float, float], ...]:
    """Return for each file size in MB the best metric, as predicted by the sum of single layers' losses."""
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
