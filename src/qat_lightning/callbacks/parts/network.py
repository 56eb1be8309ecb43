"""The place of a network in a LightningModule: what runs there, and how another network stands in."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.fx._symbolic_trace import is_fx_tracing
from torch.nn.modules.loss import _Loss
from torchmetrics import Metric, MetricCollection

from qat_lightning.callbacks.parts.precision import float_dtype
from qat_lightning.callbacks.parts.references import (
    Redirections,
    all_parts,
    names_of,
    own_call,
    refusing,
    replace_everywhere,
)
from qat_lightning.callbacks.parts.variants import Stand
from qat_lightning.errors import NetworkError
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.prepared import is_prepared

OWN_FORWARD = "."
"""Name that stands for the LightningModule's own ``forward``, where layers are direct attributes of it."""


@contextmanager
def forward_replaced(owner: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's ``forward`` within the block; restores the instance attribute afterwards."""
    had = owner.__dict__.get("forward")
    owner.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had is None:
            del owner.__dict__["forward"]
        else:
            owner.__dict__["forward"] = had


class OwnForward(nn.Module):
    """Wraps the layers and the ``forward`` of a LightningModule in a module that the modes can process.

    Its class derives from the LightningModule's, so ``forward`` keeps its signature, ``super()`` and helper methods.
    Its children are only the layers, and a copy contains only these.

    Args:
        pl_module: Children, parameters and buffers are shared; metrics and losses are left out.
    """

    def __new__(cls, pl_module: LightningModule | None = None) -> OwnForward:
        """Create an instance of the class derived from the LightningModule's; an empty one if None is given."""
        made: OwnForward = object.__new__(cls if pl_module is None else _own_forward_class(type(pl_module)))
        return made

    def __init__(self, pl_module: LightningModule) -> None:
        nn.Module.__init__(self)
        self.__dict__["_lightning_module"] = pl_module
        self._modules = {
            name: child
            for name, child in pl_module._modules.items()
            if not isinstance(child, (Metric, MetricCollection, _Loss))
        }
        self._parameters = dict(pl_module._parameters)
        self._buffers = dict(pl_module._buffers)
        self._non_persistent_buffers_set = set(pl_module._non_persistent_buffers_set)
        self.training = pl_module.training

    def __getattr__(self, name: str) -> Any:
        """Look up other attributes, such as hyperparameters and constants, in the LightningModule."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_lightning_module" not in self.__dict__:
                raise
            return getattr(self.__dict__["_lightning_module"], name)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log as the LightningModule does, where this stands in for its ``forward``; log nothing in other calls."""
        self._log_by("log", *args, **kwargs)

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """See `log`."""
        self._log_by("log_dict", *args, **kwargs)

    def _log_by(self, method: str, *args: Any, **kwargs: Any) -> None:
        if is_fx_tracing() or torch.compiler.is_compiling():
            raise NetworkError(
                f"The forward of {type(self).__name__} calls self.{method}, and a graph of it would log nothing: log "
                "in the steps instead (training_step, validation_step, test_step), or use mode='eager', which runs "
                "forward itself."
            )
        pl_module = self.__dict__.get("_lightning_module")
        stand = None if pl_module is None else getattr(pl_module.__dict__.get("forward"), "__self__", None)
        if isinstance(stand, Stand) and stand.runs_its_own:
            getattr(pl_module, method)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnForward:
        """Copy the layers, but not the LightningModule with its Trainer and data."""
        pl_module = self.__dict__["_lightning_module"]
        alone = id(pl_module) not in memo
        if alone:
            memo[id(pl_module)] = pl_module
        copied = memo[id(self)] = _blank_own_forward(_lightning_class(type(self)))
        for key, value in self.__dict__.items():
            copied.__dict__[key] = copy.deepcopy(value, memo)
        if alone:
            del memo[id(pl_module)]
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank_own_forward, (_lightning_class(type(self)),), self.__dict__.copy()


def _blank_own_forward(lightning_class: type[LightningModule]) -> OwnForward:
    return OwnForward.__new__(_own_forward_class(lightning_class))


_CLASSES: dict[type[LightningModule], type[OwnForward]] = {}


def _own_forward_class(lightning_class: type[LightningModule]) -> type[OwnForward]:
    if lightning_class not in _CLASSES:
        _CLASSES[lightning_class] = types.new_class(lightning_class.__name__, (OwnForward, lightning_class))
    return _CLASSES[lightning_class]


def _lightning_class(own_forward_class: type[OwnForward]) -> type[LightningModule]:
    found: type[LightningModule] = own_forward_class.__bases__[1]
    return found


class Slot:
    """The place of one network in a LightningModule.

    What runs there runs under all other references to the network as well: further names, wrappers, and Python objects
    that hold it.

    Args:
        pl_module: The LightningModule.
        name: A dotted name, or `OWN_FORWARD`.
    """

    def __init__(self, pl_module: LightningModule, name: str) -> None:
        self.pl_module = pl_module
        self.name = name
        self._replaced: nn.Module | None = None
        self._of_replaced = Redirections()
        self._of_standing: list[tuple[nn.Module, Redirections]] = []

    @property
    def prefix(self) -> str:
        """Prefix of the network's keys in the LightningModule's ``state_dict``, without the last dot."""
        return "" if self.name == OWN_FORWARD else self.name

    @property
    def prefixes(self) -> list[str]:
        """The prefixes under all names of the network; `prefix` first."""
        others = names_of(self.pl_module, self.get()) if self.name != OWN_FORWARD else []
        return [self.prefix, *(name for name in others if name != self.prefix)]

    @property
    def dtype(self) -> torch.dtype | None:
        """The precision of the network in the slot; None if it has no parameters."""
        return float_dtype(self.pl_module if self.name == OWN_FORWARD else self.get())

    def get(self) -> nn.Module:
        """Return the network that is in the slot now."""
        if self.name != OWN_FORWARD:
            return self.pl_module.get_submodule(self.name)
        installed = getattr(self.pl_module.__dict__.get("forward"), "__self__", None)
        if isinstance(installed, GraphNetwork):
            return installed
        own = OwnForward(self.pl_module)
        return self._share(own) if is_prepared(self.pl_module) else own

    def install(self, network: nn.Module) -> None:
        """Replace the float network permanently by a prepared one."""
        if self.name != OWN_FORWARD:
            before = self.get()
            replace_everywhere(self.pl_module, before, network)
            self._replaced = before if before is not network else None
            self.follow()
            return
        for kind in ("_modules", "_parameters", "_buffers"):
            self.pl_module.__dict__[kind].update(network.__dict__[kind])
        self.pl_module._non_persistent_buffers_set |= network._non_persistent_buffers_set
        self._share(network)
        if isinstance(network, GraphNetwork):
            self.pl_module.__dict__["forward"] = network.forward

    def _share(self, network: nn.Module) -> nn.Module:
        """Share tensors of the LightningModule, so that moving or casting it also affects this network."""
        for kind in ("_parameters", "_buffers"):
            network.__dict__[kind] = self.pl_module.__dict__[kind]
        return network

    def run_instead(self, network: nn.Module) -> Any:
        """Run ``network`` temporarily; pass the result to `run_again` to undo it."""
        if self.name == OWN_FORWARD:
            before = self.pl_module.__dict__.get("forward")
            self.pl_module.__dict__["forward"] = network.forward
            return before
        before = self.get()
        replace_everywhere(self.pl_module, before, network)
        standing = Redirections()
        standing.redirect(before, _unless_running(network, own_call(before)))
        self._of_standing.append((network, standing))
        return before

    def run_again(self, before: Any) -> None:
        """Undo `run_instead`."""
        if self.name != OWN_FORWARD:
            network, redirections = self._of_standing.pop()
            redirections.remove()
            replace_everywhere(self.pl_module, network, before)
        elif before is None:
            self.pl_module.__dict__.pop("forward", None)
        else:
            self.pl_module.__dict__["forward"] = before

    def runs(self, network: nn.Module) -> bool:
        """Whether a network that was given to `run_instead` is still in the slot."""
        if self.name == OWN_FORWARD:
            return getattr(self.pl_module.__dict__.get("forward"), "__self__", None) is network
        return self.get() is network

    def follow(self) -> None:
        """Let calls of a float network that was replaced run what is in the slot, until `leave`.

        Its parts, and methods that code has kept, would run in float; they are refused.
        """
        self.leave()
        if self._replaced is None:
            return
        self._of_replaced.redirect(self._replaced, lambda *args, **kwargs: self.get()(*args, **kwargs))
        taken_over = all_parts(self.get())
        for part in list(self._replaced.modules())[1:]:
            if part not in taken_over:
                self._of_replaced.redirect(part, refusing(self.name))

    def leave(self) -> None:
        """Let the float network that was replaced run itself again."""
        self._of_replaced.remove()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_of_standing": []}


def _unless_running(network: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs a network that stands in, and within its own call what it stands in for."""

    def run(*args: Any, **kwargs: Any) -> Any:
        within = isinstance(network, Stand) and network.is_running
        return plain(*args, **kwargs) if within else network(*args, **kwargs)

    return run
