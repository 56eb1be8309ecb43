"""Compiling the training steps of a prepared network: one graph, and a new one only where the schedule switches.

What is on is in plain attributes of the modules, on which Dynamo guards, so that a switch of the schedule is a
recompilation and all that lies between two of them runs the same graph. Only steps with gradient are compiled:
evaluation, conversion and whatever looks at the network through hooks run it as it is.

Of several processes that reduce ranges or BatchNorm's statistics within the network, all run a step compiled, with
inputs of one form, or none does: reductions of a graph and of Python are in another order.
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
from qat_lightning.modes.prepared import fake_quantizers, prepared_state
from qat_lightning.processes import all_alike, process_count
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.modes import traits_of

BACKEND = "inductor"
"""Of ``torch.compile``."""


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where there is nothing to compile with.

    Args:
        device: Where the network trains; for a CPU the code is C++.

    Raises:
        ConfigurationError: With what to install, or what to set instead.
    """
    if device.type != "cpu":
        return
    if not has_cpp_compiler():
        raise ConfigurationError(
            "compile=True needs a C++ compiler, and none was found: install one (apt install g++), name it in the "
            "environment variable CXX, or use compile=False."
        )


def refuse_compile(mode: str) -> None:
    """Refuse to compile the training steps of a network whose own code is in the way of one graph.

    Raises:
        CombinationError: With what to set instead.
    """
    if not traits_of(mode).compiles:
        raise CombinationError(
            f"compile=True does not support mode={mode!r}, where plain Python code runs between the parts: "
            "use compile=False."
        )


class CompiledSteps:
    """Stands in for the ``forward`` of a prepared network, and runs its training steps compiled.

    After every switch of the schedule one step runs as it is: in it ranges are first seen, and scales begin to learn,
    which happens once and is no part of the graph.

    Args:
        network: The prepared network, whose parameters and keys stay as they are.
        owner: The module on which ``forward`` is replaced: the network, or the LightningModule for its own forward.
        name: For messages.
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
        marks = recipe.mode == "eager" and recipe.kind not in DIRECT  # whose layers know what they round
        self._compiled = torch.compile(_function_of_its_own(self.plain, marks=marks), backend=BACKEND, fullgraph=True)
        self._learn = any(fq.step is not None for fq in self._unseen)
        self.switched()
        self._said = False
        owner.__dict__["forward"] = self

    def switched(self) -> None:
        """The schedule switched something: run one step as it is; two, where a scale may begin to learn only then."""
        self._as_it_is = 2 if self._learn else 1

    def remove(self) -> None:
        """Put back what was there."""
        if self._had is None:
            self.owner.__dict__.pop("forward", None)
        else:
            self.owner.__dict__["forward"] = self._had

    @property
    def __self__(self) -> Any:
        """As of a bound method: whose forward this is."""
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
        # What DistributedDataParallel would have split for its buckets has parts that cannot be split.
        with torch._dynamo.config.patch(optimize_ddp=False) if process_count() > 1 else nullcontext():
            return self._compiled(*args, **kwargs)

    def _may_run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self._as_it_is:
            self._as_it_is -= 1
            return False
        sizes = getattr(self.network, "sizes", None)
        if sizes is not None and sizes.others(args, kwargs):
            return False
        if any(is_foreign(hook) for module in self._modules for hook in _hooks(module)):
            self._say_hooks()
            return False
        # Whether a range is known is a constant of the graph, and found out outside of it.
        self._unseen = [fq for fq in self._unseen if not fq.seen]
        # What a scale would begin to learn is no part of a graph.
        return not any(fq.step is not None for fq in self._unseen)

    @property
    def _talks(self) -> bool:
        """Whether processes talk to each other within the network, which they have to do in one order."""
        return any(getattr(module, "synchronized", False) for module in self._modules) or any(
            fq.reduce_across_processes for _, fq in fake_quantizers(self.network)
        )

    def _device(self) -> torch.device:
        return next((tensor.device for tensor in self.network.parameters()), torch.device("cpu"))

    def _say_hooks(self) -> None:
        if not self._said:
            self._said = True
            rank_zero_info(
                f"compile=True: a layer of {self.name!r} has a forward hook, which a compiled graph would skip. Steps "
                "with hooks run without being compiled. This is reported once."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """In a copy of the network its plain forward, of the copy."""
        owner = memo.get(id(self.owner), self.owner)
        return types.MethodType(self.plain.__func__, memo.get(id(self.__self__), owner))  # type: ignore[attr-defined]


def _form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What a graph is made for: the sizes and types of the tensors of a call, and all that is no tensor."""
    leaves = pytree.tree_leaves((args, kwargs))
    return repr([(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in leaves])


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_hooks.values()
    yield from module._forward_pre_hooks.values()


def _function_of_its_own(plain: Callable[..., Any], *, marks: bool) -> Callable[..., Any]:
    """A function that calls ``plain``, with code of its own: Dynamo counts recompilations for each piece of code."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    def run_with_marks(*args: Any, **kwargs: Any) -> Any:
        with MarksWhileTraced():
            return plain(*args, **kwargs)

    chosen: Any = run_with_marks if marks else run
    return types.FunctionType(
        chosen.__code__.replace(), chosen.__globals__, chosen.__name__, chosen.__defaults__, chosen.__closure__
    )
