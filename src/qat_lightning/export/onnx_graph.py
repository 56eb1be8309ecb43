"""Conversion of an ExportedProgram to an ONNX model in the form from which runtimes select int8 kernels.

`torch.onnx.export <https://docs.pytorch.org/docs/stable/onnx_export.html>`_ translates the ops. The rewrites here
remove what prevents ONNX Runtime, OpenVINO and TensorRT from running a layer as one int8 kernel, such as a weight
transposed after its DequantizeLinear, a bias that is not quantized, a linear layer with more than two dimensions, or
pooling written as a mean: see `qat_lightning.export.onnx_rewrites`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import keystr, tree_flatten_with_path

from qat_lightning.errors import ExportError, in_full
from qat_lightning.export.onnx_compressed import compress, translations
from qat_lightning.export.onnx_rewrites import rewrite

OPSET = 20
"""The opset of files with static ranges: ONNX Runtime 1.17, OpenVINO 2024.0 and TensorRT 10, or later."""
OPSET_OF_GROUPS = 21
"""The opset for kinds without calibration, the first with int4 and scales per group: ONNX Runtime 1.20 or later."""
_BATCH = "batch"


def onnx_model(program: ExportedProgram, *, for_openvino: bool = False, compressed: bool = False) -> Any:
    """Convert a program to ONNX.

    Args:
        program: From `qat_lightning.export.program`.
        for_openvino: Keep biases float, and linear layers in their original dimensions, as OpenVINO's int8 kernels
            require; omit zero points of weights, which OpenVINO would subtract.
        compressed: Whether the program has the ops of `qat_lightning.export.marked`.

    Returns:
        An ``onnx.ModelProto`` that the ONNX checker accepts.

    Raises:
        ExportError: ONNX has no translation of an op.
    """
    import onnx
    import onnx_ir as ir

    inputs, outputs = _input_names(program), _output_names(program)
    with _quiet():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=OPSET_OF_GROUPS if compressed else OPSET,
                custom_translation_table=translations() if compressed else None,
                input_names=inputs,
                output_names=outputs,
            )
        except Exception as error:
            raise ExportError(_explain(error)) from error
    assert made is not None
    model = made.model
    _name_batch(model, program)
    rewrite(model.graph, for_openvino=for_openvino)
    if compressed:
        compress(model)
    _tidy(model)
    model.producer_name = "qat-lightning"
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress output and warnings that upstream produces on every export."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def _explain(error: BaseException) -> str:
    found = None
    cause: BaseException | None = error
    while cause is not None and found is None:
        found = re.search(r"OpOverload\(op='([^']+)'", str(cause)) or re.search(
            r"No ONNX function.*?for (\S+)", str(cause)
        )
        cause = cause.__cause__
    if found:
        return (
            f"ONNX has no translation of {found[1]}: rewrite that part of the network with other ops, or choose a "
            "format that runs PyTorch's own ops, such as pt2."
        )
    return f"torch.onnx.export failed ({in_full(error)}). Choose another format, such as pt2."


def _input_names(program: ExportedProgram) -> list[str]:
    """Return the names of the tensors in the float network's signature."""
    return [_plain(str(name)) for name in program.graph_signature.user_inputs if isinstance(name, str)]


def _output_names(program: ExportedProgram) -> list[str]:
    """Return the keys of a dict of outputs, otherwise ``output``, or ``output_0`` and so on."""
    spec = program.call_spec.out_spec
    assert spec is not None
    filled = torch.utils._pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(filled)[0]]
    taken = set(_input_names(program))
    names: list[str] = []
    for path in paths:
        parts = re.findall(r"\w+", path)
        name = _plain("_".join(["output"] * (not parts or parts[0].isdigit()) + parts))
        while name in taken:
            name = f"{name}_output" if not name.endswith("_output") else f"{name}_"
        taken.add(name)
        names.append(name)
    return names


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _name_batch(model: Any, program: ExportedProgram) -> None:
    """Name the dynamic batch dimension."""
    import onnx_ir as ir

    symbols = {
        str(dim)
        for node in program.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        for dim in node.meta["val"].shape[:1]
        if isinstance(dim, torch.SymInt)
    }
    if len(symbols) != 1:
        return
    (symbol,) = symbols
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                ir.SymbolicDim(_BATCH) if isinstance(dim, ir.SymbolicDim) and dim.value == symbol else dim
                for dim in value.shape
            )


def _tidy(model: Any) -> None:
    from onnx_ir.passes import common

    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),
        common.NameFixPass(),
    ):
        step(model)
