"""Learned scales and zero points in a Trainer: check that they are optimized, and reduce their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from qat_lightning.errors import ConfigurationError
from qat_lightning.numerics.learned_step import LearnedStep


def learned_parameters(networks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the scales and zero points that are trained, without duplicates."""
    steps = [module for network in networks for module in network.modules() if isinstance(module, LearnedStep)]
    return list(dict.fromkeys(parameter for step in steps for parameter in step.parameters()))


def keep_from_ddp(pl_module: LightningModule, networks: Mapping[str, nn.Module]) -> None:
    """Exclude learned scales and zero points from DistributedDataParallel; `reduce_gradients` reduces them instead.

    DistributedDataParallel waits for a gradient of every parameter in every step, and these have none before
    fake-quantization is enabled.
    """
    ours = {id(parameter) for parameter in learned_parameters(networks.values())}
    if ours:
        names = [name for name, parameter in pl_module.named_parameters() if id(parameter) in ours]
        others = pl_module.__dict__.get("_ddp_params_and_buffers_to_ignore", [])
        pl_module.__dict__["_ddp_params_and_buffers_to_ignore"] = [*others, *(set(names) - set(others))]


def reduce_gradients(networks: Mapping[str, nn.Module]) -> None:
    """Average the gradients of learned scales and zero points over all processes, in one collective."""
    parameters = [parameter for parameter in learned_parameters(networks.values()) if parameter.requires_grad]
    if not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def check_optimized(trainer: Trainer, networks: Mapping[str, nn.Module]) -> None:
    """Raise if no optimizer of the fit has learned scales or zero points; warn if some are missing.

    Raises:
        ConfigurationError: No optimizer has any; the message says how to add them.
    """
    ours = learned_parameters(networks.values())
    optimizers: list[Optimizer] = trainer.optimizers
    optimized = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    left_out = sum(id(parameter) not in optimized for parameter in ours)
    if ours and left_out == len(ours):
        raise ConfigurationError(
            "learned_step: configure_optimizers passes none of the learned scales to an optimizer, so they would not "
            "be trained. Pass self.parameters(), which contains them when configure_optimizers is called, or use "
            "learned_step='none'."
        )
    if left_out:
        rank_zero_warn(
            f"{left_out} of {len(ours)} learned scales and zero points are not in any optimizer, and are not trained."
        )
