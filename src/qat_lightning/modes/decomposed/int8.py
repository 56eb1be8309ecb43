"""The int8 network of mode pt2e: a decomposed graph that is compiled for the backend on its first call."""

from __future__ import annotations

import copy
import os
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qat_lightning.errors import in_brief
from qat_lightning.graph.example import Example, part_that_runs
from qat_lightning.graph.inference_call import InferenceCall
from qat_lightning.graph.portable_graph import PortableModule
from qat_lightning.graph.signature import BATCH, CallSpec
from qat_lightning.modes.compile_switch import compiling_allowed, has_cpp_compiler
from qat_lightning.modes.decomposed.compiling import as_compiled, compile_library, difference, load_library
from qat_lightning.modes.decomposed.lowering import on_plain_kernels, overflowing_layer
from qat_lightning.modes.decomposed.plain import PlainLayer
from qat_lightning.settings.backends import get_backend
from qat_lightning.settings.engines import NO_VNNI
from qat_lightning.settings.runtimes import Runtime

_ROWS = 2
"""Number of samples on which layers are compared; all tensors between the layers are in memory meanwhile."""

Runs = Literal["not compiled yet", "aotinductor", "onednn", "decomposed"]


class Int8Network(nn.Module):
    """A converted network. It runs int8 kernels that AOTInductor compiles on the first call, for any batch size.

    Compiling takes seconds (call `compile` to choose the moment) and needs a C++ compiler. The result is compared with
    the decomposed graph on the inputs of that first call. If it cannot be compiled, or computes something else,
    oneDNN's int8 kernels run one by one instead, each of them compared; if that fails too, the decomposed graph runs,
    slower than the float network. A warning gives the reason. The environment variable ``QAT_LIGHTNING_COMPILE=0``
    disables compilation: the decomposed graph runs.

    Args:
        decomposed: A graph of quantize, dequantize and plain ops with int8 weights: tensors in, a flat tuple out.
        spec: Its signature.
        backend: The name of its backend; only x86 is compiled.
        runtime: With ``"plain"``, oneDNN's kernels always run one by one, and nothing is compiled.
        inference_call: The call without the inputs of the loss, which has a network of its own on the same tensors;
            None if there are no such inputs.

    Attributes:
        decomposed: The graph as given, for saving, exporting and inspection.
        runs: What the next call executes.
        why_decomposed: Why it is not compiled; empty if it is.
    """

    decomposed: fx.GraphModule
    runs: Runs
    runtime: Runtime | None = None

    def __init__(
        self,
        decomposed: fx.GraphModule,
        spec: CallSpec,
        backend: str,
        runtime: Runtime | None = None,
        inference_call: InferenceCall | None = None,
    ) -> None:
        super().__init__()
        self.decomposed = decomposed
        self.spec = spec
        self.backend = backend
        self.runtime = runtime
        self.inference_call = inference_call
        self.why_decomposed = ""
        self._reset()

    @property
    def is_one_kernel(self) -> bool:
        """Whether a compiled library runs, without Python between its kernels."""
        return self.runs == "aotinductor"

    def _reset(self) -> None:
        self.runs = "not compiled yet"
        self.__dict__["_compiled"] = None
        self.__dict__["_lock"] = threading.Lock()
        self.__dict__["_at_inference"] = None
        if self.backend != "x86":
            self.runs = "decomposed"
            self.why_decomposed = f"backend {self.backend!r} runs elsewhere ({get_backend(self.backend, 'pt2e').about})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the int8 network on the inputs of the float network."""
        call = self.inference_call
        if call is not None and call.is_made_by(args, kwargs):
            return self.at_inference()(**call.arguments(args, kwargs))
        with torch.no_grad():
            tensors = list(map(as_compiled, self.spec.flatten(args, kwargs)))
            if self.runs == "not compiled yet":
                if self.runtime == "plain" or compiling_enabled():
                    self._compile_on(tensors)
                elif compiling_wanted() and (overflowing_layer(self.decomposed) or not has_cpp_compiler()):
                    self._run_kernels(tensors)  # only tried out, and what will not be compiled runs like this
            run = self.__dict__["_compiled"] or self.decomposed
            return self.spec.unflatten(run(*tensors))

    def at_inference(self) -> Int8Network:
        """The network of the call without the inputs of the loss; its tensors are the same."""
        call = self.inference_call
        assert call is not None
        assert call.spec is not None
        if self.__dict__["_at_inference"] is None:
            graph_module = fx.GraphModule(self.decomposed, call.graph_from(self.decomposed.graph)).eval()
            self.__dict__["_at_inference"] = Int8Network(graph_module, call.spec, self.backend, self.runtime)
        network: Int8Network = self.__dict__["_at_inference"]
        return network

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile now; the inputs of a real call are used to verify it. Later calls may have any batch size."""
        with torch.no_grad():
            self._compile_on(list(map(as_compiled, self.spec.flatten(args, kwargs))))

    def compiled_package(self, *args: Any, **kwargs: Any) -> bytes:
        """The compiled package, for `use_package` in other processes; compiles if necessary.

        Returns:
            The package; empty if the decomposed graph runs instead.
        """
        if compiling_enabled():
            self.compile(*args, **kwargs)
        return bytes(self.__dict__["_compiled"].package) if self.runs == "aotinductor" else b""

    def use_package(self, package: bytes, *args: Any, **kwargs: Any) -> None:
        """Run the package that another process on this machine compiled of the same network.

        It is compared with the decomposed graph on the given inputs, like a package compiled here. If it cannot be
        loaded or computes something else, it is not used, and the first call compiles.

        Args:
            package: Result of ``compiled_package`` there.
            *args: Positional inputs of a real call.
            **kwargs: Keyword inputs.
        """
        with torch.no_grad(), self.__dict__["_lock"]:
            tensors = list(map(as_compiled, self.spec.flatten(args, kwargs)))
            try:
                library = load_library(package, self.decomposed, self.spec, tensors)
                problem = difference(self.decomposed, library, self.spec, tensors, get_backend(self.backend, "pt2e"))
            except Exception as error:  # noqa: BLE001 (loading may fail in any way; it is compiled here instead)
                problem = f"it cannot be loaded ({_said(error)})"
            if problem:
                warnings.warn(
                    f"The package compiled by another process cannot be used: {problem}. It is compiled again.",
                    stacklevel=2,
                )
            else:
                self.runs = "aotinductor"
                self.__dict__["_compiled"] = library

    def _compile_on(self, tensors: list[Tensor]) -> None:
        with self.__dict__["_lock"]:
            if self.runs != "not compiled yet":
                return
            if self.runtime == "plain":
                if not self._run_kernels(tensors):
                    warnings.warn(f"int8 is slower than float here, because {self.why_decomposed}.", stacklevel=3)
                return
            if layer := overflowing_layer(self.decomposed):
                cause = f"{NO_VNNI[0].lower()}{NO_VNNI[1:]}, such as those of {layer!r}"
                why = f"{cause}: backend='fbgemm' with mode='fx' or 'eager' is fast here"
                self._run_without_compiler(tensors, why)
                return
            try:
                compiled = compile_library(self.decomposed, self.spec, tensors)
                problem = difference(self.decomposed, compiled, self.spec, tensors, get_backend(self.backend, "pt2e"))
            except Exception as error:  # noqa: BLE001 (a compiler may fail in any way; the graph runs instead)
                problem = f"it cannot be compiled ({_said(error)})"
                if not has_cpp_compiler():
                    problem = "there is no C++ compiler: install one (apt install g++), or name it in CXX"
            if problem:
                self._run_without_compiler(tensors, problem)
            else:
                self.runs = "aotinductor"
                self.__dict__["_compiled"] = compiled

    def _run_without_compiler(self, tensors: list[Tensor], problem: str) -> None:
        slow = "as a decomposed graph, slower than the float network"
        how = "one int8 kernel at a time" if self._run_kernels(tensors) else slow
        self.why_decomposed = problem
        warnings.warn(
            f"The int8 network is not compiled. It runs {how}, because {problem}. QAT_LIGHTNING_COMPILE=0 in the "
            "environment turns compilation off.",
            stacklevel=4,
        )

    def _run_kernels(self, tensors: list[Tensor]) -> bool:
        """Use oneDNN's kernels one by one, or the decomposed graph if there are none; returns whether there are."""
        batched = [given.shape[:1] == (BATCH,) for given in self.spec.inputs if given.shape is not None]
        rows = tuple(tensor[:_ROWS] if first else tensor for tensor, first in zip(tensors, batched, strict=True))
        few = list(part_that_runs(self.decomposed, Example(rows), Example(tuple(tensors))).args)
        kernels = on_plain_kernels(self.decomposed, few, get_backend(self.backend, "pt2e"))
        has_any = any(isinstance(module, PlainLayer) for module in kernels.modules())
        self.runs = "onednn" if has_any else "decomposed"
        self.__dict__["_compiled"] = kernels if has_any else None
        if not has_any:
            self.why_decomposed = "oneDNN has no kernel for any of its layers"
        return has_any

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._reset()  # compiled code holds the old weights

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Network:
        """A copy with its own graph; compiled code holds no state and is shared."""
        copied = type(self)(
            copy.deepcopy(self.decomposed, memo), self.spec, self.backend, self.runtime, self.inference_call
        )
        copied.training = self.training
        copied.runs, copied.why_decomposed = self.runs, self.why_decomposed
        copied.__dict__["_compiled"] = self.__dict__["_compiled"]
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Omit compiled code."""
        state = {
            name: value for name, value in self.__dict__.items() if name not in ("_compiled", "_lock", "_at_inference")
        }
        return state | {"_modules": {"decomposed": PortableModule(self.decomposed)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = state | {"_modules": {"decomposed": state["_modules"]["decomposed"].module}}
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def extra_repr(self) -> str:
        """Backend and runtime."""
        return f"backend={self.backend!r}, runs={self.runs!r}"


def compiling_enabled() -> bool:
    """Whether int8 networks are compiled on their first call.

    Example:
        >>> import unittest.mock
        >>> with unittest.mock.patch.dict("os.environ", QAT_LIGHTNING_COMPILE="0"):
        ...     compiling_enabled()
        False
    """
    return compiling_allowed() and compiling_wanted()


def compiling_wanted() -> bool:
    """Whether the environment leaves compilation on."""
    return os.environ.get("QAT_LIGHTNING_COMPILE", "1") != "0"


def _said(error: Exception) -> str:
    """An error in brief, with the place where it was raised if it has no message."""
    if str(error).strip():
        return in_brief(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: in {frame.name}, {Path(frame.filename).name}:{frame.lineno}"
