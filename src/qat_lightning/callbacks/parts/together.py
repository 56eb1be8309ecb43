"""What of Lightning does not go together with quantization-aware training, and what it needs to resume exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from qat_lightning.callbacks.parts.layer_sync import synchronize_in_place
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.settings.modes import traits_of


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse a Trainer of the other package, and strategies that take a network apart, change or lose it.

    Raises:
        ConfigurationError: With what to use instead.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(
            f"This Trainer is {type(trainer).__module__.partition('.')[0]}'s, and qat_lightning's callbacks need the "
            "one of lightning: use `import lightning.pytorch as pl`."
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ConfigurationError(_launched(trainer))
    name = type(trainer.strategy).__name__
    if name in ("FSDPStrategy", "DeepSpeedStrategy"):
        raise ConfigurationError(
            f"{name} shards the network before its ranges can be synchronized, and is not "
            "supported: use strategy='ddp' or a single device, or ModelParallelStrategy (FSDP2) for "
            "QuantizationAwareTraining."
        )
    synchronize_in_place(trainer)


def _launched(trainer: Trainer) -> str:
    method = getattr(trainer.strategy.launcher, "_start_method", "spawn")
    return (
        f"{type(trainer.strategy).__name__}(start_method={method!r}) trains in child processes and returns only a "
        "state_dict from them, not the int8 network: use strategy='ddp' in a script, or devices=1 with "
        "strategy='auto' in a notebook."
    )


def explain_launch(trainer: Trainer, exception: BaseException) -> None:
    """Say in the user's process what `refuse_strategy` refused in one that the Trainer had started.

    Lightning calls no hook before it starts processes, and what is raised in them arrives as text.

    Args:
        trainer: In the process that started the others.
        exception: What it was broken off by.

    Raises:
        ConfigurationError: The same as in the other process.
    """
    if not isinstance(exception, ProcessRaisedException) or not isinstance(
        trainer.strategy.launcher, _MultiProcessingLauncher
    ):
        return
    reason = _launched(trainer)
    if reason in str(exception):
        raise ConfigurationError(reason) from None


def stop_recording_layers(trainer: Trainer) -> None:
    """Take the hooks off that ``PyTorchProfiler`` has put on every layer, which can be neither copied nor traced.

    Args:
        trainer: It goes on recording all else.
    """
    recorder = getattr(trainer.profiler, "_register", None)  # type: ignore[attr-defined]
    if recorder is not None and recorder._handles:
        recorder.__exit__(None, None, None)
        rank_zero_info(
            "PyTorchProfiler does not record the layers of a quantized network by name, because they are replaced; "
            "steps, hooks and operators are recorded as usual."
        )


def refuse_callbacks(trainer: Trainer, quantization: Callback, mode: str) -> None:
    """Refuse callbacks that keep hold of the network as it was before its preparation.

    Args:
        trainer: Its callbacks are looked at.
        quantization: The callback that quantizes.
        mode: Its mode.

    Raises:
        ConfigurationError: With what to do instead.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[: callbacks.index(quantization)]:
        if _averages(callback):
            raise ConfigurationError(
                f"{type(callback).__name__} comes before {type(quantization).__name__} in the Trainer's callbacks, "
                "and would average the network before it is prepared for quantization: list it after."
            )
    if traits_of(mode).replaces and any(isinstance(callback, ModelPruning) for callback in callbacks):
        raise ConfigurationError(
            f"ModelPruning does not support mode={mode!r}, which replaces the layers that it prunes: "
            "use mode='eager', or prune before."
        )


def _averages(callback: Callback) -> bool:
    """Whether it is Lightning's average of weights; by name, because older releases have no such class."""
    return any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__)


