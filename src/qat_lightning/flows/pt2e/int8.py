"""The int8 network of mode pt2e: a decomposed graph, compiled for the backend when it is first called."""

from __future__ import annotations

import copy
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qat_lightning.backends import BACKENDS
from qat_lightning.flows.base import sqnr_db
from qat_lightning.flows.pt2e.signature import BATCH, CallSpec

Runs = Literal["not compiled yet", "aotinductor", "decomposed"]

_ROWS_TO_COMPARE = 8
_MARGIN_DB = 6.0
_NOISE = 1e-6


class Int8Network(nn.Module):
    """A converted network. It runs int8 kernels that AOTInductor compiles at its first call, for any batch size.

    Compiling takes seconds (`compile` does it at a moment of your choice) and needs a C++ compiler. The result is
    compared with the decomposed graph on the inputs of that first call. Where it cannot be compiled, or computes
    something else, the decomposed graph runs instead, slower than the float network, and a warning says why. The
    environment variable ``QAT_LIGHTNING_COMPILE=0`` turns compiling off.

    Args:
        decomposed: A graph of quantize, dequantize and plain ops with int8 weights: tensors in, a flat tuple out.
        spec: How it is called.
        backend: The name of its backend; only x86 is compiled.

    Attributes:
        decomposed: As given: what is saved, exported, or looked at.
        runs: What the next call runs.
        why_decomposed: Why it is not compiled, if it is not.
    """

    decomposed: fx.GraphModule
    runs: Runs

    def __init__(self, decomposed: fx.GraphModule, spec: CallSpec, backend: str) -> None:
        super().__init__()
        self.decomposed = decomposed
        self.spec = spec
        self.backend = backend
        self.why_decomposed = ""
        self._reset()

    def _reset(self) -> None:
        self.runs = "not compiled yet"
        self.__dict__["_compiled"] = None
        self.__dict__["_lock"] = threading.Lock()
        if self.backend != "x86":
            self.runs = "decomposed"
            self.why_decomposed = f"backend {self.backend!r} runs elsewhere ({BACKENDS[self.backend].about})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the int8 network on the inputs of the float network."""
        with torch.no_grad():
            tensors = [_prepare(tensor) for tensor in self.spec.flatten(args, kwargs)]
            if self.runs == "not compiled yet" and compiling_enabled():
                self._compile_on(tensors)
            run = self.__dict__["_compiled"] or self.decomposed
            return self.spec.unflatten(run(*tensors))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile now, with the inputs of a real call to compare on; later calls may have any batch size."""
        with torch.no_grad():
            self._compile_on([_prepare(tensor) for tensor in self.spec.flatten(args, kwargs)])

    def _compile_on(self, tensors: list[Tensor]) -> None:
        with self.__dict__["_lock"]:
            if self.runs != "not compiled yet":
                return
            try:
                compiled = _compile(self.decomposed, self.spec, tensors)
                tolerance_db = BACKENDS[self.backend].tolerance_db
                problem = _difference(self.decomposed, compiled, self.spec, tensors, tolerance_db)
            except Exception as error:  # noqa: BLE001 (a compiler may fail in any way; the graph runs instead)
                problem = f"it cannot be compiled ({type(error).__name__}: {_first_line(error)})"
            if problem:
                self.runs, self.why_decomposed = "decomposed", problem
                warnings.warn(
                    f"The int8 network runs as a decomposed graph, slower than the float network, because {problem}. A "
                    "C++ compiler is needed (g++ or clang on the PATH); set QAT_LIGHTNING_COMPILE=0 to stop trying.",
                    stacklevel=3,
                )
            else:
                self.runs = "aotinductor"
                self.__dict__["_compiled"] = compiled

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._reset()  # what is compiled holds the old weights

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Network:
        """A copy with its own graph; compiled code holds no state and is shared."""
        copied = type(self)(copy.deepcopy(self.decomposed, memo), self.spec, self.backend)
        copied.training = self.training
        copied.runs, copied.why_decomposed = self.runs, self.why_decomposed
        copied.__dict__["_compiled"] = self.__dict__["_compiled"]
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_compiled", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def extra_repr(self) -> str:
        """Backend and what runs."""
        return f"backend={self.backend!r}, runs={self.runs!r}"


def compiling_enabled() -> bool:
    """Whether int8 networks are compiled at their first call.

    Example:
        >>> import unittest.mock
        >>> with unittest.mock.patch.dict("os.environ", QAT_LIGHTNING_COMPILE="0"):
        ...     compiling_enabled()
        False
    """
    return os.environ.get("QAT_LIGHTNING_COMPILE", "1") != "0"


def _prepare(tensor: Tensor) -> Tensor:
    # Compiled code reads memory as laid out at compile time; and bf16 training hands over bf16 batches.
    tensor = tensor.detach().contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def _compile(decomposed: fx.GraphModule, spec: CallSpec, tensors: list[Tensor]) -> Callable[..., Any]:
    """Compile with AOTInductor: one library for every batch size, loaded from a folder that is gone afterwards."""
    # Registers the passes that turn dequantize, op, quantize into oneDNN's int8 ops.
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401

    shapes = [given.shape for given in spec.inputs if given.shape is not None]
    # As the network was captured, and not as it is called now: a batch of 1 would be taken for a constant.
    examples = [
        tensor.new_zeros([spec.batch if size == BATCH else size for size in shape])
        for tensor, shape in zip(tensors, shapes, strict=True)
    ]
    dynamic = [{0: torch.export.Dim.AUTO} if shape[:1] == (BATCH,) else None for shape in shapes]
    outputs = list(decomposed.graph.output_node().args[0])  # type: ignore[arg-type]
    computed = fx.GraphModule(decomposed, copy.deepcopy(decomposed.graph))
    computed.graph.output_node().args = (
        tuple(value for value in computed.graph.output_node().args[0] if isinstance(value, fx.Node)),  # type: ignore[union-attr]
    )
    _make_linear_inputs_contiguous(computed.graph)
    computed.recompile()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="qat-lightning-") as folder:
        warnings.simplefilter("ignore")
        program = torch.export.export(computed, tuple(examples), dynamic_shapes=tuple(dynamic))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder, "int8.pt2")), inductor_configs={"freezing": True}
        )
        runner = torch._inductor.aoti_load_package(package)
    return _Library(runner, outputs, [isinstance(value, Tensor) for value in decomposed(*examples)])


def _make_linear_inputs_contiguous(graph: fx.Graph) -> None:
    """Where attention hands a transposed tensor to a linear layer, oneDNN's patterns fail on a batch of any size."""
    for linear in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        quantize = linear.args[0].args[0] if linear.args[0].args else None
        if isinstance(quantize, fx.Node) and quantize.args and isinstance(quantize.args[0], fx.Node):
            with graph.inserting_before(quantize):
                contiguous = graph.call_function(torch.ops.aten.contiguous.default, (quantize.args[0],))
            quantize.update_arg(0, contiguous)


