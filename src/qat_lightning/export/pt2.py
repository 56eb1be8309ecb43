"""PyTorch's own formats: a package that AOTInductor compiled for this type of CPU, and the exported program."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from qat_lightning.errors import ExportError
from qat_lightning.export.protocol import Kernels, Port, Runner, Source
from qat_lightning.modes.decomposed.compiling import as_compiled, compile_package
from qat_lightning.modes.decomposed.lowering import overflowing_layer
from qat_lightning.settings.engines import NO_VNNI
from qat_lightning.settings.recipe import Recipe


class AotInductor:
    """`Format` of AOTInductor packages: a shared library of int8 kernels for the CPU it was made on.

    ``torch._inductor.aoti_load_package(path)`` loads it without this package.
    """

    name: ClassVar[str] = "pt2"
    suffix: ClassVar[str] = ".pt2"
    runtime: ClassVar[str] = "AOTInductor"
    extra: ClassVar[str | None] = None
    batch: ClassVar[int | None] = None

    def require(self) -> None:
        """See `Format.require`: it comes with torch."""

    def refusal(self, recipe: Recipe) -> str:
        """See `Format.refusal`."""
        if recipe.target.own_grids or recipe.target.activation_dtype is not torch.uint8:
            return (
                f"AOTInductor's int8 kernels need uint8 activations, and those of backend={recipe.backend!r} are "
                "different: use backend='x86', or a format of that backend."
            )
        return ""

    def write(self, source: Source, path: Path) -> None:
        """See `Format.write`."""
        graph_module, examples, dynamic = flat_graph(source)
        if layer := overflowing_layer(graph_module):
            raise ExportError(
                f"{NO_VNNI}, such as those of {layer!r}: export on a CPU with VNNI, or train "
                "with backend='fbgemm', whose weights have 7 bits, if the file has to run on CPUs like this one."
            )
        try:
            package = compile_package(graph_module, examples, dynamic)
        except Exception as error:
            raise ExportError(f"AOTInductor cannot compile the network: {type(error).__name__}: {error}") from error
        path.write_bytes(package)

    def ports(self, path: Path) -> tuple[Port, ...]:
        """See `Format.ports`."""
        return ()

    def kernels(self, path: Path) -> Kernels | None:
        """See `Format.kernels`."""
        return None

    def load(self, path: Path) -> Runner:
        """See `Format.load`."""
        run = torch._inductor.aoti_load_package(str(path))

        def call(tensors: list[Tensor]) -> list[Tensor]:
            return as_list(run(*map(as_compiled, tensors)))

        return call


class PlainProgram:
    """`Format` of ``torch.export.save``, the input of other PyTorch compilers; it contains no int8 kernels."""

    name: ClassVar[str] = "exported_program"
    suffix: ClassVar[str] = ".program.pt2"
    runtime: ClassVar[str] = "ExportedProgram"
    extra: ClassVar[str | None] = None
    batch: ClassVar[int | None] = None

    def require(self) -> None:
        """See `Format.require`: it comes with torch."""

    def refusal(self, recipe: Recipe) -> str:
        """See `Format.refusal`: it takes any."""
        return ""

    def write(self, source: Source, path: Path) -> None:
        """See `Format.write`."""
        graph_module, examples, dynamic = flat_graph(source)
        torch.export.save(torch.export.export(graph_module, examples, dynamic_shapes=dynamic), str(path))

    def ports(self, path: Path) -> tuple[Port, ...]:
        """See `Format.ports`."""
        return ()

    def kernels(self, path: Path) -> Kernels | None:
        """See `Format.kernels`."""
        return None

    def load(self, path: Path) -> Runner:
        """See `Format.load`. Loading unpickles: load only files from sources that you trust."""
        # Registers the quantize and dequantize ops.
        import torch.ao.quantization.fx._decomposed

        module = torch.export.load(str(path)).module()

        def run(tensors: list[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                return as_list(module(*tensors))

        return run


def flat_graph(
    source: Source, program: ExportedProgram | None = None
) -> tuple[fx.GraphModule, tuple[Tensor, ...], tuple[Any, ...]]:
    """Return a source's program as a graph of flat tensors, with example inputs and dynamic shapes.

    Args:
        source: The network to export.
        program: Used instead of `Source.program`.
    """
    program = source.program if program is None else program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = program.module(check_guards=False)
    graph = inner.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    leaves = torch.utils._pytree.tree_leaves(program.example_inputs)
    kept: list[Tensor] = []
    dynamic: list[Any] = []
    for node, leaf in zip(placeholders, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            node.replace_all_uses_with(leaf)
            graph.erase_node(node)
            continue
        value: Any = node.meta["val"]
        varies = {axis for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
        kept.append(leaf)
        dynamic.append(dict.fromkeys(varies, torch.export.Dim.AUTO) or None)
    results = torch.utils._pytree.tree_leaves(graph.output_node().args[0])
    graph.output_node().args = (tuple(result for result in results if isinstance(result, fx.Node)),)
    graph.set_codegen(fx.graph.CodeGen())
    # A new module, because the program's own checks its inputs.
    return fx.GraphModule(inner, graph), tuple(kept), tuple(dynamic)


def as_list(result: Any) -> list[Tensor]:
    """Return the result of a runtime as a list."""
    return list(result) if isinstance(result, (list, tuple)) else [result]