def evaluate_average(trainer: Trainer, stage: str) -> None:
    """Let an evaluation of a checkpoint run the average of weights that it holds, which is what a validation scored.

    Beside the average, a checkpoint of ``WeightAveraging`` has the weights that went on training. In Lightning 2.6 a
    callback that was in a fit before loads those in every stage: after a fit, ``trainer.test(ckpt_path="best")`` tests
    other weights than a new Trainer does.

    Args:
        trainer: Its callbacks forget the average that they kept to train on; a fit makes another.
        stage: The stage it sets up for.
    """
    for callback in trainer.callbacks if stage != "fit" else ():  # type: ignore[attr-defined]
        if _averages(callback):
            callback._average_model = None


def refuse_in_processes(settings: QuantizationSettings, observe_stages: Sequence[str]) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        ConfigurationError: Learned scales in mode eager, or ranges that move in an evaluation.
    """
    if settings.recipe.scheme.learned and not traits_of(settings.mode).captures:
        raise ConfigurationError(
            f"learned_step in mode={settings.mode!r} does not support several processes, which may run different "
            "branches and then start from different scales: use mode='fx' or mode='pt2e'."
        )
    if len(observe_stages) > 1:
        raise ConfigurationError(
            f"observe_stages={list(observe_stages)} does not support several processes, which may evaluate different "
            "numbers of batches: use observe_stages=['train']."
        )


def refuse_compiled(network: nn.Module, name: str, mode: str) -> None:
    """Refuse a network that is compiled itself, or holds a part that is, where a graph has to be captured of it.

    Raises:
        NetworkError: With the way that works.
    """
    # By name: the class is in torch._dynamo, whose import takes seconds.
    compiled = [inner for inner, module in network.named_modules() if type(module).__name__ == "OptimizedModule"]
    if traits_of(mode).replaces and compiled:
        raise NetworkError(
            f"{'.'.join(filter(None, (name, compiled[0])))!r} was given to torch.compile, and mode={mode!r} cannot "
            "capture a graph of compiled code: compile the LightningModule instead, model = torch.compile(model), or "
            "use mode='eager'."
        )


def mend_resume(trainer: Trainer) -> None:
    """Let a run that was resumed write checkpoints that can be resumed from in turn.

    Lightning 2.6 forgets something in four places, with or without quantization. Resumed from a checkpoint of the last
    batch of an epoch, it counts the epoch as done and leaves the next one unannounced: no ``on_train_epoch_start``, and
    its checkpoints say that it has ended, so that resuming from one of them begins it again. ``every_n_train_steps``
    forgets which step was saved, so that under accumulation the first batch makes a checkpoint of the same step, which
    lacks that batch's gradients. ``BackboneFinetuning`` freezes again what it had unfrozen, for good. And
    ``StochasticWeightAveraging``, resumed within an epoch, sets its learning rate again only when the next one begins,
    so that checkpoints in between lose it.

    Args:
        trainer: At the beginning of the training, its loops restored.
    """
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    if getattr(loop, "restarted_mid_epoch", False) and epochs.processed == epochs.started:
        loop.reset_restart_stage()
    elif getattr(loop, "restarted_mid_epoch", False):
        for averaging in (c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)):  # type: ignore[attr-defined]
            if averaging.swa_start <= trainer.current_epoch <= averaging.swa_end:
                averaging.on_train_epoch_start(trainer, trainer.lightning_module)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps >= 1 and trainer.ckpt_path:
            callback._last_global_step_saved = trainer.global_step
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        # Known once it has unfrozen.
        if isinstance(other, BackboneFinetuning) and trainer.ckpt_path and other.previous_backbone_lr is not None:
            other.make_trainable(trainer.lightning_module.backbone)


def say_broken_off(trainer: Trainer, exception: BaseException) -> None:
    """Say how things stand when a fit does not come to its end."""
    rank_zero_info(
        f"The fit was interrupted at step {trainer.global_step} by {type(exception).__name__}. The network keeps its "
        "fake-quantization and what it has learned so far, and was not converted. Resume from the last checkpoint "
        "with ckpt_path='last'."
    )
