"""ONNX files with quantize and dequantize ops, which ONNX Runtime, TensorRT and others turn into int8 kernels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qat_lightning.errors import ExportError, MissingExtraError, in_full
from qat_lightning.export.marked import marked
from qat_lightning.export.onnx_graph import onnx_model
from qat_lightning.export.protocol import Kernels, Port, Runner, Source
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe

_LAYERS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "MatMul")
_INT8_KERNELS = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")


class Onnx:
    """`Format` of ONNX files, run by ONNX Runtime's CPU kernels.

    Activations are uint8, which ONNX Runtime prefers, or int8 with zero point 0 from ``backend="tensorrt"``. Weights
    are int8 per channel, biases int32. ONNX Runtime runs a layer as one int8 kernel if its output is quantized. In
    networks of ``mode="fx"`` every output is; in those of ``mode="pt2e"`` a convolution before a residual add,
    GroupNorm or an activation other than ReLU has no quantized output, and runs in float.

    Example:
        >>> Onnx().suffix, Onnx().refusal(Recipe("fx", "x86"))
        ('.onnx', '')
    """

    name: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    runtime: ClassVar[str] = "ONNX Runtime"
    extra: ClassVar[str | None] = "onnx"
    batch: ClassVar[int | None] = None

    def require(self) -> None:
        """See `Format.require`."""
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                "The format 'onnx' needs ONNX and ONNX Runtime: pip install 'qat-lightning[onnx]'."
            ) from error

    def refusal(self, recipe: Recipe) -> str:
        """See `Format.refusal`."""
        return refuse_direct(recipe, "ONNX")

    def write(self, source: Source, path: Path) -> None:
        """See `Format.write`."""
        import onnx

        self.require()
        model = onnx_model(source.spelled(marked), compressed=source.is_direct)
        self._try(model)
        onnx.save(model, path)

    def load(self, path: Path) -> Runner:
        """See `Format.load`. Uses as many threads as torch."""
        self.require()
        return _runner(str(path))

    def ports(self, path: Path) -> tuple[Port, ...]:
        """See `Format.ports`."""
        return ()

    def kernels(self, path: Path) -> Kernels | None:
        """See `Format.kernels`: read from the optimized graph that ONNX Runtime writes."""
        import onnx
        import onnxruntime

        self.require()
        with tempfile.TemporaryDirectory(prefix="qat-lightning-") as folder:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # hide the warning that the file is specific to this machine
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            optimized = onnx.load(options.optimized_model_filepath).graph
        int8 = sum(node.op_type in _INT8_KERNELS for node in optimized.node)
        return Kernels(int8 + _on_dequantized(optimized), int8)

    def _try(self, model: Any) -> None:
        """Raise if ONNX Runtime does not support something in the model."""
        try:
            _runner(model.SerializeToString())
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot load the file ({in_full(error)}). Choose another format, such as "
                "pt2, or leave the part that fails out of the network."
            ) from error


def _on_dequantized(graph: Any) -> int:
    """Count float layers and products whose inputs are only dequantized integers, and a bias."""
    made = {name: node.op_type for node in graph.node for name in node.output}
    return sum(
        node.op_type in _LAYERS and all(made.get(name) == "DequantizeLinear" for name in list(node.input)[:2])
        for node in graph.node
    )


def refuse_direct(recipe: Recipe, what: str) -> str:
    """Return why a recipe is not supported (kinds without calibration, 16-bit activations); empty if it is."""
    if recipe.kind not in DIRECT and recipe.scheme.activation_bits == 16:
        return (
            f"{what} files support activations of 8 bits here, and these have 16: use executorch or exported_program."
        )
    if recipe.kind not in DIRECT or recipe.mode != "pt2e":
        return ""
    return (
        f"of kind={recipe.kind!r}, mode='pt2e' leaves a graph of single operations, in which {what} would not "
        "recognize the compressed weights: use mode='fx' or mode='eager', or the format pt2 with backend='x86'."
    )


def _runner(model: str | bytes) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        arrays = [tensor.detach().cpu().contiguous() for tensor in tensors]
        arrays = [tensor.float() if tensor.is_floating_point() else tensor for tensor in arrays]
        feed = {name: tensor.numpy() for name, tensor in zip(names, arrays, strict=True)}
        return [torch.from_numpy(np.asarray(array, order="C")) for array in session.run(None, feed)]

    return run
