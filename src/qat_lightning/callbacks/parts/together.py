"""Checks for Lightning features that quantization-aware training does not support, and fixes for exact resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.optim.swa_utils import AveragedModel

from qat_lightning.callbacks.parts.find_networks import shared_layers
from qat_lightning.callbacks.parts.layer_sync import synchronize_in_place
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.compiled import uncompile
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.modes import traits_of


def refuse_strategy(trainer: Trainer) -> None:
    """Raise for a Trainer of ``pytorch_lightning``, and for strategies that shard, change or lose the network.

    Raises:
        ConfigurationError: The message says what to use instead.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(
            f"This Trainer comes from {type(trainer).__module__.partition('.')[0]}, and the callbacks of qat_lightning "
            "need the one from lightning: use `import lightning.pytorch as pl`."
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


def refuse_shared(trainer: Trainer, prepared: Mapping[str, nn.Module]) -> None:
    """Raise if another callback of the Trainer has just inserted the fake-quantization of these networks.

    Raises:
        ConfigurationError: The message names the callback.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        theirs = [id(network) for network in getattr(callback, "prepared_networks", {}).values()]
        for name, network in prepared.items():
            if id(network) in theirs:
                raise ConfigurationError(
                    f"{name!r} already has fake-quantization from {type(callback).__name__}: use only one of the two "
                    "callbacks."
                )


def refuse_shared_layers(networks: Mapping[str, nn.Module], modes: Mapping[str, str], kind: str) -> None:
    """Raise for networks that share layers which would be prepared in place, once for each of them.

    Args:
        networks: The float networks.
        modes: Their modes.
        kind: The kind of quantization.

    Raises:
        ConfigurationError: The message names the shared part, and how to quantize it once.
    """
    shared, parts = shared_layers(networks)
    if not shared or (kind not in DIRECT and all(traits_of(mode).replaces for mode in modes.values())):
        return
    part, users = next(iter(shared.items()))
    graphs = "" if kind in DIRECT else "; or mode='fx', where each network has a graph of its own"
    raise ConfigurationError(
        f"{' and '.join(map(repr, users))} share {part!r}, whose layers can be quantized in place only once. "
        f"What to do: name the shared part by itself, module={parts}{graphs}."
    )


def _launched(trainer: Trainer) -> str:
    method = getattr(trainer.strategy.launcher, "_start_method", "spawn")
    return (
        f"{type(trainer.strategy).__name__}(start_method={method!r}) trains in child processes and returns only a "
        "state_dict from them, not the int8 network: use strategy='ddp' in a script, or devices=1 with "
        "strategy='auto' in a notebook."
    )


def explain_launch(trainer: Trainer, exception: BaseException) -> None:
    """Raise again, in the user's process, an error of `refuse_strategy` in a process that the Trainer launched.

    Lightning calls no hook before it launches processes, and exceptions in them arrive as text.

    Args:
        trainer: The Trainer in the process that launched the others.
        exception: The exception that ended it.

    Raises:
        ConfigurationError: The same error as in the other process.
    """
    if not isinstance(exception, ProcessRaisedException) or not isinstance(
        trainer.strategy.launcher, _MultiProcessingLauncher
    ):
        return
    reason = _launched(trainer)
    if reason in str(exception):
        raise ConfigurationError(reason) from None


def stop_recording_layers(trainer: Trainer) -> None:
    """Remove the hooks of ``PyTorchProfiler`` from layers, because they can be neither copied nor traced.

    Args:
        trainer: The Trainer; everything else is recorded as usual.
    """
    recorder = getattr(trainer.profiler, "_register", None)  # type: ignore[attr-defined]
    if recorder is not None and recorder._handles:
        recorder.__exit__(None, None, None)
        rank_zero_info(
            "PyTorchProfiler does not record the layers of a quantized network by name, because they are replaced; "
            "steps, hooks and operators are recorded as usual."
        )


def refuse_callbacks(trainer: Trainer, quantization: Callback, mode: str) -> None:
    """Raise for callbacks that keep a reference to the network from before its preparation.

    Args:
        trainer: The Trainer whose callbacks are checked.
        quantization: The quantizing callback.
        mode: Its mode.

    Raises:
        ConfigurationError: The message says what to do instead.
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
    """Whether this is Lightning's ``WeightAveraging``; by name, because older releases do not have the class."""
    return any(kind.__name__ == "WeightAveraging" for kind in type(callback).__mro__)


def averages_of(pl_module: nn.Module, network: nn.Module) -> dict[str, AveragedModel]:
    """Return torch's averages of a network that the LightningModule holds, by name."""
    keys = network.state_dict().keys()
    return {
        name: module
        for name, module in pl_module.named_modules()
        if isinstance(module, AveragedModel)
        and type(module).update_parameters is AveragedModel.update_parameters
        and module.module.state_dict().keys() == keys
    }


def refuse_averages(averages: Mapping[str, AveragedModel], name: str, network: nn.Module, prepared: nn.Module) -> None:
    """Raise for averages of a float network that cannot be updated from the prepared one.

    Without ``use_buffers`` torch requires equally many buffers, and with it, it pairs parameters and buffers as one
    sequence.

    Args:
        averages: See `averages_of`.
        name: The network's name.
        network: The float network.
        prepared: The network with fake-quantization.

    Raises:
        ConfigurationError: The message says what averages instead.
    """
    learned = len(list(prepared.parameters())) > len(list(network.parameters()))
    observed = len(list(prepared.buffers())) > len(list(network.buffers()))
    for own, average in averages.items():
        if learned or (observed and not average.use_buffers):
            pairs = "" if learned else ", or give AveragedModel use_buffers=True, which averages the float network"
            raise ConfigurationError(
                f"{own!r} is an AveragedModel of {name!r} from before its preparation for quantization, which adds "
                f"{'learned scales' if learned else 'the buffers of ranges'}: its update_parameters would fail or pair "
                "the wrong tensors. Use Lightning's callback EMAWeightAveraging or WeightAveraging, listed after "
                f"QuantizationAwareTraining: its average is converted to int8{pairs}."
            )


def evaluate_average(trainer: Trainer, stage: str) -> None:
    """Make an evaluation of a checkpoint use the average of weights in it, which is what validation scored.

    A checkpoint of ``WeightAveraging`` also has the weights that training continues with. In Lightning 2.6 a callback
    that was used in a fit loads those in every stage: after a fit, ``trainer.test(ckpt_path="best")`` tests other
    weights than a new Trainer does.

    Args:
        trainer: The Trainer; its callbacks discard the average from training, since a new fit creates another.
        stage: The stage it is set up for.
    """
    for callback in trainer.callbacks if stage != "fit" else ():  # type: ignore[attr-defined]
        if _averages(callback):
            callback._average_model = None


def refuse_in_processes(settings: QuantizationSettings, observe_stages: Sequence[str]) -> None:
    """Raise for settings that are not supported with several processes.

    Raises:
        ConfigurationError: Learned scales in mode eager, or ranges updated during evaluation.
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


def leave_uncompiled(pl_module: LightningModule, slots: Mapping[str, Slot], *, trains: bool, compiles: bool) -> None:
    """Let networks that were given to ``torch.compile`` run uncompiled, with the modules around them and inside.

    Layers are watched and replaced, and compiled code would be compiled anew for each of them.

    Args:
        pl_module: The LightningModule.
        slots: The networks by name.
        trains: Whether the callback trains quantized networks.
        compiles: Whether it compiles their steps itself.
    """
    concerned: set[nn.Module] = {pl_module}
    for slot in slots.values():
        concerned |= set(slot.get().modules())
        path = slot.prefix.split(".") if slot.prefix else []
        concerned |= {pl_module.get_submodule(".".join(path[:depth])) for depth in range(1, len(path))}
    names = [
        name or "." for name, module in list(pl_module.named_modules()) if module in concerned and uncompile(module)
    ]
    if names:
        instead = "To compile the training steps, set compile=True of the callback. " if trains and not compiles else ""
        rank_zero_warn(
            f"Given to torch.compile: {', '.join(map(repr, names))}. Compiled code cannot be quantized, so this "
            f"runs uncompiled from now on. {instead}The keys of the state_dict stay the same."
        )


def repair_resume(trainer: Trainer) -> None:
    """Let a resumed run write checkpoints that can be resumed from exactly.

    Lightning 2.6 loses state in four places, with or without quantization:

    - Resumed from a checkpoint of the last batch of an epoch, it counts that epoch as finished but does not call
      ``on_train_epoch_start`` for the next one. Its checkpoints then say that the next epoch has ended, and resuming
      from one of them repeats that epoch.
    - ``every_n_train_steps`` forgets which step was saved. With gradient accumulation the first batch then writes a
      checkpoint of the same step, without that batch's gradients.
    - ``BackboneFinetuning`` freezes permanently what it had unfrozen.
    - ``StochasticWeightAveraging``, resumed within an epoch, sets its learning rate only when the next epoch begins, so
      checkpoints before that do not have it.

    Args:
        trainer: The Trainer at the beginning of training, with its loops restored.
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
        # Known once it has unfrozen layers.
        if isinstance(other, BackboneFinetuning) and trainer.ckpt_path and other.previous_backbone_lr is not None:
            other.make_trainable(trainer.lightning_module.backbone)


def report_interruption(trainer: Trainer, exception: BaseException) -> None:
    """Log the state of the network when a fit is interrupted."""
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    last = next((c.last_model_path or c.best_model_path for c in saved if c.last_model_path or c.best_model_path), "")
    resume = f"resume with trainer.fit(..., ckpt_path={last!r})" if last else "no checkpoint was written to resume from"
    rank_zero_info(
        f"The fit was interrupted at step {trainer.global_step} by {type(exception).__name__}. The network keeps its "
        f"fake-quantization and what it has learned so far, and was not converted: {resume}, or convert it as it is "
        "with convert() of the callback."
    )
