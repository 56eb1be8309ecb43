"""What the quantizing callbacks share, second part: the int8 networks, made when they are wanted and once for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from qat_lightning.callbacks.coverage_report import log_coverage, warn_of_float
from qat_lightning.callbacks.preparing import PreparingCallback, one_or_all
from qat_lightning.callbacks.sharing import compile_once, pack, several_processes, unpack
from qat_lightning.errors import ConversionError
from qat_lightning.flows.base import Converted, cpu_copy, fake_quantizers, get_flow, prepared_state
from qat_lightning.processes import any_process, in_all, in_first
from qat_lightning.quantized import QuantizedNetwork
from qat_lightning.recipe import Recipe


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
        self._source = "the present weights"

    @property
    def quantized(self) -> Any:
        """The int8 network, a dict of them for several, or None before there is one."""
        if self._convert_when_asked:
            self._convert()
        # Of several networks only one may have been run.
        return dict(self._quantized) if len(self._prepared) > 1 and self._quantized else one_or_all(self._quantized)

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
            result, recipe = self._make_int8(name)
        for note in result.notes:
            rank_zero_info(note)
        converted = QuantizedNetwork(result, recipe, self._examples[name], source=self._source)
        warn_of_float(converted.coverage, "stayed float")
        return converted

    def _make_int8(self, name: str) -> tuple[Converted, Recipe]:
        """What the flow makes of one network, and by which recipe."""
        prepared = self._prepared[name]
        recipe = prepared_state(prepared).recipe
        return get_flow(recipe.mode).convert(cpu_copy(prepared), self._examples[name]), recipe

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
            packed = in_first(self._convert_and_pack)
            in_all(lambda: self._unpack(packed))
            self._report(trainer)
        if to_run:
            compile_once(trainer, self._quantized)

    def _report(self, trainer: Trainer) -> None:
        """Log what became int8, once for each conversion."""
        if self._reported is self._quantized or not self._quantized:
            return
        self._reported = self._quantized
        rows = [row for network in self._quantized.values() for row in (*network.coverage, *network.operations)]
        log_coverage(trainer, "quant/coverage", rows)

    def _convert_and_pack(self) -> dict[str, bytes]:
        self._convert()
        return {name: pack(quantized) for name, quantized in self._quantized.items()}

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
