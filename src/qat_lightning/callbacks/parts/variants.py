"""Running another network in place of the prepared one during evaluation."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric

from qat_lightning.callbacks.parts.precision import float_dtype
from qat_lightning.graph.special_methods import take_special_methods
from qat_lightning.graph.structures import look_into
from qat_lightning.measure.fidelity import Fidelity
from qat_lightning.modes.recording import copies, same_random_numbers


class Guests:
    """Lets evaluations run another network, the guest, instead of any variant."""

    _guest: nn.Module | None = None

    @contextmanager
    def running(self, network: nn.Module) -> Iterator[None]:
        """Within the block, evaluations run this network."""
        self._guest = network
        try:
            yield
        finally:
            self._guest = None


def numbers_of_classes(pl_module: nn.Module) -> set[int]:
    """The numbers of classes that the metrics of a LightningModule were given."""
    found = {getattr(module, "num_classes", None) for module in pl_module.modules() if isinstance(module, Metric)}
    return {number for number in found if isinstance(number, int)}


class Stand(nn.Module):
    """Replaces a prepared network in the LightningModule and runs another network on its inputs.

    Args:
        network: The network to run. It is not registered as a child, so moving the LightningModule does not move it.
        prepared: The replaced network. Its children, parameters and buffers are shared, so these keep their places, for
            hooks that exchange weights as well, and its attributes stay accessible.
        on_cpu: Run on the CPU and move the outputs to the inputs' device.
        fidelity: If given, ``reference`` is run as well and the outputs are compared.
        reference: The network to compare with; ``prepared`` by default.
        name: Name of the network in the LightningModule, for the comparison.
        dtype: The precision of the code around the network; inputs are cast to that of the network that runs, and its
            outputs back. None if both are the same.

    Attributes:
        called: Whether it was called itself, and not only its methods or submodules.
    """

    def __init__(
        self,
        network: nn.Module,
        prepared: nn.Module,
        *,
        on_cpu: bool,
        fidelity: Fidelity | None = None,
        reference: nn.Module | None = None,
        name: str = "",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[kind] = prepared.__dict__[kind]
        self.training = prepared.training
        self.__dict__["_network"] = network
        self.__dict__["_prepared"] = prepared
        self.__dict__["_reference"] = prepared if reference is None else reference
        self.on_cpu = on_cpu
        self.fidelity = fidelity
        self.name = name
        self.dtype = dtype
        self.called = False
        self._depth = 0
        self._compares = False
        take_special_methods(self, type(prepared), _prepared)

    @property
    def is_running(self) -> bool:
        """Whether one of the two networks is being called."""
        return self._depth > 0

    @property
    def runs_its_own(self) -> bool:
        """Whether the network that stands in is being called, and not the one that it is compared with."""
        return self._depth > 0 and not self._compares

    def exchange(self, network: nn.Module) -> None:
        """Run another network from now on."""
        self.__dict__["_network"] = network

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the other network, and then the reference, which gets the same random numbers and uses up none."""
        self.called = True
        with self._running():
            return self._forward(args, kwargs)

    def _forward(self, args: Any, kwargs: Any) -> Any:
        network = self.__dict__["_network"]
        if self.fidelity is None or not self.on_cpu:
            return self._in_own_precision(self._call(network, args, kwargs))
        random_state = torch.get_rng_state()
        look_into(args, kwargs)
        given = copies((args, kwargs))  # forward may change its inputs in place
        outputs = self._call(network, args, kwargs)

        def expected() -> Any:
            reference = self.__dict__["_reference"]
            own_args, own_kwargs = self._in_precision_of(reference, copies(given))
            self._compares = True
            try:
                with same_random_numbers(state=random_state):
                    return reference(*own_args, **own_kwargs)
            finally:
                self._compares = False

        self.fidelity.compare(expected, outputs, given, self.name)
        return self._in_own_precision(outputs)

    def _call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self.on_cpu:
            args, kwargs = self._in_precision_of(self.__dict__["_network"], (args, kwargs))
            return function(*args, **kwargs)
        look_into(args, kwargs)
        device = next(
            (leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), torch.device("cpu")
        )
        outputs = function(*tree_map(_to_cpu, args), **tree_map(_to_cpu, kwargs))
        look_into(outputs)
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, outputs)

    def _in_precision_of(self, network: nn.Module, values: Any) -> Any:
        """Cast inputs to the precision of a network, if it is not that of the code around it."""
        dtype = float_dtype(network)
        return values if self.dtype is None or dtype in (None, self.dtype) else _cast(values, dtype)

    def _in_own_precision(self, outputs: Any) -> Any:
        return outputs if self.dtype in (None, torch.float32) else _cast(outputs, self.dtype)

    def __getattr__(self, name: str) -> Any:
        """Look up attributes of the replaced network; methods come from the guest if it has them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            prepared, network = self.__dict__["_prepared"], self.__dict__["_network"]
            found = getattr(prepared, name)
            if not isinstance(found, types.MethodType) or found.__self__ is not prepared:
                return found
            instead = None if name.startswith("_") else getattr(network, name, None)
            if instead is None:
                return found

            def call(*args: Any, **kwargs: Any) -> Any:
                with self._running():
                    return self._in_own_precision(self._call(instead, args, kwargs))

            return call


def _prepared(stand: nn.Module) -> Any:
    return stand.__dict__["_prepared"]


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    look_into(values)
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, values
    )


def _to_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.cpu()
    return leaf.float() if leaf.is_floating_point() else leaf
