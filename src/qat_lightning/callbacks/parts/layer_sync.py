"""``sync_batchnorm=True`` for prepared networks: BatchNorm is synchronized in place, without replacing modules."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.layers.batchnorm import is_batchnorm
from qat_lightning.layers.qat_modules import FreezableBatchNorm, synchronize_batchnorm


class BatchNormSync(LayerSync):
    """Synchronizes BatchNorm modules in place, so that references to them and fused layers stay valid.

    Lightning's plugin replaces layers by ``nn.SyncBatchNorm``, and at the end by a class of its own that cannot be
    folded. Classes other than torch's and ours are left to Lightning's plugin.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize every BatchNorm of a LightningModule.

        Raises:
            ConfigurationError: A BatchNorm has a custom class whose forward would be lost.
        """
        synchronize_batchnorm(model, True)
        for name, module in model.named_modules():
            if is_batchnorm(module) and not _is_synchronized(module):
                raise ConfigurationError(
                    f"sync_batchnorm=True cannot synchronize {name!r}, a BatchNorm of the class "
                    f"{type(module).__qualname__}, without losing what that computes: use sync_batchnorm=False, or "
                    "nn.BatchNorm1d, 2d or 3d."
                )
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo `apply`."""
        synchronize_batchnorm(model, False)
        return model


def _is_synchronized(module: nn.Module) -> bool:
    if isinstance(module, (FreezableBatchNorm, nn.SyncBatchNorm)):
        return True
    # A traced layer with a custom class: a module below it computes it.
    return any(isinstance(child, FreezableBatchNorm) for child in module.children())


def synchronize_in_place(trainer: Trainer) -> None:
    """Make a Trainer with ``sync_batchnorm=True`` use `BatchNormSync`.

    Args:
        trainer: The Trainer, before its strategy is set up.

    Raises:
        ConfigurationError: Its strategy does not synchronize, or it has another layer-sync plugin.
    """
    strategy = trainer.strategy
    plugin = getattr(strategy, "_layer_sync", None)
    if plugin is None or isinstance(plugin, BatchNormSync):
        return
    if type(plugin) is not TorchSyncBatchNorm:
        raise ConfigurationError(
            f"{type(plugin).__name__} replaces layers that quantization has fused with others: use "
            "sync_batchnorm=True, which synchronizes BatchNorm where it is."
        )
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy, DDPStrategy):
        raise ConfigurationError(
            f"{type(strategy).__name__} synchronizes no BatchNorm: use sync_batchnorm=False, or strategy='ddp'."
        )
    vars(strategy)["_layer_sync"] = BatchNormSync()
