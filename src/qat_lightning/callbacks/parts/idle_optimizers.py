"""Optimizers and learning rate schedulers for a step that is only tried: they can be asked for, and do not step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers


def without_steps(pl_module: LightningModule) -> dict[str, Callable[..., Any]]:
    """Return ``optimizers`` and ``lr_schedulers`` of a LightningModule, by name, whose results do not step.

    Before the Trainer has created any, they come from ``configure_optimizers``, which is called when a step asks.
    """
    created: list[Any] = []

    def asked(method: str, *args: Any) -> Any:
        if pl_module.trainer.optimizers:
            return getattr(type(pl_module), method)(pl_module, *args)
        if not created:
            optimizers, configs = _init_optimizers_and_lr_schedulers(pl_module)
            created.append({"optimizers": optimizers, "lr_schedulers": [config.scheduler for config in configs]})
        found = created[0][method]
        return found[0] if len(found) == 1 else found

    def optimizers(use_pl_optimizer: bool = True) -> Any:
        return _idle(asked("optimizers", use_pl_optimizer))

    def lr_schedulers() -> Any:
        return _idle(asked("lr_schedulers")) or None

    return {"optimizers": optimizers, "lr_schedulers": lr_schedulers}


def _idle(found: Any) -> Any:
    if isinstance(found, list):
        return [_Idle(one) for one in found]
    return found if found is None else _Idle(found)


class _Idle:
    """Has the attributes of an optimizer or a scheduler, and leaves it and its gradients alone."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def step(self, *args: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Only call the closure."""
        closure = next(filter(callable, args), closure)
        return None if closure is None else closure()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Keep the gradients."""

    def __getattr__(self, name: str) -> Any:
        """Look up everything else."""
        return getattr(self._real, name)
