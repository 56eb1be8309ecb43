"""The callback that adds a distillation loss from the float network to the loss of ``training_step``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from qat_lightning.callbacks.parts.arguments import check_names, check_number, check_word
from qat_lightning.callbacks.parts.network import OWN_FORWARD, forward_replaced
from qat_lightning.callbacks.parts.networks import Part
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.scopes import dotted, join
from qat_lightning.modes.float_state import float_weights, frozen_beside_adapters
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.recipes.blocks import repeated_blocks
from qat_lightning.recipes.distillation import (
    LOSSES,
    DistillationSettings,
    Distiller,
    Loss,
    check_distillation,
    comparable_features,
    make_teacher,
)

BLOCKS: Literal["blocks"] = "blocks"


class Distillation(Callback):
    """Lets the quantized network learn from the float network while fake-quantization is enabled.

    Use it with `QuantizationAwareTraining`, before or after it in the Trainer's callbacks. The teacher is the network's
    ``"float"`` variant: the weights of ``float_checkpoint=``, otherwise those from when fake-quantization was enabled.
    It runs in evaluation mode, without gradients, on the inputs that ``training_step`` passes to the network; the
    LightningModule needs no change. The added loss is logged as ``quant/distillation_loss``.

    Sources: Hinton et al., 2015, https://arxiv.org/abs/1503.02531; for features Romero et al., 2015,
    https://arxiv.org/abs/1412.6550; for quantization Mishra and Marr, 2017, https://arxiv.org/abs/1711.05852.

    Args:
        temperature: Softens both scores; above 0.
        weight: Weight of the loss on outputs, which includes the factor ``temperature**2``; 0 leaves it out.
        task_weight: Factor of the loss of ``training_step``; 0 learns from the teacher alone.
        loss: ``"kl"`` for class scores; ``"mse"``, relative to the teacher's mean square, for other outputs.
        outputs: Outputs of the network to compare, by key or position. None compares all that the loss supports, and
            in a mapping with entries named ``logits`` only these.
        features: Names of modules, relative to the LightningModule, whose outputs are compared as well; ``"blocks"``
            for the repeated blocks of a transformer, see `qat_lightning.recipes.blocks.repeated_blocks`.
        feature_weight: Weight of the mean of these losses, relative to the mean square of the teacher's features.
        module: Names of the quantized networks to teach; None for all.
        class_axis: The axis of the classes in the outputs. None for the last where there is a score for each input
            token, else 1.

    Raises:
        ConfigurationError: A setting is not valid; at construction.

    Example:
        >>> Distillation(temperature=2.0, features=["net.layer3"]).settings.features
        ('net.layer3',)
    """

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float = 1.0,
        task_weight: float = 1.0,
        loss: Loss = "kl",
        outputs: Sequence[str] | None = None,
        features: Sequence[str] | Literal["blocks"] | None = None,
        feature_weight: float = 1.0,
        module: str | list[str] | None = None,
        class_axis: int | None = None,
    ) -> None:
        check_number("temperature", temperature, above=0)
        check_number("weight", weight, least=0)
        check_number("task_weight", task_weight, least=0)
        check_number("feature_weight", feature_weight, above=0)
        if class_axis is not None and type(class_axis) is not int:
            raise ConfigurationError(f"class_axis={class_axis!r} is not valid: give an int, like -1, or None.")
        check_word("loss", loss)
        if loss not in LOSSES:
            raise ConfigurationError(f"loss={loss!r} is unknown: use one of {', '.join(LOSSES)}.")
        self.settings = DistillationSettings(
            temperature=float(temperature),
            weight=float(weight),
            loss=loss,
            outputs=None if outputs is None else check_names("outputs", outputs, example="['logits']"),
            class_axis=class_axis,
            features=() if features == BLOCKS else check_names("features", features, example="['net.layer3']"),
            feature_weight=float(feature_weight),
        )
        self.features: tuple[str, ...] | str = BLOCKS if features == BLOCKS else self.settings.features
        if not weight and not self.features:
            raise ConfigurationError("weight=0 without features leaves nothing to learn from the teacher.")
        self.task_weight = float(task_weight)
        self.module = (module,) if isinstance(module, str) else check_names("module", module, example="['head']")
        self._weights: dict[str, dict[str, Tensor]] = {}
        self._distillers: dict[str, Distiller] = {}
        self._forwards: dict[str, Callable[..., Any]] = {}
        self._of: LightningModule | None = None
        self._put_back: Callable[[], None] | None = None
        self._warned = False

    # Insert

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unsupported combinations, before anything is changed."""
        self._clean_up()
        if self._of is not pl_module:
            self._of, self._weights = pl_module, {}
        if stage != "fit":
            return
        QuantizationAwareTraining.of(trainer, self)
        if not pl_module.automatic_optimization:
            raise ConfigurationError(
                "Distillation adds to the loss that training_step returns, and with automatic_optimization=False it "
                "returns none: add qat_lightning.recipes.distillation.distillation_loss(...) to your own loss there."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the settings on the example, and wrap ``training_step``."""
        partner = QuantizationAwareTraining.of(trainer, self)
        with partner.whole():
            for name, (part, settings) in self._chosen(partner).items():
                check_distillation(part.prepared, part.example, settings, part.slot.prefix)
                if self.features == BLOCKS:
                    names = _full(part, settings.features)
                    rank_zero_info(f"Distillation compares {len(names)} blocks of {name!r}: {names[0]} to {names[-1]}.")
        plain, had = pl_module.training_step, pl_module.__dict__.get("training_step")

        @functools.wraps(plain)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._step(trainer, pl_module, plain, *args, **kwargs)

        def put_back() -> None:
            if had is None:
                pl_module.__dict__.pop("training_step", None)
            else:
                pl_module.__dict__["training_step"] = had

        pl_module.__dict__["training_step"] = training_step
        self._put_back = put_back

    def _chosen(self, partner: QuantizationAwareTraining) -> dict[str, tuple[Part, DistillationSettings]]:
        """The networks to distil, each with its settings; names in these are relative to the network."""
        parts = partner.parts()
        unknown = [name for name in self.module if name not in parts]
        if unknown:
            raise ConfigurationError(
                f"module={unknown[0]!r} of Distillation is not quantized: choose from {', '.join(map(repr, parts))}."
            )
        chosen = {name: part for name, part in parts.items() if not self.module or name in self.module}
        found = {name: (part, self._settings_of(part)) for name, part in chosen.items()}
        known = {feature for part, settings in found.values() for feature in _full(part, settings.features)}
        for feature in self.settings.features:
            if feature not in known:
                raise ConfigurationError(
                    f"features={list(self.settings.features)}: {feature!r} is in none of the networks "
                    f"{', '.join(map(repr, chosen))}. Names are relative to the LightningModule, like "
                    f"{_an_example(next(iter(chosen.values())))!r}."
                )
        return found

    def _settings_of(self, part: Part) -> DistillationSettings:
        prefix = dotted(part.slot.prefix)
        if self.features == BLOCKS:
            found = repeated_blocks(prepared_state(part.prepared).float_network)
            return dataclasses.replace(self.settings, features=found)
        inner = tuple(name.removeprefix(prefix) for name in self.settings.features if name.startswith(prefix))
        return dataclasses.replace(self.settings, features=inner)

    # Step

    def _step(
        self, trainer: Trainer, pl_module: LightningModule, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        partner = QuantizationAwareTraining.of(trainer, self)
        # Without gradients there is nothing to learn: another callback is inspecting the data.
        if not partner.phase.fake_quant or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        if not self._distillers:
            self._make_teachers(trainer, pl_module, partner)
        with ExitStack() as stack:
            for name, distiller in self._distillers.items():
                stack.enter_context(distiller.features())
                stack.enter_context(self._watched(partner.parts()[name], distiller))
            outputs = plain(*args, **kwargs)
        losses = [loss for distiller in self._distillers.values() if (loss := distiller.take_loss()) is not None]
        if outputs is None:
            return None
        if not losses:
            self._warn_not_called()
            return outputs
        added = sum(losses[1:], losses[0])
        if not trainer.barebones:
            pl_module.log("quant/distillation_loss", added.detach(), on_step=True, on_epoch=False, batch_size=1)
        return self._with_loss(outputs, added)

    def _with_loss(self, outputs: Any, added: Tensor) -> Any:
        if isinstance(outputs, Mapping):
            if not isinstance(outputs.get("loss"), Tensor):
                return outputs  # Lightning reports what is wrong with it.
            return {**outputs, "loss": self.task_weight * outputs["loss"] + added}
        return self.task_weight * outputs + added if isinstance(outputs, Tensor) else outputs

    def _make_teachers(self, trainer: Trainer, pl_module: LightningModule, partner: QuantizationAwareTraining) -> None:
        chosen = self._chosen(partner)
        with partner.whole():
            teachers = {
                name: make_teacher(part.prepared, self._weights_of(trainer, partner, name, part))
                for name, (part, _) in self._chosen(partner).items()
            }
        for name, (part, settings) in chosen.items():
            self._distillers[name] = Distiller(part.prepared, teachers[name].to(pl_module.device), settings)
        source = partner.float_source or "the weights at the beginning of the fit"
        rank_zero_info(f"Distillation: the teacher is {source}.")

    def _weights_of(
        self, trainer: Trainer, partner: QuantizationAwareTraining, name: str, part: Part
    ) -> Mapping[str, Tensor]:
        weights = partner.float_weights(name) or self._weights.get(name)
        if weights is not None:
            return weights
        if trainer.global_step > 0:
            raise ConfigurationError(
                f"Distillation has no float weights of {name!r} to learn from: this run resumes from step "
                f"{trainer.global_step} of a run that was fake-quantized from its first step, without Distillation. "
                "Give QuantizationAwareTraining float_checkpoint=<a checkpoint of a float run>."
            )
        kept = self._weights[name] = float_weights(part.prepared, frozen_beside_adapters(part.prepared))
        return kept

    @contextmanager
    def _watched(self, part: Part, distiller: Distiller) -> Iterator[None]:
        """Within the block, the teacher sees all calls of a network."""
        owner: Any = part.slot.pl_module if part.slot.name == OWN_FORWARD else part.prepared
        if part.slot.name not in self._forwards:
            # The same function for the whole fit, because compiled steps are guarded on it.
            self._forwards[part.slot.name] = functools.partial(distiller.run, owner.forward)
        with forward_replaced(owner, self._forwards[part.slot.name]):
            yield

    def _warn_not_called(self) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"training_step did not call {', '.join(map(repr, self._distillers))} with gradients, so there was "
                "nothing to distil in this batch. This is reported once."
            )

    # End

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove everything from the LightningModule."""
        self._clean_up()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove everything from the LightningModule."""
        self._clean_up()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove everything from the LightningModule."""
        self._clean_up()

    def _clean_up(self) -> None:
        if self._put_back is not None:
            self._put_back()
            self._put_back = None
        for distiller in self._distillers.values():
            distiller.close()
        self._distillers, self._forwards = {}, {}

    # Checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The teacher's weights if the quantization callback does not keep them, which is the case with ``start=0``."""
        return {"weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._weights = state_dict["weights"]

    def __getstate__(self) -> dict[str, Any]:
        """Omit the state of a running fit."""
        return self.__dict__ | {"_distillers": {}, "_forwards": {}, "_of": None, "_put_back": None}


def _full(part: Part, names: Sequence[str]) -> list[str]:
    return [join(part.slot.prefix, name) for name in names]


def _an_example(part: Part) -> str:
    names = comparable_features(part.prepared, part.example)
    return _full(part, names[:1] or ["layer"])[0]
