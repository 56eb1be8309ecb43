"""Finding the networks inside a LightningModule, and replacing them."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.layers.operators import module_types
from qat_lightning.modes.graph_network import GraphNetwork, GraphPart
from qat_lightning.modes.prepared import is_prepared

OWN_FORWARD = "."
"""Name that stands for the LightningModule's own ``forward``, where layers are direct attributes of it."""

_QUANTIZABLE = module_types("convolution", "transposed", "linear")


def find_networks(pl_module: LightningModule, module: str | Sequence[str] | None) -> list[str]:
    """Return dotted names of the networks to quantize; `OWN_FORWARD` for the LightningModule's own ``forward``.

    Args:
        pl_module: The LightningModule.
        module: Names given by the user, or None to find the network.

    Raises:
        ConfigurationError: A named module does not exist.
        NetworkError: No name was given and there are several candidates; the message lists them.
    """
    if module is not None:
        names = [module] if isinstance(module, str) else list(module)
        for name in names:
            _check_named(pl_module, name)
        _refuse_overlap(names)
        return names
    candidates = _callable_parts(pl_module)
    has_forward = type(pl_module).forward is not LightningModule.forward
    own_layers = [name for name, child in candidates.items() if isinstance(child, _QUANTIZABLE)]
    # If candidates are members of a list, called one by one, the LightningModule's own forward is the network.
    own_layers += [name for name in candidates if len(candidates) > 1 and _in_list(pl_module, name)]
    if not candidates:
        raise NetworkError(
            f"{type(pl_module).__name__} holds no convolution or linear layer to quantize. If its network is built "
            "later than in configure_model, build it there; if it is wrapped, name it with module='…'."
        )
    if own_layers and has_forward:
        return [OWN_FORWARD]
    if len(candidates) == 1:
        return list(candidates)
    candidates = dict(sorted(candidates.items(), key=lambda item: not _trains(item[1])))
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
        found = pl_module.get_submodule(name) if name else None
    except AttributeError:
        found = None
    if found is not None and not _can_be_called(found):
        parts = list(_callable_parts(found, f"{name}."))
        own = f"or module={OWN_FORWARD!r} for {type(pl_module).__name__}'s own forward" if parts else "which has none"
        raise ConfigurationError(
            f"module={name!r} is a {type(found).__name__}, which is never called itself: name the networks in it, "
            f"module={parts!r}, {own}."
        )
    if found is None:
        have = ", ".join(child for child, _ in pl_module.named_children())
        raise ConfigurationError(
            f"module={name!r} does not exist in {type(pl_module).__name__}: use {OWN_FORWARD!r} for its own forward, "
            f"or a dotted name beginning with one of: {have or '(it has no submodules)'}."
        )


def _refuse_overlap(names: Sequence[str]) -> None:
    if not names:
        raise ConfigurationError("module=[] names no network: give at least one name, or None to find the network.")
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if OWN_FORWARD in (name, other) or f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}."):
                raise ConfigurationError(
                    f"module={list(names)!r} is not possible: {name!r} and {other!r} overlap. Give each part of the "
                    "LightningModule once."
                )


def _callable_parts(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Return callable submodules with layers to quantize; lists and dicts of modules are replaced by their members."""
    parts: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection, _Loss)) or not _has_quantizable(child):
            continue
        parts |= {prefix + name: child} if _can_be_called(child) else _callable_parts(child, f"{prefix}{name}.")
    return parts


def _in_list(pl_module: LightningModule, name: str) -> bool:
    holder = name.rpartition(".")[0]
    return bool(holder) and isinstance(pl_module.get_submodule(holder), nn.ModuleList)


def _can_be_called(module: nn.Module) -> bool:
    """Whether a module has a ``forward``, which ``nn.ModuleList`` and ``nn.ModuleDict`` do not."""
    if isinstance(module, GraphPart):
        return False
    return getattr(type(module), "forward", None) is not nn.Module.forward or "forward" in vars(module)


def _has_quantizable(module: nn.Module) -> bool:
    return any(isinstance(inner, _QUANTIZABLE) for inner in module.modules())


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def shared_layers(networks: Mapping[str, nn.Module]) -> tuple[dict[str, list[str]], list[str]]:
    """Parts with parameters that several networks share, and names under which each part would be quantized once.

    Args:
        networks: Networks by their names in the LightningModule.

    Returns:
        The outermost shared parts: the names of the networks, by one name of the part. And the names of these parts
        and of the other parts with layers to quantize.
    """
    users: dict[nn.Module, list[str]] = {}
    for name, network in networks.items():
        for module in network.modules():
            if next(module.parameters(), None) is not None:
                users.setdefault(module, []).append(name)
    shared = {module for module, names in users.items() if len(names) > 1}
    found: dict[str, list[str]] = {}
    parts: dict[nn.Module, str] = {}

    def visit(name: str, module: nn.Module) -> None:
        if module in shared:
            found.setdefault(parts.setdefault(module, name), users[module])
        elif shared.isdisjoint(module.modules()):
            parts[module] = name
        else:
            for child_name, child in module.named_children():
                visit(f"{name}.{child_name}", child)

    for name, network in networks.items():
        visit(name, network)
    return found, [name for module, name in parts.items() if _has_quantizable(module)]


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
