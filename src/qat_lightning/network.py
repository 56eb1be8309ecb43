"""Finding the network inside a LightningModule, and putting another in its place."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.modules.loss import _Loss
from torchmetrics import Metric, MetricCollection

from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.graph_network import GraphNetwork

OWN_FORWARD = "."
"""The name of the LightningModule's own ``forward``, where the layers sit on the LightningModule itself."""

_QUANTIZABLE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def find_networks(pl_module: LightningModule, module: str | Sequence[str] | None) -> list[str]:
    """The dotted names of the networks to quantize; `OWN_FORWARD` for the LightningModule's own ``forward``.

    Args:
        pl_module: The LightningModule.
        module: What the user named, or None to find the network.

    Raises:
        ConfigurationError: A named module does not exist.
        NetworkError: None was named, and it is not clear which is meant; the message names the candidates.
    """
    if module is not None:
        names = [module] if isinstance(module, str) else list(module)
        for name in names:
            _check_named(pl_module, name)
        return names
    candidates = {
        name: child
        for name, child in pl_module.named_children()
        if not isinstance(child, (Metric, MetricCollection, _Loss)) and _has_quantizable(child)
    }
    has_forward = type(pl_module).forward is not LightningModule.forward
    own_layers = [name for name, child in candidates.items() if isinstance(child, _QUANTIZABLE)]
    if not candidates:
        raise NetworkError(
            f"{type(pl_module).__name__} holds no convolution or linear layer to quantize. If its network is built later "
            "than in configure_model, build it there; if it is wrapped, name it with module='…'."
        )
    if own_layers and has_forward:
        return [OWN_FORWARD]
    if len(candidates) == 1:
        return list(candidates)
    listed = ", ".join(f"{name!r} ({type(child).__name__})" for name, child in candidates.items())
    own = f", or module={OWN_FORWARD!r} for {type(pl_module).__name__}'s own forward" if has_forward else ""
    raise NetworkError(
        f"{type(pl_module).__name__} holds {len(candidates)} networks: {listed}. Say which to quantize: "
        f"module={next(iter(candidates))!r}, a list of names{own}."
    )


def _check_named(pl_module: LightningModule, name: str) -> None:
    if name == OWN_FORWARD:
        return
    try:
        found = bool(name) and pl_module.get_submodule(name) is not None
    except AttributeError:
        found = False
    if not found:
        have = ", ".join(child for child, _ in pl_module.named_children())
        raise ConfigurationError(
            f"module={name!r} does not exist in {type(pl_module).__name__}: use {OWN_FORWARD!r} for its own forward, or a "
            f"dotted name beginning with one of: {have or '(it has no submodules)'}."
        )


def _has_quantizable(module: nn.Module) -> bool:
    return any(isinstance(inner, _QUANTIZABLE) for inner in module.modules())


class OwnForward(nn.Module):
    """The layers of a LightningModule and its ``forward``, as a plain module that flows can work on.

    Args:
        pl_module: Its children, parameters and buffers are shared; metrics and losses are left out.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        super().__init__()
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
        """What is no layer comes from the LightningModule: its hyperparameters, constants and helper methods."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            value = getattr(self.__dict__["_lightning_module"], name)
            bound = isinstance(value, types.MethodType) and value.__self__ is self.__dict__["_lightning_module"]
            return types.MethodType(value.__func__, self) if bound else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The LightningModule's ``forward``, on the layers held here."""
        return type(self.__dict__["_lightning_module"]).forward(self, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnForward:
        """Copy the layers; the LightningModule, with its Trainer and data, is not copied along."""
        import copy

        copied = OwnForward.__new__(OwnForward)
        memo[id(self)] = copied
        memo[id(self.__dict__["_lightning_module"])] = self.__dict__["_lightning_module"]
        for key, value in self.__dict__.items():
            copied.__dict__[key] = value if key == "_lightning_module" else copy.deepcopy(value, memo)
        return copied


class Slot:
    """The place of one network in a LightningModule.

    Args:
        pl_module: The LightningModule.
        name: A dotted name, or `OWN_FORWARD`.
    """

    def __init__(self, pl_module: LightningModule, name: str) -> None:
        self.pl_module = pl_module
        self.name = name

    @property
    def prefix(self) -> str:
        """What the network's keys begin with in the LightningModule's ``state_dict``, without the last dot."""
        return "" if self.name == OWN_FORWARD else self.name

    def get(self) -> nn.Module:
        """The network that is there now."""
        return OwnForward(self.pl_module) if self.name == OWN_FORWARD else self.pl_module.get_submodule(self.name)

    def install(self, network: nn.Module) -> None:
        """Put a prepared network in the place of the float one, for good."""
        if self.name != OWN_FORWARD:
            self._replace(network)
            return
        for name, child in network._modules.items():
            self.pl_module._modules[name] = child
        for name, parameter in network._parameters.items():
            self.pl_module._parameters[name] = parameter
        for name, buffer in network._buffers.items():
            self.pl_module._buffers[name] = buffer
        if isinstance(network, GraphNetwork):
            for name in ("_in_spec", "_out_spec"):
                if name in network.__dict__:
                    self.pl_module.__dict__[name] = network.__dict__[name]
            self.pl_module.__dict__["forward"] = types.MethodType(network.__dict__["_run"], self.pl_module)

    def refresh(self, network: nn.Module) -> None:
        """Let a network that was installed as the own forward see tensors that were moved on the LightningModule."""
        if self.name == OWN_FORWARD:
            for name in network._buffers:
                network._buffers[name] = self.pl_module._buffers[name]
            for name in network._parameters:
                network._parameters[name] = self.pl_module._parameters[name]

    def run_instead(self, network: nn.Module) -> Any:
        """Run ``network`` for a while; give the result to `run_again` afterwards."""
        if self.name == OWN_FORWARD:
            before = self.pl_module.__dict__.get("forward")
            self.pl_module.__dict__["forward"] = network.forward
            return before
        before = self.pl_module.get_submodule(self.name)
        self._replace(network)
        return before

    def run_again(self, before: Any) -> None:
        """Undo `run_instead`."""
        if self.name != OWN_FORWARD:
            self._replace(before)
        elif before is None:
            self.pl_module.__dict__.pop("forward", None)
        else:
            self.pl_module.__dict__["forward"] = before

    def _replace(self, network: nn.Module) -> None:
        parent, _, leaf = self.name.rpartition(".")
        holder = self.pl_module.get_submodule(parent)
        # By the table of children, so that containers (Sequential, ModuleList, ModuleDict) are served as well.
        holder._modules[leaf] = network
