"""Coverage of a network by parts: the rows of each part, and why everything else is float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from qat_lightning.errors import first_line
from qat_lightning.graph.example import Example
from qat_lightning.graph.scopes import join
from qat_lightning.layers.operators import WEIGHTED
from qat_lightning.modes.coverage import FloatRun, float_run, macs_of
from qat_lightning.modes.own_weights import float_rows
from qat_lightning.modes.prepared import PreparedState
from qat_lightning.modes.protocol import EXCLUDED, LayerCoverage


@dataclass(frozen=True)
class Part:
    """One part, prepared or converted.

    Attributes:
        float_network: The float module.
        example: Its first call.
        layers: Rows of its layers, by their names within the part.
        operations: Rows of its ops.
        why: Why the whole part stays float; empty if it does not.
    """

    float_network: nn.Module
    example: Example
    layers: Sequence[LayerCoverage] = ()
    operations: Sequence[LayerCoverage] = ()
    why: str = ""


def rows_of_parts(
    state: PreparedState, refused: Mapping[str, str], parts: Mapping[str, Part], example: Example
) -> tuple[list[LayerCoverage], list[LayerCoverage]]:
    """The rows of all layers of a network, and of the ops in its parts and between them.

    Multiply-accumulates are those of one call of the whole network, also for parts that it calls several times.

    Args:
        state: State of the prepared network.
        refused: Modules that were tried and refused, and why.
        parts: The parts by name.
        example: One call of the network.
    """
    whole = _Whole(state, float_run(state.float_network, example), example)
    of_parts = {join(name, row.name): row for name, part in parts.items() for row in part.layers}
    layers = []
    for name, module in state.float_network.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        outer = next((part for part in parts if f"{name}.".startswith(f"{part}.")), None)
        if name in of_parts:
            row = replace(of_parts[name], name=name)
        else:
            why = whole.why_outside(name, list(parts), refused) if outer is None else parts[outer].why
            row = LayerCoverage(name, type(module).__name__, False, why)
        layers.append(replace(row, macs=whole.macs(name)))
    known = {row.name for row in layers}
    layers += [replace(row, name=name) for name, row in of_parts.items() if name not in known]  # custom modules
    outside = {
        name: weights
        for name, weights in whole.run.custom.items()
        if not any(f"{name}.".startswith(f"{part}.") for part in parts)
    }
    layers += float_rows(state.float_network, outside, lambda name: state.recipe.selects(join(state.prefix, name)))
    operations = [row for name, part in parts.items() for row in whole.operations(name, part)]
    return layers, [*operations, *whole.between([*layers, *operations])]


class _Whole:
    """One run of the whole float network."""

    def __init__(self, state: PreparedState, run: FloatRun, example: Example) -> None:
        self.state, self.run, self.example = state, run, example
        network = state.float_network
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in network.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)

    def macs(self, name: str) -> int | None:
        """Multiply-accumulates of a module in all its calls; None if it has none, or they were not counted."""
        if self.run.flops is None:
            return None
        names = self.names[self.state.float_network.get_submodule(name)]
        return macs_of(max(self.run.flops.get(known, 0) for known in names), self.example)

    def why_outside(self, name: str, parts: list[str], refused: Mapping[str, str]) -> str:
        """Why a layer outside of the parts stays float."""
        if not self.state.recipe.selects(join(self.state.prefix, name)):
            return EXCLUDED
        if name not in self.run.used:
            return "not used by forward"
        above = [name[:end] for end in range(len(name), 0, -1) if end == len(name) or name[end] == "."]
        why = next((refused[outer] for outer in above if outer in refused), "it belongs to the code around the parts")
        return f"outside of the parts {', '.join(map(repr, parts))}: {first_line(why)}"

    def operations(self, name: str, part: Part) -> list[LayerCoverage]:
        """The ops of a part, with their multiply-accumulates in all of its calls."""
        rows = [replace(row, name=join(name, row.name)) for row in part.operations]
        if not any(row.macs for row in rows):
            return rows
        own = float_run(part.float_network, part.example).flops or {}
        once, often = macs_of(own.get("", 0), part.example), self.macs(name)
        factor = often / once if once and often else 1.0
        return [replace(row, macs=row.macs and round(row.macs * factor)) for row in rows]

    def between(self, rows: Sequence[LayerCoverage]) -> list[LayerCoverage]:
        """The multiply-accumulates of the code around the parts: everything that is in no row."""
        layers = [row for row in rows if row.what == "layer"]
        within = {row.name for row in layers if any(row.name.startswith(f"{outer.name}.") for outer in layers)}
        own = (self.macs("") or 0) - sum(row.macs or 0 for row in rows if row.name not in within)
        if own <= 0:
            return []
        why = "products in the code around the parts stay float in mode='parts'"
        return [LayerCoverage("", type(self.state.float_network).__name__, False, why, what="op", macs=own)]
