"""Compiling the training steps of a prepared network: one graph, which is recompiled only when the schedule switches.

The switches are plain attributes of the modules, on which Dynamo guards, so a switch of the schedule recompiles and all
steps between two switches run the same graph. Only steps with gradients are compiled: evaluation, conversion and
anything that uses hooks run uncompiled.

If several processes reduce ranges or BatchNorm statistics within the network, either all of them run a step compiled,
with inputs of the same form, or none does: a graph and Python do their reductions in different orders.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils._pytree as pytree
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from qat_lightning.errors import CombinationError, ConfigurationError
from qat_lightning.modes.compile_switch import has_cpp_compiler
from qat_lightning.modes.eager.forwards import is_foreign
from qat_lightning.modes.eager.layers import MarksWhileTraced
from qat_lightning.modes.graph_network import GraphNetwork
from qat_lightning.modes.prepared import fake_quantizers, prepared_state
from qat_lightning.processes import all_alike, process_count
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.modes import traits_of

BACKEND = "inductor"
"""Arguments of ``torch.compile``."""


def check_compiler(device: torch.device) -> None:
    """Raise an error if the compiler is missing.

    Args:
        device: The device of the training; for a CPU, C++ is compiled.

    Raises:
        ConfigurationError: The compiler is missing; the message says what to install or which setting to change.
    """
    if device.type != "cpu":
        return
    if not has_cpp_compiler():
        raise ConfigurationError(
            "compile=True needs a C++ compiler, and none was found: install one (apt install g++), name it in the "
            "environment variable CXX, or use compile=False."
        )


def refuse_compile(mode: str) -> None:
    """Raise an error if Python code of the network prevents a single graph.

    Raises:
        CombinationError: The mode does not support compiling; the message says what to set instead.
    """
    if not traits_of(mode).compiles:
        raise CombinationError(
            f"compile=True does not support mode={mode!r}, where plain Python code runs between the parts: "
            "use compile=False."
        )


class CompiledSteps:
    """Replaces the ``forward`` of a prepared network, and runs its training steps compiled.

    After every switch of the schedule one step runs uncompiled: in it, ranges are first observed and scales begin to
    learn, which happens only once and is not part of the graph.

    Args:
        network: The prepared network, whose parameters and keys stay as they are.
        owner: The module on which ``forward`` is replaced: the network, or the LightningModule for its own forward.
        name: Name for messages.
    """

    def __init__(self, network: nn.Module, owner: nn.Module, name: str) -> None:
        self.network = network
        self.owner = owner
        self.name = name
        self._had = owner.__dict__.get("forward")
        self.plain: Callable[..., Any] = owner.forward
        self._modules = list(network.modules())
        self._unseen = [fq for _, fq in fake_quantizers(network) if fq.observed]
        recipe = prepared_state(network).recipe
        marks = recipe.mode == "eager" and recipe.kind not in DIRECT  # whose layers know which values are rounded
        self._compiled = torch.compile(_function_of_its_own(self.plain, marks=marks), backend=BACKEND, fullgraph=True)
        self._learn = any(fq.step is not None for fq in self._unseen)
        self.switched()
        self._said = False
        owner.__dict__["forward"] = self

    def switched(self) -> None:
        """The schedule has switched: run one step uncompiled, or two if a scale may begin to learn in the second."""
        self._as_it_is = 2 if self._learn else 1

    def remove(self) -> None:
        """Restore the original ``forward``."""
        if self._had is None:
            self.owner.__dict__.pop("forward", None)
        else:
            self.owner.__dict__["forward"] = self._had

    @property
    def __self__(self) -> Any:
        """The module that ``forward`` belongs to, as for a bound method."""
        return self.plain.__self__  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        if not self.network.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        may = self._may_run_compiled(args, kwargs)
        if self._talks and process_count() > 1:
            may = all_alike(may, _form(args, kwargs), self._device())
        if not may:
            return self.plain(*args, **kwargs)
        # DistributedDataParallel would have graphs split into buckets, but not all of their parts can be split.
        with torch._dynamo.config.patch(optimize_ddp=False) if process_count() > 1 else nullcontext():
            return self._compiled(*args, **kwargs)

    def _may_run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self._as_it_is:
            self._as_it_is -= 1
            return False
        if isinstance(self.network, GraphNetwork) and not self.network.takes(args, kwargs):
            return False
        if any(is_foreign(hook) for module in self._modules for hook in _hooks(module)):
            self._report_hooks()
            return False
        # Whether a range is known is a constant of the graph, so it is determined outside of it.
        self._unseen = [fq for fq in self._unseen if not fq.seen]
        # A scale that begins to learn cannot be part of a graph.
        return not any(fq.step is not None for fq in self._unseen)

    @property
    def _talks(self) -> bool:
        """Whether the network communicates between processes, which requires the same order in all of them."""
        return any(getattr(module, "synchronized", False) for module in self._modules) or any(
            fq.reduce_across_processes for _, fq in fake_quantizers(self.network)
        )

    def _device(self) -> torch.device:
        return next((tensor.device for tensor in self.network.parameters()), torch.device("cpu"))

    def _report_hooks(self) -> None:
        if not self._said:
            self._said = True
            rank_zero_info(
                f"compile=True: a layer of {self.name!r} has a forward hook, which a compiled graph would skip. Steps "
                "with hooks run without being compiled. This is reported once."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """In a copy of the network, the copy's own uncompiled forward."""
        owner = memo.get(id(self.owner), self.owner)
        return types.MethodType(self.plain.__func__, memo.get(id(self.__self__), owner))  # type: ignore[attr-defined]


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a graph is specialized for: sizes and dtypes of the tensors of a call, and types of all other values."""
    leaves = pytree.tree_leaves((args, kwargs))
    return repr([(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in leaves])


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _function_of_its_own(plain: Callable[..., Any], *, marks: bool) -> Callable[..., Any]:
    """A function that calls ``plain``, with its own code object: Dynamo counts recompilations per code object."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    def run_with_marks(*args: Any, **kwargs: Any) -> Any:
        with MarksWhileTraced():
            return plain(*args, **kwargs)

    chosen: Any = run_with_marks if marks else run
    return types.FunctionType(
        chosen.__code__.replace(), chosen.__globals__, chosen.__name__, chosen.__defaults__, chosen.__closure__
    )
