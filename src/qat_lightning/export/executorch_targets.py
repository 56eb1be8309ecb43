"""Lowering a graph to each of ExecuTorch's backends: graph preparation, partitioner and passes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx
from torch.export import ExportedProgram

from qat_lightning.modes.decomposed.ops import DEQUANTIZE, QUANTIZE
from qat_lightning.modes.pt2e.executorch_quantizers import arm_compile_spec

aten = torch.ops.aten

Inputs = tuple[Tensor, ...]


def lower(backend: str, bits: int, graph_module: fx.GraphModule, inputs: Inputs) -> Any:
    """Lower a network to an ExecuTorch program for its backend.

    Args:
        backend: One of `LOWERINGS`.
        bits: Bits of activations.
        graph_module: Takes tensors, returns a flat tuple; it is consumed.
        inputs: Inputs with a batch size of 1.

    Returns:
        An ``ExecutorchProgramManager``.
    """
    return LOWERINGS[backend](backend, bits, graph_module, inputs).to_executorch()


def _xnnpack(backend: str, bits: int, graph_module: fx.GraphModule, inputs: Inputs) -> Any:
    """Lower to XNNPACK, except for slices.

    A file with XNNPACK's slice kernel does not load if input and output have different grids, and two slices of one
    convolution give wrong values. ExecuTorch's portable kernel copies the values.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.generic_node_configs import SliceCopyConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    configs = [config for config in ALL_PARTITIONER_CONFIGS if config is not SliceCopyConfig]
    return _partitioned(_exported(graph_module, inputs), XnnpackPartitioner(configs=configs))


def _arm(backend: str, bits: int, graph_module: fx.GraphModule, inputs: Inputs) -> Any:
    from executorch.exir import EdgeCompileConfig

    program = _exported(graph_module, inputs)
    _mark_integer_ops(program)
    spec, partitioner = arm_compile_spec(backend, bits), _arm_partitioner(backend)
    return _partitioned(program, partitioner(spec), compile_config=EdgeCompileConfig(_check_ir_validity=False))


def _arm_partitioner(backend: str) -> Any:
    if backend == "ethosu":
        from executorch.backends.arm.ethosu import EthosUPartitioner

        return EthosUPartitioner
    if backend == "vgf":
        if shutil.which("model-converter") is None:  # for example, if the environment is not activated
            os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        from executorch.backends.arm.vgf import VgfPartitioner

        return VgfPartitioner
    from executorch.backends.arm.tosa.partitioner import TOSAPartitioner

    return TOSAPartitioner


def _cortex_m(backend: str, bits: int, graph_module: fx.GraphModule, inputs: Inputs) -> Any:
    """Lower with ExecuTorch's passes for Cortex-M, as its tests run them; there is no delegate."""
    from executorch.backends.arm.quantizer.arm_quantizer_utils import SharedQspecQuantizer
    from executorch.backends.cortex_m.passes.cortex_m_pass_manager import CortexMPassManager
    from executorch.backends.cortex_m.quantizer.quantizer_support import CORTEX_M_QUANTIZER_SUPPORT_DICT
    from executorch.exir import EdgeCompileConfig, to_edge

    last = tuple(
        tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in inputs
    )
    program = _exported(graph_module, last)
    known = {target for pattern in CORTEX_M_QUANTIZER_SUPPORT_DICT for target in pattern}
    _mark_integer_ops(program, known | set(SharedQspecQuantizer.SHARED_QSPEC_OPS_DEFAULT))
    whole = [aten.linear, aten.hardsigmoid, aten.hardsigmoid_, aten.hardswish, aten.hardswish_, aten.silu]
    config = EdgeCompileConfig(
        preserve_ops=[op.default for op in whole],
        _check_ir_validity=False,
        _core_aten_ops_exception_list=[aten.max_pool2d.default],
    )
    edge = to_edge(program, compile_config=config)
    edge._edge_programs["forward"] = CortexMPassManager(edge.exported_program()).transform()
    return edge


