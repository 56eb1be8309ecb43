"""What the quantizing callbacks share, second part: the int8 networks, made when they are wanted and once for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.callbacks.parts.arguments import check_names
from qat_lightning.callbacks.parts.between_processes import compile_once, pack, unpack
from qat_lightning.callbacks.parts.coverage_report import log_coverage, warn_of_float
from qat_lightning.callbacks.parts.preparing import PreparingCallback, one_or_all
from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import fake_quantizers, prepared_state
from qat_lightning.modes.registry import get_mode
from qat_lightning.processes import any_process, in_all, in_first, several_processes
from qat_lightning.rehearsal.faults import Conversion, convert_what_can_be, joined, leaving_float
from qat_lightning.settings.recipe import Recipe


class ConvertingCallback(PreparingCallback):
    """Makes int8 networks of prepared ones; in several processes the first does, and the others get them.

    Args:
        args: As for `PreparingCallback`.
        kwargs: As for `PreparingCallback`.
    """

    convert_on_fit_end: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._quantized: dict[str, QuantizedNetwork] = {}
        self._convert_when_asked = False
        self._reported: dict[str, QuantizedNetwork] = {}
        self._stale = True
        self._impossible = ""
        self._source = "the present weights"

    @property
    def quantized(self) -> Any:
        """The int8 network, a dict of them for several, or None before there is one."""
        if self._convert_when_asked:
            self._convert()
        # Of several networks only one may have been run.
        return dict(self._quantized) if len(self._prepared) > 1 and self._quantized else one_or_all(self._quantized)

    def convert(self, exclude: Sequence[str] = ()) -> Any:
        """Convert the present weights and ranges now, and again whenever it is called.

        A fit, a test and `quantized` do it by themselves; this is for weights that were changed by hand, and for
        leaving more of a trained network float.

        Args:
            exclude: Globs of module names, relative to the LightningModule, that stay float from now on, in the
                network with fake-quant too.

        Returns:
            `quantized`.

        Raises:
            ConversionError: There is nothing to convert yet, or it fails with everything float as well.
            ConfigurationError: A glob matches nothing that is int8.

        Example:
            After a fit::

                qat.convert(exclude=["net.head"]).save("model.int8")
        """
        if not self._slots:
            raise ConversionError("There is nothing to convert yet: run trainer.fit with this callback first.")
        self._leave_out(check_names("exclude", exclude, example="['head.*']"))
        self._others_now()
        self._convert()
        return self.quantized

    def _leave_out(self, globs: Sequence[str]) -> None:
        for glob in globs:
            left = [
                name
                for slot, prepared in self._prepared.items()
                for name in leave_float(prepared, self._matching(slot, glob), self._examples[slot])
            ]
            if not left:
                raise ConfigurationError(
                    f"exclude={glob!r} matches nothing that is int8 now: qat.coverage names what is."
                )

    def _matching(self, slot: str, glob: str) -> dict[str, str]:
        prefix = self._slots[slot].prefix
        wanted = Recipe(self._any_recipe().mode, self.backend, exclude=(glob,))
        state = prepared_state(self._prepared[slot])
        layers = dict(state.float_network.named_modules())
        names = [name for name in get_mode(state.recipe.mode).parts(self._prepared[slot]) if name in layers]
        return {name: "excluded" for name in names if not wanted.selects(joined(prefix, name))}

    def save(self, path: str | Path) -> None:
        """Write the int8 network to a file that `qat_lightning.load_quantized` reads.

        Raises:
            ConversionError: There is no int8 network yet, or there are several (save each of ``quantized``).
        """
        if not isinstance(self.quantized, QuantizedNetwork):
            raise ConversionError(
                "There is no int8 network to save: run trainer.fit with this callback first"
                + ("." if self.convert_on_fit_end else ", and with convert_on_fit_end=True.")
                if not self._quantized
                else "There are several int8 networks: save each, qat.quantized['name'].save(path)."
            )
        self.quantized.save(path)

    def _convert(self) -> None:
        if not self._stale and self._quantized:
            return
        never_run = self._never_run()
        if never_run:
            rank_zero_warn(
                f"{', '.join(map(repr, never_run))} stayed float: training never ran it on finite values, so that no "
                "range was observed. Leave it out of module= if that is meant."
            )
        self._have({name: self._convert_one(name) for name in self._slots if name not in never_run})

    def _convert_one(self, name: str) -> QuantizedNetwork:
        # Lightning evaluates in inference mode, whose tensors can neither be saved nor copied into others.
        with torch.inference_mode(False), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            conversion, recipe = self._make_int8(name)
        for note in conversion.converted.notes:
            rank_zero_info(note)
        converted = QuantizedNetwork(conversion.converted, recipe, self._examples[name], source=self._source)
        warn_of_float(converted.coverage, "stayed float")
        self._warn_of_ops(conversion, converted)
        return converted

    @staticmethod
    def _warn_of_ops(conversion: Conversion, converted: QuantizedNetwork) -> None:
        """Layers at fault are in the warning of all that stayed float; ops are not."""
        layers = {row.name for row in converted.coverage}
        ops = {name: why for name, why in conversion.left_float.items() if name not in layers}
        if ops:
            rows = "; ".join(f"{name}: {why}" for name, why in ops.items())
            rank_zero_warn(f"{len(ops)} ops between layers stayed float: {rows}.")

    def _make_int8(self, name: str) -> tuple[Conversion, Recipe]:
        """What the mode makes of one network, and by which recipe."""
        prepared, prefix = self._prepared[name], self._slots[name].prefix
        conversion = convert_what_can_be(prepared, self._examples[name])
        state = prepared_state(prepared)
        return conversion, leaving_float(state.recipe, state.left_float, prefix)

    def _have(self, converted: dict[str, QuantizedNetwork]) -> None:
        self._quantized = converted
        self._stale = self._convert_when_asked = False

    def _convert_in_all(self, trainer: Trainer, *, to_run: bool) -> None:
        """Convert, and compile if it is to run; in several processes only the first does, and the others get it."""
        if not several_processes(trainer):
            self._convert()
            self._report(trainer)
            return
        # Also where this one has it: one of the others may have been asked for it, and this one not.
        if any_process(self._stale or not self._quantized):
            packed, left_float = in_first(self._convert_and_pack)
            for name, left in left_float.items():
                leave_float(self._prepared[name], left, self._examples[name])
            in_all(lambda: self._unpack(packed))
            self._report(trainer)
        if to_run:
            compile_once(trainer, self._quantized)

    def _convert_or_say(self, trainer: Trainer, *, to_run: bool) -> bool:
        """`_convert_in_all`, where a failure must not cost what is done already: a warning says why it failed."""
        try:
            self._convert_in_all(trainer, to_run=to_run)
        except Exception as error:  # noqa: BLE001 - whatever it is, the fit is done
            lines = str(error).strip().splitlines()
            self._impossible = f"{type(error).__name__}: {lines[0] if lines else ''}"
            rank_zero_warn(
                f"There is no int8 network of {self._source}: {error} The network with fake-quant is as it was "
                "trained, and so are its checkpoints. convert(exclude=[...]) tries again with more left float."
            )
            return False
        self._impossible = ""
        return True

    def _others_now(self) -> None:
        """The weights or the ranges are others now: what was made of those before is stale."""
        self._stale, self._impossible = True, ""

    def _report(self, trainer: Trainer) -> None:
        """Log what became int8, once for each conversion."""
        if self._reported is self._quantized or not self._quantized:
            return
        self._reported = self._quantized
        rows = [row for network in self._quantized.values() for row in (*network.coverage, *network.operations)]
        log_coverage(trainer, "quant/coverage", rows)

    def _convert_and_pack(self) -> tuple[dict[str, bytes], dict[str, dict[str, str]]]:
        """The int8 networks, and what of the prepared ones is float, which has to be so in every process."""
        self._convert()
        left_float = {name: prepared_state(prepared).left_float for name, prepared in self._prepared.items()}
        return {name: pack(quantized) for name, quantized in self._quantized.items()}, left_float

    def _unpack(self, packed: Mapping[str, bytes]) -> None:
        if not self._stale and self._quantized:
            return
        with torch.inference_mode(False):
            made = {
                name: unpack(packed[name], self._untrained(name), self._examples[name])
                if packed[name]
                else self._convert_one(name)
                for name in self._slots
                if name in packed
            }
        self._have(made)

    def _untrained(self, name: str) -> nn.Module:
        """The float network as its code makes it, with any weights: what an int8 file of eager mode is put into."""
        return prepared_state(self._prepared[name]).float_network

    @property
    def _simulated(self) -> str:
        """Why there can be no int8 network; empty if there can."""
        return next((why for p in self._prepared.values() if (why := prepared_state(p).recipe.simulated)), "")

    def _ranges_seen(self) -> bool:
        return any(map(_knows_a_range, self._prepared.values()))

    def _never_run(self) -> list[str]:
        """Of several networks those that were never run on finite values, where others were."""
        seen = {name: _knows_a_range(prepared) for name, prepared in self._prepared.items()}
        return [name for name, there in seen.items() if not there and any(seen.values())]

    def __getstate__(self) -> dict[str, Any]:
        """Without int8 networks, whose packed weights do not pickle: they are made again when they are asked for."""
        state = self.__dict__ | {"_quantized": {}, "_reported": {}, "_stale": True}
        state["_convert_when_asked"] = self._convert_when_asked or bool(self._quantized)
        return state


def _knows_a_range(prepared: nn.Module) -> bool:
    return any(fq.seen for _, fq in fake_quantizers(prepared) if fq.observed)
