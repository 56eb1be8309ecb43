"""The callback for weights that oscillate between two integers: counts, dampens and freezes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from qat_lightning.callbacks.parts.arguments import check_number
from qat_lightning.callbacks.parts.between_processes import take_over_statistics
from qat_lightning.callbacks.parts.sharding import shards
from qat_lightning.callbacks.parts.steps import batches_trained, training_done, training_plan
from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.errors import ConfigurationError
from qat_lightning.recipes.oscillation import OscillationTracker
from qat_lightning.settings.curve import Cosine
from qat_lightning.settings.schedule import TrainingPlan

_NAMED = 3
"""Number of layers named in a message."""


class WeightOscillations(Callback):
    """Freezes weights that oscillate between two integers of their grid, dampens them, or only counts them.

    Use it with `QuantizationAwareTraining`, before or after it in the Trainer's callbacks, and after
    `BatchNormReestimation`. From the first step with fake-quantization, the integers of all weights are followed from
    one optimizer step to the next. A weight whose changes reverse each other more often than ``freezing`` is frozen at
    its average integer, and no optimizer moves it any more. With ``dampening`` a loss is added that pulls each weight
    to the middle of its integer.

    Logged are ``quant/oscillating_share`` and ``quant/frozen_share`` of all weights, and ``quant/dampening_loss``;
    `QuantizationMonitor` shows the shares of each layer. The state is in the checkpoint, and a resumed run continues
    bit by bit. Nothing is added to the network or to its forward pass.

    Source: Nagel et al., 2022, https://arxiv.org/abs/2203.11086.

    Args:
        freezing: The frequency above which a weight is frozen: a number, or two, between which it goes along a cosine
            over the planned training; None freezes nothing.
        dampening: The strength of the dampening loss (lambda), likewise; None leaves it out.
        momentum: The weight of a step in the moving averages of frequencies and of integers, in (0, 1).

    Raises:
        ConfigurationError: A setting is not valid; at construction.

    Example:
        >>> WeightOscillations(freezing=(0.1, 0.015)).freezing
        Cosine(begin=0.1, end=0.015)
    """

    def __init__(
        self,
        freezing: float | Sequence[float] | None = (0.1, 0.01),
        dampening: float | Sequence[float] | None = None,
        momentum: float = 0.01,
    ) -> None:
        self.freezing = Cosine.parse(freezing, name="freezing", most=1.0)
        self.dampening = Cosine.parse(dampening, name="dampening")
        check_number("momentum", momentum, above=0)
        if momentum >= 1:
            raise ConfigurationError(f"momentum={momentum!r} is not valid: give a number below 1, such as 0.01.")
        self.momentum = float(momentum)
        self._tracker = OscillationTracker(self.momentum)
        self._plan = TrainingPlan()
        self._handles: list[RemovableHandle] = []
        self._loss: Tensor | None = None
        self._looked = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unsupported settings, and discard the state of an earlier fit unless this one continues it."""
        self._clean_up()
        if stage != "fit":
            return
        QuantizationAwareTraining.of(trainer, self)
        if shards(trainer):
            raise ConfigurationError(
                f"WeightOscillations needs whole weights, which {type(trainer.strategy).__name__} shards: use "
                "strategy='ddp', or leave the callback out."
            )
        if not batches_trained(trainer):
            self._tracker = OscillationTracker(self.momentum)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the planned training has an end, and track the steps of its optimizers."""
        self._plan = training_plan(trainer)
        for name, curve in (("freezing", self.freezing), ("dampening", self.dampening)):
            if curve is not None and curve.changes and training_done(trainer, self._plan) is None:
                raise ConfigurationError(
                    f"{name}=({curve.begin:g}, {curve.end:g}) spans the planned training, whose length is unknown "
                    f"({self._plan}): give the Trainer max_steps, or one number, {name}={curve.end:g}."
                )
        self._looked = False
        for optimizer in trainer.optimizers:
            hook = optimizer.register_step_post_hook(lambda optimizer, *_: self._after_step(trainer, optimizer))
            self._handles.append(hook)

    # Step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the dampening loss, and set those of frozen weights to 0."""
        if not self._is_tracking(trainer):
            return
        moved = _moved_by(optimizer)
        self._tracker.block(moved)
        if self.dampening is not None:
            strength = self.dampening.at(training_done(trainer, self._plan) or 0.0)
            scale = _loss_scale(trainer, optimizer)
            loss = self._tracker.dampen(strength * scale, moved)
            self._loss = None if loss is None else loss / scale

    def _after_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if not self._is_tracking(trainer):
            return
        threshold = None if self.freezing is None else self.freezing.at(training_done(trainer, self._plan) or 0.0)
        self._tracker.step(threshold, _moved_by(optimizer))

    def _is_tracking(self, trainer: Trainer) -> bool:
        """Whether fake-quantization is enabled: from then on folded weights are equal in all processes."""
        partner = QuantizationAwareTraining.of(trainer, self)
        if not partner.phase.fake_quant:
            return False
        networks = partner.prepared_networks
        if not self._looked:
            self._looked = True
            self._tracker.look_at(networks)
            others = self._tracker.not_looked_at(networks)
            if others:
                more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
                rank_zero_info(
                    f"WeightOscillations tracks {len(self._tracker.weights)} weights, and not those of "
                    f"{', '.join(map(repr, others[:_NAMED]))}{more}, which are not plain parameters of a convolution "
                    "or linear layer, or are frozen."
                )
        if trainer.world_size > 1:
            for network in networks.values():
                take_over_statistics(network)
        return True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the shares of all weights."""
        shares = None if trainer.barebones else self._tracker.totals()
        if shares is not None:
            curves = {"quant/oscillating_share": shares[0], "quant/frozen_share": shares[1]}
            curves |= {} if self._loss is None else {"quant/dampening_loss": self._loss}
            pl_module.log_dict(curves, on_step=True, on_epoch=False, batch_size=1)

    def shares(self) -> dict[str, tuple[float, float]]:
        """Return for each layer the share of its weights that oscillate now, and of those that are frozen.

        A weight oscillates where its changes reverse each other in more than 0.5 % of the steps, as a moving average.
        """
        return self._tracker.shares()

    # End

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep frozen weights on their grids, which BatchNorm's statistics may have changed since the last step."""
        if self._looked:
            self._tracker.hold()
        self._clean_up()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks from the optimizers."""
        self._clean_up()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks from the optimizers."""
        self._clean_up()

    def _clean_up(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._loss, self._looked = [], None, False

    # Checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The state of each weight, as tensors."""
        return {"weights": self._tracker.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._tracker.load_state_dict(state_dict["weights"])

    def __getstate__(self) -> dict[str, Any]:
        """Without hooks and the network's own tensors, which belong to the fit that runs."""
        tracker = OscillationTracker(self.momentum)
        tracker.load_state_dict(self._tracker.state_dict())
        return self.__dict__ | {"_handles": [], "_tracker": tracker, "_loss": None, "_looked": False}


def _moved_by(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return the factor of the gradients: fused optimizers get gradients scaled for mixed precision."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaled else 1.0