def _openvino(backend: str, bits: int, graph_module: fx.GraphModule, inputs: Inputs) -> Any:
    from executorch.backends.openvino.partitioner import OpenvinoPartitioner
    from executorch.exir.backend.backend_details import CompileSpec

    _quantize_weights_in_graph(graph_module)
    return _partitioned(_exported(graph_module, inputs), OpenvinoPartitioner([CompileSpec("device", b"CPU")]))


def _vulkan(backend: str, bits: int, graph_module: fx.GraphModule, inputs: Inputs) -> Any:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return _partitioned(_exported(graph_module, inputs), VulkanPartitioner())


LOWERINGS: dict[str, Callable[[str, int, fx.GraphModule, Inputs], Any]] = {
    "xnnpack": _xnnpack,
    "openvino": _openvino,
    "tosa": _arm,
    "ethosu": _arm,
    "vgf": _arm,
    "cortex_m": _cortex_m,
    "vulkan": _vulkan,
}
"""The backends that files can be written for."""


def _exported(graph_module: fx.GraphModule, inputs: Inputs) -> ExportedProgram:
    return torch.export.export(graph_module, inputs, strict=True)


def _partitioned(program: ExportedProgram, partitioner: Any, **settings: Any) -> Any:
    from executorch.exir import to_edge_transform_and_lower

    return to_edge_transform_and_lower(program, partitioner=[partitioner], **settings)


def _mark_integer_ops(program: ExportedProgram, known: Collection[Any] | None = None) -> None:
    """Mark integer ops for Arm's passes: those between a dequantize op and a quantize op.

    Arm's quantizer sets these marks when it annotates, but a trained, saved and loaded network no longer has them.

    Args:
        program: The meta entries of its nodes are changed.
        known: The ops that may be marked; None for all.
    """
    from executorch.backends.arm.common.annotation_meta import ArmAnnotationInfo

    inside = set[fx.Node]()
    ops = [node for node in program.graph.nodes if node.op == "call_function"]
    ops = [node for node in ops if node.target not in (*QUANTIZE, *DEQUANTIZE) and (not known or node.target in known)]
    for node in ops:
        sources = [source for source in node.all_input_nodes if _is_float(source)]
        if sources and all(source.target in DEQUANTIZE or source in inside for source in sources):
            inside.add(node)
    for node in reversed(ops):
        if node in inside and not all(user.target in QUANTIZE or user in inside for user in node.users):
            inside.discard(node)
    for node in inside:
        mark = {ArmAnnotationInfo.CUSTOM_META_KEY: ArmAnnotationInfo(quantized=True)}
        node.meta["custom"] = {**node.meta.get("custom", {}), **mark}


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _quantize_weights_in_graph(graph_module: fx.GraphModule) -> None:
    """Store each weight as float, followed by a quantize op, as OpenVINO's importer requires; it folds them."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        integers = node.args[0] if node.target in DEQUANTIZE else None
        if integers is None or integers.op != "get_attr":
            continue
        values = [_value(graph_module, argument) for argument in node.args]
        name = f"weight_of_{node.name}"
        graph_module.register_buffer(name, node.target(*values))
        with graph.inserting_before(node):
            weight = graph.get_attr(name)
            quantize = QUANTIZE[DEQUANTIZE.index(node.target)]
            node.update_arg(0, graph.call_function(quantize, (weight, *node.args[1:])))
    graph.eliminate_dead_code()
    graph_module.recompile()


def _value(graph_module: fx.GraphModule, argument: Any) -> Any:
    if not isinstance(argument, fx.Node):
        return argument
    holder, _, leaf = str(argument.target).rpartition(".")
    return getattr(graph_module.get_submodule(holder), leaf)


def find_openvino() -> None:
    """Set ``OPENVINO_LIB_PATH`` to the OpenVINO of this environment, unless it is set, for ExecuTorch to find it."""
    try:
        import openvino
    except ImportError:
        return
    found = sorted((Path(openvino.__file__).parent / "libs").glob("libopenvino_c.so*"))
    if found:
        os.environ.setdefault("OPENVINO_LIB_PATH", str(found[0]))
