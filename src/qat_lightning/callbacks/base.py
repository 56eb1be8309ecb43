"""What the quantizing callbacks share: preparing in time, the variants, and running one in the place of another."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.backends import get_backend, require
from qat_lightning.callbacks.company import refuse_callbacks, refuse_strategy
from qat_lightning.checkpoints import guard_loading, note_added_keys
from qat_lightning.errors import ConfigurationError, ConversionError
from qat_lightning.example import catch_examples, examples_from_user, from_user
from qat_lightning.flows.base import (
    Example,
    cpu_copy,
    fake_quantizers,
    get_flow,
    is_prepared,
    prepared_state,
    set_phase,
)
from qat_lightning.network import OWN_FORWARD, Slot, find_networks
from qat_lightning.prepare import choose_mode
from qat_lightning.quantized import QuantizedNetwork
from qat_lightning.recipe import Recipe, check_globs
from qat_lightning.schedule import Phase
from qat_lightning.scheme import Scheme
from qat_lightning.variants import VARIANTS, Fidelity, Stand, check_variant

BEFORE = Phase(fake_quant=False, observers=True, batchnorm_frozen=False)
"""The phase in which every fit begins."""

_EVALUATE = {"validate": "fake_quant", "test": "int8", "predict": "int8"}


class QuantizationCallback(Callback):
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
    """

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
    ) -> None:
        target = get_backend(backend, mode)
        require(target)
        self.mode = mode
        self.backend = backend
        self.module = module
        self.scheme = scheme if scheme is not None else Scheme()
        if not isinstance(self.scheme, Scheme):
            raise ConfigurationError(f"scheme={scheme!r} is not possible: give a qat_lightning.Scheme.")
        self.include, self.exclude = tuple(include or ()), tuple(exclude or ())
        self._recipe(target.modes[0] if mode == "auto" else mode)
        self.convert_on_fit_end = convert
        self.fidelity: dict[str, float] = {}
        self._user_example = example_inputs
        if example_inputs is not None and isinstance(module, (str, type(None))):
            from_user(example_inputs)
        self._slots: dict[str, Slot] = {}
        self._prepared: dict[str, nn.Module] = {}
        self._examples: dict[str, Example] = {}
        self._quantized: dict[str, QuantizedNetwork] = {}
        self._float_weights: dict[str, dict[str, Tensor]] = {}
        self._phase = BEFORE
        self._chosen: str | None = None
        self._standing: dict[str, tuple[Any, Fidelity | None]] = {}
        self._stale = True
        self._source = "the present weights"
        self._guard: RemovableHandle | None = None
        self._put_back: Callable[[], None] | None = None

    # What a user asks for

    @property
    def prepared(self) -> Any:
        """The network with fake-quant, a dict of them for several, or None before the fit."""
        return _one_or_all(self._prepared)

    @property
    def quantized(self) -> Any:
        """The int8 network, a dict of them for several, or None before there is one."""
        return _one_or_all(self._quantized)

    @property
    def example_inputs_(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call that the (first) network was prepared with: positional and keyword inputs, on the CPU."""
        if not self._examples:
            raise ConfigurationError(
                "There are no example inputs yet: nothing was fitted or tested with this callback."
            )
        example = next(iter(self._examples.values()))
        return example.args, example.kwargs

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants that can be evaluated now."""
        there = {
            "float": bool(self._float_weights),
            "fake_quant": bool(self._prepared),
            "int8": bool(self._prepared) and self.convert_on_fit_end and self._ranges_seen(),
        }
        return tuple(name for name in VARIANTS if there[name])

    def use_variant(self, name: str | None) -> None:
        """Choose what ``validate``, ``test`` and ``predict`` run.

        Args:
            name: ``"float"``, ``"fake_quant"``, ``"int8"``, or None for the default: fake-quant to validate, int8 to
                test and predict.

        Raises:
            ConfigurationError: The name is unknown, or there is no such variant, with the reason.
        """
        check_variant(name)
        if name is not None and self._prepared and name not in self.variants:
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
        slot = next(iter(self._prepared))
        if name == "float":
            return self._float_network(slot)
        if name == "int8":
            self._convert()
            return self._quantized[slot]
        return cpu_copy(self._prepared[slot])

    def save(self, path: str | Path) -> None:
        """Write the int8 network to a file that `qat_lightning.load_quantized` reads.

        Raises:
            ConversionError: There is no int8 network yet, or there are several (save each of ``quantized``).
        """
        if not isinstance(self.quantized, QuantizedNetwork):
            raise ConversionError(
                "There is no int8 network to save: fit first, with convert_on_fit_end=True."
                if not self._quantized
                else "There are several int8 networks: save each, qat.quantized['name'].save(path)."
            )
        self.quantized.save(path)

    # Insert

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Arrange for the network to be prepared before weights restore, optimizers, DDP and the device see it.

        Lightning calls ``configure_model`` next to last before it restores weights, when all layers exist.
        """
        refuse_strategy(trainer)
        refuse_callbacks(trainer, self, self.mode)
        self._leave_nothing()
        if self._prepared and next(iter(self._slots.values())).pl_module is pl_module:
            self._guard_loading(trainer, pl_module)
            return
        had = pl_module.__dict__.get("configure_model")

        def put_back() -> None:
            if had is None:
                pl_module.__dict__.pop("configure_model", None)
            else:
                pl_module.__dict__["configure_model"] = had
            self._put_back = None

        def configure_model() -> None:
            put_back()
            pl_module.configure_model()
            self._prepare(trainer, pl_module, stage)

        pl_module.__dict__["configure_model"] = configure_model
        self._put_back = put_back

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        slots = {name: Slot(pl_module, name) for name in find_networks(pl_module, self.module)}
        # Lightning builds models on the device and in the precision of the training; this is before either.
        with _cpu_and_float32(), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            examples = self._find_examples(trainer, pl_module, slots, stage)
            prepared = {name: slot.get() for name, slot in slots.items()}
            adopted = all(is_prepared(network) for network in prepared.values())
            if adopted:
                self._check_adopted(prepared)
            else:
                prepared = {name: self._prepare_one(slot, examples[name]) for name, slot in slots.items()}
        if not (adopted and self._prepared):
            self._float_weights = {}
        self._slots, self._examples, self._prepared, self._quantized = slots, examples, prepared, {}
        self._stale, self._source, self.fidelity = True, "the present weights", {}
        self._apply(self._phase if adopted else BEFORE)
        self._guard_loading(trainer, pl_module)
        self._was_prepared()

    def _prepare_one(self, slot: Slot, example: Example) -> nn.Module:
        network = slot.get().cpu()
        # Networks are prepared in float32; one that was built in the precision of the training goes back to it.
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        if dtype != torch.float32:
            network.float()
        mode, why = choose_mode(self.mode, network, example, self._recipe, prefix=slot.prefix)
        if why:
            rank_zero_info(f"mode='auto': {why}")
        recipe = self._recipe(mode)
        check_globs(recipe, [f"{slot.prefix}.{n}".strip(".") for n, _ in network.named_modules() if n or slot.prefix])
        with warnings.catch_warnings():
            prepared = get_flow(mode).prepare(network, example, recipe, prefix=slot.prefix)
        if dtype != torch.float32:
            prepared.to(dtype)
        note_added_keys(prepared)
        slot.install(prepared)
        return prepared

    def _check_adopted(self, prepared: Mapping[str, nn.Module]) -> None:
        """Take over networks that are prepared already (by a copy of this callback, say), if they are as we would."""
        for name, network in prepared.items():
            recipe = prepared_state(network).recipe
            differences = self._recipe(recipe.mode if self.mode == "auto" else self.mode).differences(recipe)
            if differences:
                raise ConfigurationError(
                    f"{name!r} was prepared by another callback with other settings ('there'): "
                    f"{'; '.join(differences)}. Give this callback the same, or use a new LightningModule."
                )

    def _find_examples(
        self, trainer: Trainer, pl_module: LightningModule, slots: Mapping[str, Slot], stage: str
    ) -> dict[str, Example]:
        if self._user_example is None:
            return catch_examples(trainer, pl_module, list(slots.values()), stage)
        return examples_from_user(self._user_example, list(slots))

    def _was_prepared(self) -> None:
        """For a callback that has more to do once its networks are prepared."""

    def _recipe(self, mode: str) -> Recipe:
        return Recipe(mode, self.backend, self.scheme, self.include, self.exclude)

    def _guard_loading(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def loaded() -> None:
            self._stale = True
            self._source = f"checkpoint {trainer.ckpt_path}" if trainer.ckpt_path else "weights that were loaded"

        self._guard = guard_loading(pl_module, self._prepared, {n: s.prefix for n, s in self._slots.items()}, loaded)

    def _apply(self, phase: Phase) -> None:
        self._phase = phase
        for prepared in self._prepared.values():
            set_phase(prepared, **dataclasses.asdict(phase))

    # Convert

    def _convert(self) -> None:
        if not self._stale and self._quantized:
            return
        converted: dict[str, QuantizedNetwork] = {}
        for name, prepared in self._prepared.items():
            state = prepared_state(prepared)
            example = self._examples[name]
            with isolate_rng(include_cuda=torch.cuda.is_initialized()):
                result = get_flow(state.recipe.mode).convert(cpu_copy(prepared), example)
            for note in result.notes:
                rank_zero_info(note)
            converted[name] = QuantizedNetwork(result, state.recipe, example, source=self._source)
            _report_float(converted[name])
        self._quantized = converted
        self._stale = False

    def _ranges_seen(self) -> bool:
        return any(
            fq.seen
            for prepared in self._prepared.values()
            for _, fq in fake_quantizers(prepared)
            if fq.source == "moving_average"
        )

    # Evaluate

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside a fit, validate the chosen variant, by default fake-quant."""
        if trainer.state.fn == "validate":
            self._stand_in("validate", pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the chosen variant, by default int8."""
        self._stand_in("test", pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the chosen variant, by default int8."""
        self._stand_in("predict", pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the prepared network back."""
        self._stand_back()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the prepared network back, and keep how close int8 was to fake-quant."""
        # Several processes compute this together, so only where all of them come to.
        for _, fidelity in self._standing.values():
            if fidelity is not None:
                self.fidelity = fidelity.compute()
        self._stand_back()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the prepared network back."""
        self._stand_back()

    def _stand_in(self, stage: str, pl_module: LightningModule) -> None:
        variant = self._chosen or _EVALUATE[stage]
        if variant == "int8" and self._chosen is None and "int8" not in self.variants:
            if self.convert_on_fit_end:
                rank_zero_warn(
                    f"trainer.{stage} runs fake-quant, which rounds nothing yet: no range was ever observed. Fit "
                    "first, or give ckpt_path= of a fit with this callback."
                )
            variant = "fake_quant"
        if variant not in self.variants:
            raise ConfigurationError(f"There is no variant {variant!r} to {stage}: {self._why_not(variant)}")
        for prepared in self._prepared.values():
            set_phase(prepared, fake_quant=True, observers=False, batchnorm_frozen=self._phase.batchnorm_frozen)
        if variant == "fake_quant":
            return
        if variant == "int8":
            self._convert()
        fidelity = Fidelity() if variant == "int8" and stage == "test" else None
        for name, prepared in self._prepared.items():
            other = self._quantized[name] if variant == "int8" else self._float_network(name).to(pl_module.device)
            plain = prepared if self._slots[name].name != OWN_FORWARD else _Bound(pl_module)
            stand = Stand(other, plain, on_cpu=variant == "int8", fidelity=fidelity)
            self._standing[name] = self._slots[name].run_instead(stand.eval()), fidelity

    def _stand_back(self) -> None:
        for name, (before, _) in self._standing.items():
            self._slots[name].run_again(before)
        self._standing = {}
        self._apply(self._phase)

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
        return "no range was ever observed; fit first, or give ckpt_path= of a fit with this callback."

    # End

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the prepared network in its place, whatever happened, and no hook: ``teardown`` does not follow."""
        self._stand_back()
        self._leave_nothing()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook and no patched method behind."""
        self._stand_back()
        self._leave_nothing()

    def _leave_nothing(self) -> None:
        if self._put_back is not None:
            self._put_back()
        if self._guard is not None:
            self._guard.remove()
            self._guard = None


class _Bound(nn.Module):
    """The own forward of a LightningModule while another stands in for it."""

    def __init__(self, pl_module: LightningModule) -> None:
        super().__init__()
        self.__dict__["_forward"] = pl_module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_forward"](*args, **kwargs)


def _one_or_all(networks: dict[str, Any]) -> Any:
    if not networks:
        return None
    return next(iter(networks.values())) if len(networks) == 1 else dict(networks)


@contextmanager
def _cpu_and_float32() -> Iterator[None]:
    """Make tensors as outside Lightning's contexts for building a model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _report_float(quantized: QuantizedNetwork) -> None:
    left = [row for row in quantized.coverage if not row.quantized]
    if left:
        rows = "; ".join(f"{row.name or 'the network'} ({row.kind}): {row.reason}" for row in left[:8])
        more = f"; and {len(left) - 8} more" if len(left) > 8 else ""
        rank_zero_warn(f"{len(left)} of {len(quantized.coverage)} layers stayed float: {rows}{more}.")