class _Library:
    """A compiled library, whose outputs are those of the graph: sizes as numbers, constants as they are."""

    def __init__(self, runner: Callable[..., Any], outputs: list[Any], is_tensor: list[bool]) -> None:
        self.runner = runner
        self.constants = [None if isinstance(value, fx.Node) else value for value in outputs]
        self.is_computed = [isinstance(value, fx.Node) for value in outputs]
        self.is_tensor = is_tensor

    def __call__(self, *tensors: Tensor) -> list[Any]:
        computed = self.runner(*tensors)
        rest = iter(computed if isinstance(computed, (list, tuple)) else [computed])
        outputs = []
        for constant, is_computed, is_tensor in zip(self.constants, self.is_computed, self.is_tensor, strict=True):
            value = next(rest) if is_computed else constant
            if isinstance(value, Tensor) and not is_tensor:
                value = value.item()
            outputs.append(value)
        return outputs


def _difference(
    decomposed: fx.GraphModule, compiled: Callable[..., Any], spec: CallSpec, tensors: list[Tensor], tolerance_db: float
) -> str:
    """What is wrong with the compiled network on real inputs; empty if nothing is.

    A deep network turns a difference in the last bit of a float into steps of its int8 layers, so that it can be right
    and far from the decomposed graph. Hence it is held to what such a difference in the decomposed graph itself does.
    """
    batched = [given.shape[:1] == (BATCH,) for given in spec.inputs if given.shape is not None]
    few = [t[:_ROWS_TO_COMPARE].contiguous() if b else t for t, b in zip(tensors, batched, strict=True)]
    wanted, got = decomposed(*few), compiled(*few)
    worst = _worst_sqnr(wanted, got)
    if worst >= tolerance_db:
        return ""
    expected = _worst_sqnr(wanted, _WithNoise(decomposed).run(*few)) - _MARGIN_DB
    if worst >= min(expected, tolerance_db):
        return ""
    return (
        f"the compiled network is at {worst:.1f} dB of SQNR from it on real inputs, where rounding of floats explains "
        f"{expected:.1f} dB"
    )


def _worst_sqnr(wanted: Any, got: Any) -> float:
    pairs = [
        (one, other)
        for one, other in zip(wanted, got, strict=True)
        if isinstance(one, Tensor) and one.is_floating_point()
    ]
    return min((sqnr_db(one, other) for one, other in pairs), default=float("inf"))


class _WithNoise(fx.Interpreter):
    """Runs a decomposed graph with what goes into each quantize op changed in its last bits."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.generator = torch.Generator().manual_seed(0)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.quantized_decomposed.quantize_per_tensor.default:
            noise = torch.randn(args[0].shape, generator=self.generator)
            args = (args[0] * (1 + _NOISE * noise), *args[1:])
        return super().call_function(target, args, kwargs)
