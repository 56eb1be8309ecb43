"""Selecting the variant that an evaluation runs, and restoring the network afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from qat_lightning.callbacks.parts.int8_networks import Int8Networks
from qat_lightning.callbacks.parts.network import OWN_FORWARD, Slot
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.tested import log_tested
from qat_lightning.callbacks.parts.variant_source import VariantSource
from qat_lightning.callbacks.parts.variants import Guests, Stand, numbers_of_classes
from qat_lightning.errors import ConfigurationError
from qat_lightning.measure.fidelity import Fidelity
from qat_lightning.modes.prepared import observe_in_evaluation, set_phase
from qat_lightning.settings.variants import VARIANTS, check_variant

FAR_DB = 20.0
"""SQNR of int8 against fake-quant below which a test warns: what exported files have to reach (``min_sqnr_db``)."""


class VariantSwitch(Guests):
    """Runs the chosen or default variant in evaluations, and restores the network afterwards.

    Args:
        networks: The networks of the callback.
        int8: The int8 networks.
        source: Provides the other variants.

    Attributes:
        chosen: The variant chosen by the user; None for the default.
        fidelity: Agreement of int8 with fake-quantization in its last test; empty if a test that should have run int8
            ran something else.
        observe_stages: The stages in which ranges are updated.
    """

    def __init__(self, networks: Networks, int8: Int8Networks, source: VariantSource) -> None:
        self.networks = networks
        self.chosen: str | None = None
        self.fidelity: dict[str, float] = {}
        self.observe_stages: tuple[str, ...] = ("train",)
        self._int8 = int8
        self._source = source
        self._standing: dict[str, tuple[Stand, Any]] = {}
        self._begun = True
        self._compared: Fidelity | None = None
        self._running = ""

    # Requests by the user

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that can be evaluated now."""
        return tuple(v for v in VARIANTS if self._source.has(v) and not (v == "int8" and self._int8.impossible))

    def why_not(self, variant: str) -> str:
        """Return the reason why a variant cannot be evaluated."""
        why = self.networks.simulated or self._int8.impossible
        possible = self.networks.settings.convert_on_fit_end and self.networks.slots
        return f"{why}." if variant == "int8" and why and possible else self._source.why_not(variant)

    def choose(self, variant: str | None) -> None:
        """See `QuantizationCallback.use_variant`."""
        check_variant(variant)
        if variant is not None and self.variants and variant not in self.variants:
            raise ConfigurationError(f"There is no variant {variant!r} to use: {self.why_not(variant)}")
        self.chosen = variant

    def network(self, variant: str) -> nn.Module:
        """See `QuantizationCallback.network`."""
        check_variant(variant)
        if variant not in self.variants:
            raise ConfigurationError(f"There is no variant {variant!r}: {self.why_not(variant)}")
        name = next(iter(self.networks.slots))
        if variant == "float":
            return self._source.float_network(name)
        if variant == "int8":
            self._int8.make()
            return self._int8[name]
        return self._source.comparable(name)

    # Evaluation

    def stand_in(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a stage run the guest network, the chosen variant, or the default."""
        self._running = ""
        if self._guest is not None:
            for name, slot in self.networks.slots.items():
                self._run_instead(name, Stand(self._guest, _plain(slot, pl_module), on_cpu=True, dtype=slot.dtype))
            return
        if stage == "test" and self.chosen in (None, "int8"):
            self.fidelity = {}
        self._begun = False
        variant = self._variant_of(stage, trainer)
        self._running = variant
        # Without observed ranges nothing is rounded, not even weights, whose ranges are known.
        self._set_phase(observers=variant == "fake_quant" and self.observe(stage))
        if variant == self._source.in_place:
            return
        if variant == "int8":
            self._int8.convert_in_all(trainer, to_run=True)
        if variant == "int8" and stage == "test":
            self._compared = Fidelity(classes=numbers_of_classes(pl_module))
        for name, slot in self.networks.slots.items():
            if variant == "int8" and name not in self._int8:
                continue
            int8 = variant == "int8"
            other = self._int8[name] if int8 else self._source.to_stand_in(name).to(pl_module.device)
            plain, reference = _plain(slot, pl_module), self._source.reference(name)
            stand = Stand(
                other,
                plain,
                on_cpu=int8,
                fidelity=self._compared,
                reference=reference,
                name=name,
                dtype=slot.dtype,
            )
            self._run_instead(name, stand)

    def _run_instead(self, name: str, stand: Stand) -> None:
        self._standing[name] = stand, self.networks.slots[name].run_instead(stand)

    @property
    def begins(self) -> bool:
        """Whether an evaluation has begun that has seen no batch."""
        return not self._begun

    def see(self, batch: Any) -> None:
        """Take the batch that is going to be evaluated into account: its labels show which outputs are classes.

        At the first one all hooks of the stage have run. They may have changed weights, which are converted again, or
        exchanged the network, which is reported.
        """
        if self.begins:
            self._begun = True
            self._follow_changes()
        if self._compared is not None:
            self._compared.data = batch

    def _follow_changes(self) -> None:
        for name, (stand, _) in self._standing.items():
            if not self.networks.slots[name].runs(stand):
                rank_zero_warn(
                    f"{name!r} was exchanged for another module after the evaluation began, so that module runs and "
                    f"not {self._running}; nothing is logged as {self._running}. To evaluate an average of weights, "
                    "copy its values into the network (they are converted), or use Lightning's EMAWeightAveraging, "
                    "listed after the quantizing callback."
                )
                self._running = ""
        if self._running == "int8" and self._int8.notice_changes():
            self._int8.make()
            for name, (stand, _) in self._standing.items():
                stand.exchange(self._int8[name])

    def _variant_of(self, stage: str, trainer: Trainer) -> str:
        variant = self.chosen or self._source.default(stage)
        if variant == "int8" and self.chosen is None:
            variant = self._int8_or_instead(trainer, stage)
        if variant not in self.variants:
            raise ConfigurationError(f"There is no variant {variant!r} to {stage}: {self.why_not(variant)}")
        return variant

    def _set_phase(self, *, observers: bool) -> None:
        never_run = self.networks.never_run()
        frozen = self.networks.phase.batchnorm_frozen
        for name, prepared in self.networks.prepared.items():
            rounds = self._source.ranges_seen() and name not in never_run
            set_phase(prepared, fake_quant=rounds, observers=observers, batchnorm_frozen=frozen)

    def _int8_or_instead(self, trainer: Trainer, stage: str) -> str:
        """Return int8, or an available variant if there can be no int8 network, after logging the reason."""
        if self._source.has("int8") and self._int8.convert_or_say(trainer, to_run=True):
            return "int8"
        instead = "fake_quant" if "fake_quant" in self.variants else "float"
        if self.networks.simulated or self._int8.impossible:
            rank_zero_info(f"trainer.{stage} runs {instead}: {self.networks.simulated or self._int8.impossible}.")
        elif self.networks.settings.convert_on_fit_end:
            rank_zero_warn(
                f"trainer.{stage} runs the fake-quant network without quantizing anything, because no range was "
                "observed yet. Fit first, or pass ckpt_path= of a fit with this callback."
            )
        return instead

    def observe(self, stage: str) -> bool:
        """Update ranges while fake-quantization is evaluated, if enabled for this stage and not frozen."""
        if stage not in self.observe_stages or not self.networks.phase.observers:
            return False
        for prepared in self.networks.prepared.values():
            observe_in_evaluation(prepared, True)
        self._int8.outdate()
        return True

    def end_test(self, trainer: Trainer) -> None:
        """After a test: keep the agreement with fake-quantization, restore the network, and log the metrics."""
        # A collective operation, so only where every process calls it.
        if self._compared is not None:
            found = self._compared.compute()
            self.fidelity = found if self._running else {}
            self._warn_of_distance()
            self._warn_if_never_called()
        self.stand_back()
        if self._running and self.chosen is None:  # code that chooses a variant logs its metrics itself
            log_tested(trainer, self._running)

    def _warn_of_distance(self) -> None:
        sqnr = self.fidelity.get("sqnr_db", FAR_DB)
        if sqnr < FAR_DB and self.networks.prepared:  # without fake-quant, float is what int8 is compared with
            rank_zero_warn(
                f"int8 is {sqnr:.1f} dB from fake-quant in this test, less than {FAR_DB:.0f} dB: its metrics are not "
                "those of the network that was trained. Weights or dropout that change during the test have this "
                "effect; otherwise quantized.whole has the comparison from the conversion."
            )

    def _warn_if_never_called(self) -> None:
        if self.begins or not self._standing or any(stand.called for stand, _ in self._standing.values()):
            return
        names = ", ".join(map(repr, self._standing))
        rank_zero_warn(
            f"The step of this test never called {names} itself, so int8 was compared with nothing and fidelity is "
            "empty. Submodules that the step calls directly ran as in training and not in int8, so its metrics are not "
            "those of int8: name these submodules in module=[…], and train again."
        )

    def stand_back(self) -> None:
        """Restore the network and its phase."""
        self._begun = True
        for name, (_, before) in self._standing.items():
            self.networks.slots[name].run_again(before)
        self._standing, self._compared = {}, None
        self.networks.apply(self.networks.phase)
        for prepared in self.networks.prepared.values():
            observe_in_evaluation(prepared, False)


def _plain(slot: Slot, pl_module: LightningModule) -> nn.Module:
    """Return the content of a slot as a module."""
    return slot.get() if slot.name != OWN_FORWARD else _Bound(pl_module)


class _Bound(nn.Module):
    """Wraps the LightningModule's own forward while it is replaced. What it logs is not logged a second time."""

    def __init__(self, pl_module: LightningModule) -> None:
        super().__init__()
        self.__dict__["_forward"] = pl_module.forward
        self.__dict__["_pl_module"] = pl_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _logging_nothing(self.__dict__["_pl_module"]):
            return self.__dict__["_forward"](*args, **kwargs)


@contextmanager
def _logging_nothing(pl_module: LightningModule) -> Iterator[None]:
    own = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    pl_module.__dict__.update(dict.fromkeys(own, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name, method in own.items():
            if method is None:
                del pl_module.__dict__[name]
            else:
                pl_module.__dict__[name] = method
