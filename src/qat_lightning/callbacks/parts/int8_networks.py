"""The int8 networks: converted on demand, once for all processes, and again when weights or ranges have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.parts.arguments import check_names
from qat_lightning.callbacks.parts.between_processes import compile_once, pack, unpack
from qat_lightning.callbacks.parts.coverage_report import log_coverage, warn_of_float
from qat_lightning.callbacks.parts.networks import Networks, one_or_all
from qat_lightning.callbacks.parts.variant_source import VariantSource
from qat_lightning.errors import ConfigurationError, ConversionError, in_brief
from qat_lightning.export.plain_tensors import in_its_runtime
from qat_lightning.graph.scopes import join
from qat_lightning.modes.coverage import under
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.registry import mode_for
from qat_lightning.processes import any_process, in_all, in_first, several_processes
from qat_lightning.rehearsal.faults import Conversion

_NUMBERS = count(1)


class Int8Networks:
    """Converts prepared networks to int8. With several processes the first converts and sends the result to the others.

    Args:
        networks: The networks of the callback.
        source: Provides the network to convert.

    Attributes:
        impossible: Why the last conversion failed; empty if it did not fail.
        made_from: Description of the weights that were converted.
        conversion: Number of the last conversion, which no other callback of this process has; 0 before there is one.
    """

    def __init__(self, networks: Networks, source: VariantSource) -> None:
        self.networks = networks
        self.impossible = ""
        self.made_from = "the current weights"
        self.conversion = 0
        self._source = source
        self._made: dict[str, QuantizedNetwork] = {}
        self._when_asked = False
        self._reported: dict[str, QuantizedNetwork] = {}
        self._stale = True
        self._checksums: dict[str, int] = {}

    def __getitem__(self, name: str) -> QuantizedNetwork:
        """Return the int8 network with this name."""
        return self._made[name]

    def __contains__(self, name: str) -> bool:
        """Whether there is an int8 network with this name."""
        return name in self._made

    def named(self) -> dict[str, QuantizedNetwork]:
        """Return all int8 networks by name."""
        return dict(self._made)

    def forget(self, *, asked: bool = True) -> None:
        """Discard all int8 networks.

        Args:
            asked: Also discard the note that an unpickled callback had int8 networks, which are created on demand.
        """
        self._made = {}
        self._when_asked = self._when_asked and not asked
        self.outdate()

    @property
    def quantized(self) -> Any:
        """The int8 network of the current weights, a dict by name for several, or None while there can be none."""
        if self._when_asked or self._made or self._can_be_made_here:
            self.make()
        # Of several networks, possibly only one has been run.
        return dict(self._made) if len(self.networks.prepared) > 1 and self._made else one_or_all(self._made)

    @property
    def _can_be_made_here(self) -> bool:
        """Whether this process by itself can convert; whole weights of sharded networks need all processes."""
        return self._source.has("int8") and not self.impossible and not self.networks.sharded

    def convert(self, exclude: Sequence[str] = ()) -> Any:
        """See `QuantizationCallback.convert`."""
        if not self.networks.slots:
            raise ConversionError(
                f"There is nothing to convert yet: run {self._source.made_by} with this callback first."
            )
        self._leave_out(check_names("exclude", exclude, example="['head.*']"))
        self.outdate()
        self.make()
        return self.quantized

    def _leave_out(self, globs: Sequence[str]) -> None:
        for glob in globs:
            left = [
                name
                for slot, prepared in self.networks.prepared.items()
                for name in leave_float(prepared, self._matching(slot, glob), self.networks.examples[slot])
            ]
            if not left:
                raise ConfigurationError(f"exclude={glob!r} matches no int8 layer: qat.coverage lists them.")

    def _matching(self, slot: str, glob: str) -> dict[str, str]:
        prefix = self.networks.slots[slot].prefix
        wanted = replace(self.networks.settings.recipe, include=(), exclude=(glob,), left_float=())
        state = prepared_state(self.networks.prepared[slot])
        layers = dict(state.float_network.named_modules())
        names = [name for name in mode_for(state.recipe).parts(self.networks.prepared[slot]) if name in layers]
        return {name: "excluded" for name in names if not wanted.selects(join(prefix, name))}

    def save(self, path: str | Path) -> None:
        """See `QuantizationCallback.save`."""
        found = self.quantized
        if not isinstance(found, QuantizedNetwork):
            raise ConversionError(self._why_not_one())
        found.save(path)

    def _why_not_one(self) -> str:
        if self._made:
            return "There are several int8 networks: save each, qat.quantized['name'].save(path)."
        if why := self.networks.simulated or self.impossible:
            return f"There is no int8 network of {self.made_from} to save: {why}"
        with_it = "this callback" if self.networks.settings.convert_on_fit_end else "convert_on_fit_end=True"
        everywhere = " in every process" if self.networks.sharded else ""
        by_hand = f"call convert(){everywhere}, or " if self._source.ranges_seen() else ""
        waits = self.networks.slots and not by_hand and self.networks.settings.convert_on_fit_end
        in_fit = f" {self._source.made_in_fit}" if waits else ""
        return f"There is no int8 network to save: {by_hand}run {self._source.made_by} with {with_it} first.{in_fit}"

    def make(self) -> None:
        """Convert, unless int8 networks of the current weights and ranges exist."""
        self.notice_changes()
        if not self._stale and self._made:
            return
        never_run = self.networks.never_run()
        if never_run:
            rank_zero_warn(
                f"{', '.join(map(repr, never_run))} stayed float: training never ran it on finite values, so no "
                "range was observed. Leave it out of module= if this is intended."
            )
        with self.networks.whole():
            self._have({name: self._convert_one(name) for name in self.networks.slots if name not in never_run})

    def _convert_one(self, name: str) -> QuantizedNetwork:
        # Lightning evaluates in inference mode, whose tensors can neither be saved nor copied into others.
        with torch.inference_mode(False), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            conversion, recipe = self._source.make_int8(name)
        for note in conversion.converted.notes:
            rank_zero_info(note)
        converted = QuantizedNetwork(conversion.converted, recipe, self.networks.examples[name], source=self.made_from)
        prefix = self.networks.slots[name].prefix
        warn_of_float(under(prefix, converted.coverage), "stayed float")
        self._warn_of_ops(conversion, converted, prefix)
        with torch.inference_mode(False), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            return in_its_runtime(converted)

    @staticmethod
    def _warn_of_ops(conversion: Conversion, converted: QuantizedNetwork, prefix: str) -> None:
        """Warn of ops that stayed float; layers are in the general warning."""
        layers = {row.name for row in converted.coverage}
        ops = {name: why for name, why in conversion.left_float.items() if name not in layers}
        if ops:
            rows = "; ".join(f"{join(prefix, name)}: {why}" for name, why in ops.items())
            rank_zero_warn(f"{len(ops)} ops between layers stayed float: {rows}.")

    def _have(self, converted: dict[str, QuantizedNetwork]) -> None:
        self._made = converted
        self._stale = self._when_asked = False
        self._checksums = self.networks.checksums()
        self.conversion = next(_NUMBERS)

    def convert_in_all(self, trainer: Trainer, *, to_run: bool) -> None:
        """Convert, and compile if ``to_run``; with several processes the first does and sends the result."""
        if not several_processes(trainer):
            self.make()
            self._report(trainer)
            return
        self.notice_changes()
        # Even if this process has the network: it may have been requested in only some of the processes.
        if any_process(self._stale or not self._made):
            with self.networks.whole(everywhere=False):
                packed, left_float = in_first(self._convert_and_pack)
            for name, left in left_float.items():
                leave_float(self.networks.prepared[name], left, self.networks.examples[name])
            with nullcontext() if all(packed.values()) else self.networks.whole():
                in_all(lambda: self._unpack(packed))
            self._report(trainer)
        if to_run:
            compile_once(trainer, self._made)

    def convert_or_say(self, trainer: Trainer, *, to_run: bool) -> bool:
        """As `convert_in_all`, but a failure is reported as a warning, so that finished training is not lost."""
        try:
            self.convert_in_all(trainer, to_run=to_run)
        except Exception as error:  # noqa: BLE001 - the fit has finished; any failure is only reported
            self.give_up(
                error,
                "The trained network with fake-quant and its checkpoints are unaffected. convert(exclude=[...]) tries "
                "again with more layers left float.",
            )
            return False
        self.impossible = ""
        return True

    def give_up(self, error: Exception, advice: str) -> None:
        """Warn that there are no int8 networks of the current weights, because of an error, and what to do."""
        self.impossible = in_brief(error)
        self._made = {}  # those of other weights
        rank_zero_warn(f"There is no int8 network of {self.made_from}: {error} {advice}")

    def outdate(self) -> None:
        """Mark the int8 networks as stale, because weights or ranges have changed."""
        self._stale, self.impossible = True, ""

    def end_fit(self, made_from: str) -> None:
        """Name the weights that a fit ended with. An int8 network that a hook already had made of them is kept."""
        if self.networks.sharded:  # whose checksums tell nothing
            self.outdate()
        stale = self.notice_changes()
        self.made_from = made_from
        for quantized in () if stale else self._made.values():
            quantized.source = made_from

    def notice_changes(self) -> bool:
        """Mark them as stale if weights or ranges are others than those that were converted; return whether they are.

        Code outside of Lightning's stages may change weights at any time: a checkpoint loaded by hand, an average of
        weights copied into the network, a training loop.
        """
        if self._made and not self._stale and self.networks.checksums() != self._checksums:
            self.outdate()
            self.made_from = "the current weights"
        return self._stale

    def _report(self, trainer: Trainer) -> None:
        """Log coverage, once per conversion."""
        if self._reported is self._made or not self._made:
            return
        self._reported = self._made
        rows = [
            row
            for name, network in self._made.items()
            for row in under(self.networks.slots[name].prefix, (*network.coverage, *network.operations))
        ]
        log_coverage(trainer, "quant/coverage", rows)

    def _convert_and_pack(self) -> tuple[dict[str, bytes], dict[str, dict[str, str]]]:
        """Return the packed int8 networks, and which layers stayed float, to apply in every process."""
        self.make()
        left_float = {name: prepared_state(prepared).left_float for name, prepared in self.networks.prepared.items()}
        return {name: pack(quantized) for name, quantized in self._made.items()}, left_float

    def _unpack(self, packed: Mapping[str, bytes]) -> None:
        if not self._stale and self._made:
            return
        with torch.inference_mode(False):
            made = {
                name: unpack(packed[name], self._source.untrained(name), self.networks.examples[name])
                if packed[name]
                else self._convert_one(name)
                for name in self.networks.slots
                if name in packed
            }
        self._have(made)

    def __getstate__(self) -> dict[str, Any]:
        """Omit int8 networks, whose packed weights cannot be pickled; they are created again on demand."""
        state = self.__dict__ | {"_made": {}, "_reported": {}, "_stale": True}
        state["_when_asked"] = self._when_asked or bool(self._made)
        return state
