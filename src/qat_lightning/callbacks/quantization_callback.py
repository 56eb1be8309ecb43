"""What the quantizing callbacks share, third part: the variants, and running one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import Self

from qat_lightning.callbacks.parts.arguments import check_flag
from qat_lightning.callbacks.parts.converting import ConvertingCallback
from qat_lightning.callbacks.parts.network import OWN_FORWARD, Slot
from qat_lightning.callbacks.parts.settings_log import log_settings
from qat_lightning.callbacks.parts.tested import log_tested
from qat_lightning.callbacks.parts.variants import Stand
from qat_lightning.errors import ConfigurationError
from qat_lightning.measure.fidelity import Fidelity
from qat_lightning.modes.float_state import present_float
from qat_lightning.modes.prepared import cpu_copy, observe_in_evaluation, prepared_state, set_phase
from qat_lightning.rehearsal.rehearse import OnFault
from qat_lightning.settings.recipe import BatchNormHandling, Equalization
from qat_lightning.settings.scheme import Scheme
from qat_lightning.settings.variants import VARIANTS, check_variant

_EVALUATE = {"validate": "fake_quant", "test": "int8", "predict": "int8"}


class QuantizationCallback(ConvertingCallback):
    """Base of the callbacks that put fake-quant into the network of a LightningModule and convert it to int8.

    Args:
        mode: See `QuantizationAwareTraining`, as for all that follows.
        backend: The target.
        module: Which networks.
        example_inputs: One call.
        scheme: Bits and granularity.
        include: Globs of what to quantize.
        exclude: Globs of what stays float.
        convert: Whether there is to be an int8 network.
        equalization: Whether weights are equalized before.
        batchnorm: Whether BatchNorm stays.
        rehearse: Whether all up to the int8 file is tried on a copy before a training.
        on_fault: What becomes of what cannot be int8.
    """

    _IN_PLACE: ClassVar[str] = "fake_quant"
    """The variant that is in the LightningModule itself."""

    def __init__(
        self,
        mode: str,
        backend: str,
        module: str | list[str] | None,
        example_inputs: Any,
        scheme: Scheme | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
        *,
        convert: bool,
        equalization: Equalization = "none",
        batchnorm: BatchNormHandling = "fused",
        rehearse: bool = True,
        on_fault: OnFault = "leave_float",
    ) -> None:
        super().__init__(
            mode,
            backend,
            module,
            example_inputs,
            scheme,
            include,
            exclude,
            equalization=equalization,
            batchnorm=batchnorm,
            rehearse=rehearse,
            on_fault=on_fault,
        )
        check_flag("convert_on_fit_end", convert)
        self.convert_on_fit_end = convert
        self.observe_stages: tuple[str, ...] = ("train",)
        self.fidelity: dict[str, float] = {}
        self._float_weights: dict[str, dict[str, Tensor]] = {}
        self._chosen: str | None = None
        self._standing: dict[str, tuple[Any, Fidelity | None]] = {}
        self._guest: nn.Module | None = None
        self._running = ""

    @classmethod
    def of(cls, trainer: Trainer, partner: Callback) -> Self:
        """The one of a Trainer, for a callback that goes with it.

        Raises:
            ConfigurationError: There is none, or there are several.
        """
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if isinstance(callback, cls)]
        if len(found) != 1:
            name, wanted = type(partner).__name__, cls.__name__
            if cls is QuantizationCallback:
                wanted = "QuantizationAwareTraining or PostTrainingQuantization"
            raise ConfigurationError(
                f"{name} goes with one {wanted}, and the Trainer has {len(found)}: "
                f"callbacks=[{wanted.split()[0]}(...), {name}(...)]."
            )
        return found[0]

    # What a user asks for

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that can be evaluated now."""
        there = {
            "float": bool(self._float_weights),
            "fake_quant": bool(self._prepared),
            "int8": self._convertible and not self._impossible,
        }
        return tuple(name for name in VARIANTS if there[name])

    @property
    def chosen_variant(self) -> str | None:
        """What `use_variant` chose; None for the default."""
        return self._chosen

    def float_weights(self, name: str) -> dict[str, Tensor] | None:
        """The weights of a network's ``"float"`` variant, on the CPU; None if there is none."""
        return self._float_weights.get(name)

    def use_variant(self, name: str | None) -> None:
        """Choose what ``validate``, ``test`` and ``predict`` run.

        Args:
            name: ``"float"``, ``"fake_quant"``, ``"int8"``, or None for the default: fake-quant to validate, int8 to
                test and predict.

        Raises:
            ConfigurationError: The name is unknown, or there is no such variant, with the reason.
        """
        check_variant(name)
        if name is not None and self.variants and name not in self.variants:
            raise ConfigurationError(f"There is no variant {name!r} to use: {self._why_not(name)}")
        self._chosen = name

    def network(self, name: str) -> nn.Module:
        """A variant as a plain module on the CPU, in evaluation, for measuring it or for exporting it.

        Raises:
            ConfigurationError: There is no such variant.
        """
        check_variant(name)
        if name not in self.variants:
            raise ConfigurationError(f"There is no variant {name!r}: {self._why_not(name)}")
        slot = next(iter(self._slots))
        if name == "float":
            return self._float_network(slot)
        if name == "int8":
            self._convert()
            return self._quantized[slot]
        return cpu_copy(self._prepared[slot])

    @property
    def slots(self) -> dict[str, Slot]:
        """Where the networks are, by name; none before the fit has begun."""
        return dict(self._slots)

    def present_float(self, slot: str) -> nn.Module:
        """The float network with the weights that int8 has, on the CPU, in evaluation."""
        return present_float(self._prepared[slot])

    def comparable(self, slot: str) -> nn.Module:
        """What the int8 network of a slot has to compute: fake-quant, on the CPU, in evaluation."""
        return cpu_copy(self._prepared[slot])

    @contextmanager
    def running(self, network: nn.Module) -> Iterator[None]:
        """Within the block, ``test`` and ``predict`` run another network, on the CPU, in the place of the only one."""
        self._guest = network
        try:
            yield
        finally:
            self._guest = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what needs every process to evaluate as many batches, and arrange for the preparation."""
        if trainer.world_size > 1 and len(self.observe_stages) > 1:
            raise ConfigurationError(
                f"observe_stages={list(self.observe_stages)} is not possible in several processes, which need not "
                "evaluate the same number of batches: use observe_stages=['train']."
            )
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the settings, so that runs can be told apart in any logger."""
        self._log_settings(trainer)

    def _log_settings(self, trainer: Trainer) -> None:
        log_settings(trainer, self, list(self.chosen_modes.values()))

    # Convert

    def _new_networks(self) -> None:
        self._float_weights = {}

    def _was_prepared(self) -> None:
        self._quantized, self._convert_when_asked = {}, False
        self._others_now()
        self._source, self.fidelity = "the present weights", {}

    def _was_loaded(self, source: str) -> None:
        self._others_now()
        self._source = source

    # Evaluate

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside a fit, validate the chosen variant, by default fake-quant."""
        if trainer.state.fn == "validate":
            self._stand_in("validate", trainer, pl_module)
        elif not trainer.sanity_checking:
            self._observe("validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the chosen variant, by default int8."""
        self._stand_in("test", trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the chosen variant, by default int8."""
        self._stand_in("predict", trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the prepared network back."""
        self._stand_back()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the prepared network back, keep how close int8 was to fake-quant, and log what was tested."""
        # Several processes compute this together, so only where all of them come to.
        for _, fidelity in self._standing.values():
            if fidelity is not None:
                self.fidelity = fidelity.compute()
        self._stand_back()
        if self._running and self._chosen is None:  # what was chosen is logged by whoever chose it
            log_tested(trainer, self._running)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the prepared network back."""
        self._stand_back()

    def _stand_in(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running = ""
        if self._guest is not None:
            for name, slot in self._slots.items():
                plain = slot.get() if slot.name != OWN_FORWARD else _Bound(pl_module)
                self._standing[name] = slot.run_instead(Stand(self._guest, plain, on_cpu=True).eval()), None
            return
        variant = self._chosen or self._default_variant(stage)
        if variant == "int8" and self._chosen is None:
            variant = self._int8_or_instead(trainer, stage)
        if variant not in self.variants:
            raise ConfigurationError(f"There is no variant {variant!r} to {stage}: {self._why_not(variant)}")
        self._running = variant
        # Without ranges nothing is rounded: the weights alone neither, which know theirs.
        observes = variant == "fake_quant" and self._observe(stage)
        never_run = self._never_run()
        for name, prepared in self._prepared.items():
            rounds = self._ranges_seen() and name not in never_run
            set_phase(prepared, fake_quant=rounds, observers=observes, batchnorm_frozen=self._phase.batchnorm_frozen)
        if variant == self._IN_PLACE:
            return
        if variant == "int8":
            self._convert_in_all(trainer, to_run=True)
        fidelity = Fidelity() if variant == "int8" and stage == "test" else None
        for name, slot in self._slots.items():
            if variant == "int8" and name not in self._quantized:
                continue
            other = self._quantized[name] if variant == "int8" else self._variant(name, variant).to(pl_module.device)
            plain = slot.get() if slot.name != OWN_FORWARD else _Bound(pl_module)
            reference = self._reference(name, pl_module)
            stand = Stand(other, plain, on_cpu=variant == "int8", fidelity=fidelity, reference=reference)
            self._standing[name] = slot.run_instead(stand.eval()), fidelity

    @property
    def _convertible(self) -> bool:
        """Whether an int8 network can be asked for, as far as is known without trying."""
        return self.convert_on_fit_end and self._ranges_seen() and not self._simulated

    def _int8_or_instead(self, trainer: Trainer, stage: str) -> str:
        """What runs where nobody chose: int8, or what there is if there can be none, with a word on why."""
        if self._convertible and self._convert_or_say(trainer, to_run=True):
            return "int8"
        instead = "fake_quant" if "fake_quant" in self.variants else "float"
        if self._simulated or self._impossible:
            rank_zero_info(f"trainer.{stage} runs {instead}: {self._simulated or self._impossible}.")
        elif self.convert_on_fit_end:
            rank_zero_warn(
                f"trainer.{stage} runs fake-quant, which rounds nothing yet: no range was ever observed. Fit first, or "
                "give ckpt_path= of a fit with this callback."
            )
        return instead

    def _variant(self, name: str, variant: str) -> nn.Module:
        """The network of a slot that is to stand in, other than int8."""
        return self._float_network(name)

    def _reference(self, name: str, pl_module: LightningModule) -> nn.Module | None:
        """What int8 is compared with in a test, if it is not in the LightningModule itself."""
        return None

    def _default_variant(self, stage: str) -> str:
        """What a stage runs if the user chose nothing."""
        return _EVALUATE[stage]

    def _observe(self, stage: str) -> bool:
        """Let ranges move in an evaluation of fake-quant, if that was asked for and they are not frozen."""
        if stage not in self.observe_stages or not self._phase.observers:
            return False
        for prepared in self._prepared.values():
            observe_in_evaluation(prepared, True)
        self._others_now()
        return True

    def _stand_back(self) -> None:
        for name, (before, _) in self._standing.items():
            self._slots[name].run_again(before)
        self._standing = {}
        self._apply(self._phase)
        for prepared in self._prepared.values():
            observe_in_evaluation(prepared, False)

    def _float_network(self, name: str) -> nn.Module:
        network = copy.deepcopy(prepared_state(self._prepared[name]).float_network)
        network.load_state_dict(self._float_weights[name])
        return network.eval()

    def _why_not(self, name: str) -> str:
        if not self._prepared:
            return "nothing was fitted or tested with this callback yet."
        if name == "float":
            return (
                "rounding came on with the first step, so there was no float training to compare with; give "
                "float_checkpoint=, or a later start."
            )
        if not self.convert_on_fit_end:
            return "convert_on_fit_end=False."
        if self._simulated or self._impossible:
            return f"{self._simulated or self._impossible}."
        return "no range was ever observed; fit first, or give ckpt_path= of a fit with this callback."

    # End

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the prepared network in its place, whatever happened."""
        self._stand_back()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the prepared network in its place."""
        self._stand_back()
        super().teardown(trainer, pl_module, stage)


class _Bound(nn.Module):
    """The own forward of a LightningModule while another stands in for it."""

    def __init__(self, pl_module: LightningModule) -> None:
        super().__init__()
        self.__dict__["_forward"] = pl_module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_forward"](*args, **kwargs)
