"""Training with a strategy that shards parameters in ``configure_model``: support and checks.

With ``ModelParallelStrategy``, ``configure_model`` shards a network with ``fully_shard`` (FSDP2). Fake-quantization
needs whole layers, so networks are prepared before that. Names and checkpoints stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from qat_lightning.callbacks.parts.checkpoints import holds_quantization, refuse_other_checkpoint
from qat_lightning.callbacks.parts.network import Slot
from qat_lightning.callbacks.parts.networks import Networks
from qat_lightning.callbacks.parts.resuming import checkpoint_to_restore, peek, trusts_checkpoint
from qat_lightning.callbacks.parts.settings import QuantizationSettings
from qat_lightning.errors import CheckpointMismatchError, ConfigurationError, NetworkError
from qat_lightning.graph.scopes import join
from qat_lightning.layers.qat_modules import FoldedLayer
from qat_lightning.modes.eager.layers import ChainHead
from qat_lightning.modes.prepared import is_prepared, prepared_state
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.modes import traits_of
from qat_lightning.storage import is_folder

_BUILD = (
    "build the network in __init__ or setup, with its weights, and let configure_model only shard it, as in "
    "`fully_shard(self.net, mesh=self.device_mesh['data_parallel'])`"
)


def shards(trainer: Trainer) -> bool:
    """Whether ``configure_model`` shards networks: the strategy is ``ModelParallelStrategy``."""
    # By name, because older releases of Lightning do not have the class.
    return any(kind.__name__ == "ModelParallelStrategy" for kind in type(trainer.strategy).__mro__)


def refuse_copying(trainer: Trainer) -> None:
    """Raise if a sharding strategy is used with calibration, which copies float networks.

    Raises:
        ConfigurationError: The message says what to do instead.
    """
    if shards(trainer):
        raise ConfigurationError(
            f"{type(trainer.strategy).__name__} shards the network, and PostTrainingQuantization quantizes copies of "
            "it: train without this callback, and quantize what was trained in one process, with "
            "model.load_state_dict(qat_lightning.float_state_dict(path)) and "
            "Trainer(devices=1, callbacks=[PostTrainingQuantization(...)]).validate(model)."
        )


def refuse_sharded(trainer: Trainer, settings: QuantizationSettings, in_fit: Mapping[str, int]) -> None:
    """Raise for settings that a sharding strategy does not support.

    Args:
        trainer: The Trainer, with its processes launched.
        settings: Settings of the quantizing callback.
        in_fit: Number of batches that recipes read during the fit, by argument name.

    Raises:
        ConfigurationError: The message says what to do instead.
    """
    if not shards(trainer):
        return
    strategy: Any = trainer.strategy
    if strategy.device_mesh["tensor_parallel"].size() > 1:
        raise ConfigurationError(
            f"{type(strategy).__name__}(tensor_parallel_size={strategy.device_mesh['tensor_parallel'].size()}) splits "
            "the weights of layers, and a part of a weight would get another grid than the whole: use "
            f"data_parallel_size={trainer.world_size}, tensor_parallel_size=1."
        )
    if settings.kind not in DIRECT and traits_of(settings.mode).replaces:
        raise ConfigurationError(
            f"mode={settings.mode!r} with kind='static' puts a graph in place of layers that configure_model shards, "
            f"which is not supported with {type(strategy).__name__}: use mode='eager', kind='dynamic' or "
            "'weight_only', or strategy='ddp'."
        )
    for name, count in in_fit.items():
        raise ConfigurationError(
            f"{name}={count} runs copies of a network in the fit, which {type(strategy).__name__} has sharded: use "
            f"{name}=0, or strategy='ddp'."
        )
    if settings.recipe.scheme.learned:
        raise ConfigurationError(
            f"learned_step trains scalar parameters, which {type(strategy).__name__} cannot shard: use another "
            "scheme, or strategy='ddp'."
        )


@contextmanager
def before_sharding(pl_module: LightningModule, slots: Mapping[str, Slot]) -> Iterator[None]:
    """Wrap the call of a ``configure_model`` that shards prepared networks, and check its result.

    Args:
        pl_module: The LightningModule.
        slots: The slots of the prepared networks.

    Raises:
        ConfigurationError: ``configure_model`` replaces layers of a prepared network.
    """
    before = {name: _names(slot.get()) for name, slot in slots.items()}
    yield
    _refuse_apart(pl_module, slots)
    _warn_of_replicas(pl_module, slots)
    for name, slot in slots.items():
        changed = sorted(before[name] ^ _names(slot.get()))
        if changed:
            raise ConfigurationError(
                f"configure_model of {type(pl_module).__name__} changes the layers of {name!r}, which are prepared for "
                f"quantization already (for example {changed[0]!r}): {_BUILD}."
            )


def _refuse_apart(pl_module: LightningModule, slots: Mapping[str, Slot]) -> None:
    """Raise if a layer and the BatchNorm that is folded into its weight are sharded in separate units."""
    units = dict(_units(pl_module, None))
    for slot in slots.values():
        names = {module: join(slot.prefix, name) for name, module in slot.get().named_modules()}
        for module, name in names.items():
            batchnorm = module.batchnorm if isinstance(module, (ChainHead, FoldedLayer)) else None
            if batchnorm is not None and units[module] is not units[batchnorm]:
                raise ConfigurationError(
                    f"configure_model shards {name!r} and {names[batchnorm]!r} separately, and they become one int8 "
                    "layer: call fully_shard on a module that contains both, and not on either of them."
                )


def _units(module: nn.Module, unit: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Yield each module with the unit whose parameters are gathered together with its own."""
    state = getattr(module, "_get_fsdp_state", None)
    unit = unit if state is None else state()
    yield module, unit
    for child in module.children():
        yield from _units(child, unit)


