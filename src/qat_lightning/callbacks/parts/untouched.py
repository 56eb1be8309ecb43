"""Undoing what a step that is only tried does to a LightningModule."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.callbacks.parts.idle_optimizers import without_steps
from qat_lightning.graph.buffers import write_back
from qat_lightning.graph.generators import generators_kept
from qat_lightning.graph.lazy import is_lazy
from qat_lightning.numerics.fake_quantize import FakeQuantize

_WITHOUT_EFFECT = ("log", "log_dict", "manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")

_MOST_VALUES = 2**24
"""A larger tensor that is not a buffer is data, not the state of a step, and is not copied."""


@contextmanager
def nothing_moves(pl_module: LightningModule) -> Iterator[None]:
    """Within the block, no gradients, optimizer steps or logging; afterwards, the LightningModule is as it was before.

    Restored are the attributes of all modules (among them training flags, buffers and the states of metrics), what the
    attributes' lists, dicts, sets, deques, tensors and arrays contain, and which parameters require gradients, since
    an interrupted step may have toggled an optimizer; and random generators that are attributes. Objects of other types
    and the global random states are not restored.
    """
    before = _State(pl_module)
    for name in _WITHOUT_EFFECT:
        pl_module.__dict__[name] = lambda *args, **kwargs: None
    pl_module.__dict__.update(without_steps(pl_module))
    try:
        with generators_kept(pl_module), torch.no_grad():
            yield
    finally:
        before.restore()
        for module in pl_module.modules():
            if isinstance(module, FakeQuantize):
                module.look_again()


class _State:
    """What modules were: which objects their attributes are, and what is in those that can change in place.

    Args:
        root: The outermost module. Modules in lists and other containers are included.
    """

    def __init__(self, root: nn.Module) -> None:
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._values: dict[int, tuple[Any, Any]] = {}
        self._required: dict[nn.Parameter, bool] = {}
        self._waiting: dict[nn.Module, RemovableHandle] = {}
        self._note(root)

    def _note(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self._note_module(value)
        elif isinstance(value, (list, dict, set, deque)):
            if self._is_new(value):
                for element in value.values() if isinstance(value, dict) else value:
                    self._note(element)
        elif isinstance(value, tuple):
            for element in value:
                self._note(element)
        elif type(value) is Tensor:  # no parameter, and no fake tensor of a graph
            if value.numel() <= _MOST_VALUES:
                self._note_tensor(value)
        elif isinstance(value, np.ndarray) and value.flags.writeable and value.size <= _MOST_VALUES:
            self._values[id(value)] = value, value.copy()

    def _note_module(self, module: nn.Module) -> None:
        if is_lazy(module):
            self._note_once_initialized(module)
            return
        if not self._is_new(vars(module)):
            return
        for buffer in module._buffers.values():
            if buffer is not None:
                self._note_tensor(buffer)
        for parameter in module._parameters.values():
            if parameter is not None:
                self._required[parameter] = parameter.requires_grad
        for name, value in vars(module).items():
            if name != "_parameters":  # a sharded layer exchanges them, and knows which ones it has
                self._note(value)

    def _note_once_initialized(self, module: nn.Module) -> None:
        """Note a lazy module in its first call, which gives it parameters for good."""

        def note(*_: Any) -> None:
            self._waiting[module].remove()
            self._note_module(module)

        if module not in self._waiting:
            self._waiting[module] = module.register_forward_pre_hook(note)

    def _is_new(self, container: Any) -> bool:
        """Note what a container has in it; returns False if that was known."""
        if id(container) in self._containers:
            return False
        self._containers[id(container)] = container, dict(container) if isinstance(container, dict) else list(container)
        return True

    def _note_tensor(self, tensor: Tensor) -> None:
        can_change = not tensor.is_inference() or torch.is_inference_mode_enabled()
        if can_change and tensor.layout == torch.strided and not tensor.is_meta:
            self._values[id(tensor)] = tensor, tensor.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back. Containers and tensors stay the same objects; only what changed is written."""
        for handle in self._waiting.values():
            handle.remove()
        for parameter, required in self._required.items():
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
        for container, before in self._containers.values():
            if not _is_same(container, before):
                container.clear()
                (container.extend if isinstance(container, (list, deque)) else container.update)(before)
        for value, before in self._values.values():
            if isinstance(value, np.ndarray):
                value[...] = before
            elif not torch.equal(value, before):
                write_back(value, before)


def _is_same(container: Any, before: Any) -> bool:
    now, then = (
        [part for pair in one.items() for part in pair] if isinstance(one, dict) else list(one)
        for one in (container, before)
    )
    return len(now) == len(then) and all(one is other for one, other in zip(now, then, strict=True))
