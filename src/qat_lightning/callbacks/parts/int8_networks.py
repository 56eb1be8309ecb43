"""The int8 networks: created on demand, once for all processes, and renewed when they are stale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
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
from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.export.plain_tensors import in_its_runtime
from qat_lightning.graph.scopes import join
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.modes.registry import mode_for
from qat_lightning.processes import any_process, in_all, in_first, several_processes
from qat_lightning.rehearsal.faults import Conversion


class Int8Networks:
    """Makes int8 networks of prepared ones; in several processes the first does, and the others get them.

    Args:
        networks: What the callback knows.
        source: What an int8 network is made of.

    Attributes:
        impossible: Why conversion failed last; empty if it did not.
        made_from: Where the weights come from, in words.
    """

    def __init__(self, networks: Networks, source: VariantSource) -> None:
        self.networks = networks
        self.impossible = ""
        self.made_from = "the present weights"
        self._source = source
        self._made: dict[str, QuantizedNetwork] = {}
        self._when_asked = False
        self._reported: dict[str, QuantizedNetwork] = {}
        self._stale = True

    def __getitem__(self, name: str) -> QuantizedNetwork:
        """The int8 network of a name that is there."""
        return self._made[name]

    def __contains__(self, name: str) -> bool:
        """Whether there is one of a name."""
        return name in self._made

    def named(self) -> dict[str, QuantizedNetwork]:
        """Those that there are."""
        return dict(self._made)

    def forget(self, *, asked: bool = True) -> None:
        """Nothing was made of the present networks.

        Args:
            asked: Forget as well that a pickled callback had some, which are made when they are asked for.
        """
        self._made = {}
        self._when_asked = self._when_asked and not asked
        self.outdate()

    @property
    def quantized(self) -> Any:
        """The int8 network, a dict of them for several, or None before there is one."""
        if self._when_asked:
            self.make()
        # Of several networks only one may have been run.
        return dict(self._made) if len(self.networks.prepared) > 1 and self._made else one_or_all(self._made)

    def convert(self, exclude: Sequence[str] = ()) -> Any:
        """See `QuantizationCallback.convert`."""
        if not self.networks.slots:
            raise ConversionError("There is nothing to convert yet: run trainer.fit with this callback first.")
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
        if not isinstance(self.quantized, QuantizedNetwork):
            raise ConversionError(
                "There is no int8 network to save: run trainer.fit with this callback first"
                + ("." if self.networks.settings.convert_on_fit_end else ", and with convert_on_fit_end=True.")
                if not self._made
                else "There are several int8 networks: save each, qat.quantized['name'].save(path)."
            )
        self.quantized.save(path)

    def make(self) -> None:
        """Convert, unless there are int8 networks of the present weights and ranges."""
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
        warn_of_float(converted.coverage, "stayed float")
        self._warn_of_ops(conversion, converted)
        with torch.inference_mode(False), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            return in_its_runtime(converted)

    @staticmethod
    def _warn_of_ops(conversion: Conversion, converted: QuantizedNetwork) -> None:
        """Layers at fault are in the warning of all that stayed float; ops are not."""
        layers = {row.name for row in converted.coverage}
        ops = {name: why for name, why in conversion.left_float.items() if name not in layers}
        if ops:
            rows = "; ".join(f"{name}: {why}" for name, why in ops.items())
            rank_zero_warn(f"{len(ops)} ops between layers stayed float: {rows}.")

    def _have(self, converted: dict[str, QuantizedNetwork]) -> None:
        self._made = converted
        self._stale = self._when_asked = False

    def convert_in_all(self, trainer: Trainer, *, to_run: bool) -> None:
        """Convert, and compile if it is to run; in several processes only the first does, and the others get it."""
        if not several_processes(trainer):
            self.make()
            self._report(trainer)
            return
        # Also if this process has it: it may have been requested in only some of the processes.
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
        """`convert_in_all`, where a failure must not cost what is done already: a warning says why it failed."""
        try:
            self.convert_in_all(trainer, to_run=to_run)
        except Exception as error:  # noqa: BLE001 - whatever it is, the fit is done
            lines = str(error).strip().splitlines()
            self.impossible = f"{type(error).__name__}: {lines[0] if lines else ''}"
            rank_zero_warn(
                f"There is no int8 network of {self.made_from}: {error} The trained network with fake-quant "
                "and its checkpoints are unaffected. convert(exclude=[...]) tries again with more layers left float."
            )
            return False
        self.impossible = ""
        return True

    def outdate(self) -> None:
        """The weights or the ranges are others now: what was made of those before is stale."""
        self._stale, self.impossible = True, ""

    def _report(self, trainer: Trainer) -> None:
        """Log what became int8, once for each conversion."""
        if self._reported is self._made or not self._made:
            return
        self._reported = self._made
        rows = [row for network in self._made.values() for row in (*network.coverage, *network.operations)]
        log_coverage(trainer, "quant/coverage", rows)

    def _convert_and_pack(self) -> tuple[dict[str, bytes], dict[str, dict[str, str]]]:
        """The int8 networks, and what of the prepared ones is float, which has to be so in every process."""
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
        """Omit int8 networks, whose packed weights do not pickle; they are created again on demand."""
        state = self.__dict__ | {"_made": {}, "_reported": {}, "_stale": True}
        state["_when_asked"] = self._when_asked or bool(self._made)
        return state