def _warn_of_replicas(pl_module: LightningModule, slots: Mapping[str, Slot]) -> None:
    """Warn of trainable parameters that are not sharded: their gradients are not reduced, so processes diverge."""
    from torch.distributed.tensor import DTensor

    left = [
        join(slot.prefix, name)
        for slot in slots.values()
        for name, parameter in slot.get().named_parameters()
        if parameter.requires_grad and not isinstance(parameter, DTensor)
    ]
    if left and pl_module.trainer.world_size > 1:
        rank_zero_warn(
            f"configure_model of {type(pl_module).__name__} leaves {len(left)} parameters of the quantized network out "
            f"of fully_shard ({left[0]!r}, …): their gradients are not reduced over the processes, which end with "
            "different values. Call fully_shard for a module around them as well."
        )


def _names(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters(remove_duplicate=False)}


@contextmanager
def explain_late_layers(trainer: Trainer) -> Iterator[None]:
    """Add to errors of networks that ``configure_model`` builds that sharding needs them to exist earlier."""
    try:
        yield
    except (ConfigurationError, NetworkError) as error:
        if not shards(trainer):
            raise
        raise type(error)(
            f"{error} With {type(trainer.strategy).__name__} layers have to be there before configure_model is called, "
            f"which shards them: {_BUILD}."
        ) from error


def refuse_other_weights(trainer: Trainer, slots: Mapping[str, Slot], *, given: bool) -> None:
    """Raise if networks are already sharded, or have no weights yet.

    Args:
        trainer: The Trainer, during setup.
        slots: The slots of the networks.
        given: Whether the user gave example inputs. Recording them instead would interrupt a step, which leaves a
            sharded network partly gathered; a network that another callback prepared therefore requires them.

    Raises:
        ConfigurationError: The message says what to do instead.
    """
    if not shards(trainer):
        return
    from torch.distributed.tensor import DTensor

    for name, network in ((name, slot.get()) for name, slot in slots.items()):
        if any(parameter.is_meta for parameter in network.parameters()):
            raise ConfigurationError(f"{name!r} has no weights yet, on the device 'meta': {_BUILD}.")
        if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
            continue
        if not is_prepared(network):
            raise ConfigurationError(
                f"{name!r} was sharded before it was prepared for quantization, as by an earlier fit without this "
                "callback: use a new LightningModule."
            )
        if not given:
            raise ConfigurationError(
                f"{name!r} was prepared and sharded with another callback: continue with that one, or give this one "
                "example_inputs=."
            )


def refuse_checkpoint(trainer: Trainer, networks: Networks) -> None:
    """Raise if a checkpoint does not match the prepared networks, before a sharding strategy loads it.

    Args:
        trainer: The Trainer, during setup.
        networks: The prepared networks.

    Raises:
        CheckpointMismatchError: It has other settings, or is of a float run and lacks the added entries.
    """
    path = checkpoint_to_restore(trainer) if shards(trainer) else None
    state = peek(path, trusted=trusts_checkpoint(trainer))
    if path is None or not (state or is_folder(path)):
        return
    prefixes = {name: slot.prefixes for name, slot in networks.slots.items()}
    if holds_quantization(state):
        refuse_other_checkpoint(state, networks.prepared, prefixes)
        return
    for name, prepared in networks.prepared.items():
        kept = prepared_state(prepared)
        added = [key for key in kept.added_keys if not key.endswith("_extra_state")]
        if is_folder(path) or added or kept.reworking is not None:
            raise CheckpointMismatchError(
                f"{str(path)!r} is a checkpoint of a float run, and {type(trainer.strategy).__name__} cannot load it "
                f"into {name!r}, which is prepared for quantization: give the LightningModule its weights before the "
                "fit, model.load_state_dict(qat_lightning.float_state_dict(path)), instead of ckpt_path=."
            )
