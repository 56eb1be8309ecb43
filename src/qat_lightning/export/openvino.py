"""OpenVINO's intermediate representation: an ``.xml`` of the graph and a ``.bin`` of the weights beside it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qat_lightning.errors import ExportError, MissingExtraError, in_full
from qat_lightning.export.marked import marked
from qat_lightning.export.onnx import refuse_direct
from qat_lightning.export.onnx_graph import onnx_model
from qat_lightning.export.protocol import Kernels, Port, Runner, Source
from qat_lightning.settings.recipe import Recipe

_PRECISION = ["qat_lightning", "inference_precision"]
"""Entry of a file that gives the precision of its float ops; absent from files of int8 networks."""
_DYNAMIC_GROUP = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]
"""Entry of a file that tells OpenVINO how many activations of a product share a range; 0 for float activations."""
_SHAPES = 8
"""Number of input shapes for which a loaded network stays compiled."""


class OpenVino:
    """`Format` of OpenVINO's files, run by its CPU plugin.

    ``path`` is the ``.xml``; the weights are in a ``.bin`` of the same name, and both files must stay together.
    The trained quantization parameters are stored as FakeQuantize ops, which OpenVINO's low-precision transformations
    turn into int8 kernels; convolutions are fused with a residual add and an activation. Layers of an int8 network that
    stay float run in bfloat16 if the CPU supports it, as is OpenVINO's default; a float network runs in float32.

    Example:
        >>> OpenVino().suffix, OpenVino().refusal(Recipe("pt2e", "x86"))
        ('.xml', '')
    """

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".xml"
    runtime: ClassVar[str] = "OpenVINO"
    extra: ClassVar[str | None] = "openvino"
    batch: ClassVar[int | None] = None

    def require(self) -> None:
        """See `Format.require`."""
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
            import openvino  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                "The format 'openvino' needs OpenVINO and ONNX: pip install 'qat-lightning[openvino]'."
            ) from error

    def refusal(self, recipe: Recipe) -> str:
        """See `Format.refusal`."""
        if recipe.backend in ("tosa", "ethosu", "vgf"):
            return (
                "OpenVINO computes different values from Arm's int32 biases: use onnx, or train for backend='openvino'."
            )
        return refuse_direct(recipe, "OpenVINO")

    def write(self, source: Source, path: Path) -> None:
        """See `Format.write`."""
        self.require()
        import openvino

        model = onnx_model(source.spelled(marked), for_openvino=True, compressed=source.is_direct)
        try:
            # Not convert_model, which sends telemetry.
            converted = _core().read_model(model.SerializeToString())
            _compile(converted)
        except Exception as error:
            raise ExportError(
                f"OpenVINO cannot load the network ({in_full(error)}). Choose another format, such as "
                "onnx or pt2, or leave the part that fails out of the network."
            ) from error
        if source.is_direct:
            # By default OpenVINO quantizes the activations of compressed weights, which training did not include.
            converted.set_rt_info("0", _DYNAMIC_GROUP)
        if source.quantized is None:
            converted.set_rt_info("f32", _PRECISION)
        # Do not compress to float16: weights are int8, and the rest must keep its trained values.
        openvino.save_model(converted, str(path), compress_to_fp16=False)

    def ports(self, path: Path) -> tuple[Port, ...]:
        """See `Format.ports`."""
        return ()

    def kernels(self, path: Path) -> Kernels | None:
        """See `Format.kernels`."""
        return None

    def load(self, path: Path) -> Runner:
        """See `Format.load`. Uses as many threads as torch.

        A network with fixed shapes is faster, so it is compiled for each new shape of the inputs, at the first call.
        """
        self.require()
        model = _core().read_model(str(path))
        precision = model.get_rt_info(_PRECISION).astype(str) if model.has_rt_info(_PRECISION) else None

        @functools.lru_cache(maxsize=_SHAPES)
        def request(shapes: tuple[tuple[int, ...], ...]) -> Any:
            fixed = model.clone()
            fixed.reshape(dict(enumerate(list(shape) for shape in shapes)))
            return _compile(fixed, precision).create_infer_request()

        def run(tensors: list[Tensor]) -> list[Tensor]:
            arrays = [tensor.detach().cpu().contiguous() for tensor in tensors]
            arrays = [tensor.float() if tensor.is_floating_point() else tensor for tensor in arrays]
            asked = request(tuple(tuple(tensor.shape) for tensor in arrays))
            # Inputs are read in place. The request reuses its output buffers in the next call, so they are copied.
            asked.infer([tensor.numpy() for tensor in arrays], share_inputs=True, share_outputs=True)
            return [torch.from_numpy(np.array(output.data)) for output in asked.output_tensors]

        return run


@functools.cache
def _core() -> Any:
    """Return the process's only core, which is kept until the process ends.

    The CPU plugin of each core gives the thread a signal stack and frees it with the core. With two cores, the thread
    can be left with a freed stack, and the next signal (such as the end of a data loader's worker) kills the process
    without a message.
    """
    import openvino

    return openvino.Core()


def _compile(model: Any, precision: str | None = None) -> Any:
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    return _core().compile_model(model, "CPU", settings)
