"""LiteRT (TensorFlow Lite): a ``.tflite`` for phones and microcontrollers, run by ai-edge-litert."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qat_lightning.errors import ExportError, MissingExtraError
from qat_lightning.export import tflite_file
from qat_lightning.export.protocol import Kernels, Port, Runner, Source
from qat_lightning.export.pt2 import flat_graph
from qat_lightning.export.tflite_convert import SAID
from qat_lightning.export.tflite_graph import for_litert
from qat_lightning.export.tflite_transposed import without_transposed
from qat_lightning.settings.kinds import DIRECT
from qat_lightning.settings.recipe import Recipe

_PACKAGES = ("litert_torch", "ai_edge_litert")
_LENGTH = 300


class Tflite:
    """`Format` of LiteRT's files, with float inputs and outputs.

    A file has the input shapes of the example with a batch size of 1, and the axes in PyTorch's order. Every static
    uint8 grid is stored as int8, with the zero point 128 less and the same values. Layers with quantized inputs and
    output run as int8 kernels, of XNNPACK where it supports them; the others run in float.

    Example:
        >>> Tflite().suffix, Tflite().refusal(Recipe("pt2e", "xnnpack"))
        ('.tflite', '')
    """

    name: ClassVar[str] = "tflite"
    suffix: ClassVar[str] = ".tflite"
    runtime: ClassVar[str] = "LiteRT"
    extra: ClassVar[str | None] = "litert"
    batch: ClassVar[int | None] = 1

    def require(self) -> None:
        """See `Format.require`. Nothing is imported: LiteRT's converter starts threads, which conflict with fork."""
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtraError(
                f"export={self.name!r} needs LiteRT ({', '.join(missing)}): pip install 'qat-lightning[litert]'."
            )

    def refusal(self, recipe: Recipe) -> str:
        """See `Format.refusal`."""
        if recipe.kind in DIRECT:
            return (
                f"LiteRT files need networks with static ranges, which kind={recipe.kind!r} does not have: use "
                "kind='static', or QuantizationAwareTraining(kind='qat')."
            )
        if recipe.target.own_grids:
            return (
                f"LiteRT files support grids defined by the scheme, and backend={recipe.backend!r} defines its own: "
                "use backend='xnnpack'."
            )
        if not recipe.scheme.weight_symmetric:
            return "LiteRT's int8 kernels need weights with zero point 0: use a scheme of weight_symmetric=True."
        return ""

    def write(self, source: Source, path: Path) -> None:
        """See `Format.write`."""
        self.require()
        graph_module, examples, dynamic = flat_graph(source)
        one = tuple(
            example[:1].contiguous() if axes and 0 in axes else example
            for example, axes in zip(examples, dynamic, strict=True)
        )
        without_transposed(graph_module)
        if source.quantized is not None:
            for_litert(graph_module)
        with tempfile.TemporaryDirectory(prefix="qat-lightning-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = Path(folder, "program.pt2")
            torch.export.save(torch.export.export(graph_module, one), str(program))
            _translate(program, path, self._ports(source))

    def ports(self, path: Path) -> tuple[Port, ...]:
        """See `Format.ports`."""
        return tflite_file.ports(path)

    def kernels(self, path: Path) -> Kernels | None:
        """See `Format.kernels`."""
        return tflite_file.kernels(path)

    def load(self, path: Path) -> Runner:
        """See `Format.load`. Uses as many threads as torch."""
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
        interpreter.allocate_tensors()
        details = {found["index"]: found for found in interpreter.get_tensor_details()}
        inputs, outputs = ([details[index] for index in indices] for indices in tflite_file.tensors(path))

        def run(tensors: list[Tensor]) -> list[Tensor]:
            for detail, tensor in zip(inputs, tensors, strict=True):
                interpreter.set_tensor(detail["index"], _given(tensor, detail))
            interpreter.invoke()
            return [_taken(interpreter.get_tensor(detail["index"]), detail) for detail in outputs]

        return run

    def _ports(self, source: Source) -> str:
        return "float" if source.quantized is None else "quantized"


class TfliteInt8(Tflite):
    """`Format` of LiteRT's files with int8 inputs and outputs, where the network quantizes them.

    Scale and zero point of each are in `ExportResult.ports`. If the artifact is called with float tensors, they are
    quantized outside the file, and outputs are dequantized; measured times include this.

    Example:
        >>> TfliteInt8().name, TfliteInt8().suffix
        ('tflite_int8', '.int8.tflite')
    """

    name: ClassVar[str] = "tflite_int8"
    suffix: ClassVar[str] = ".int8.tflite"

    def write(self, source: Source, path: Path) -> None:
        """See `Format.write`.

        Raises:
            ExportError: As in `Tflite`, or no input and no output is quantized.
        """
        super().write(source, path)
        if source.quantized is not None and not tflite_file.ports(path):
            path.unlink()
            raise ExportError(
                "No input and no output of the int8 network is on a grid, since its first and its last layers are "
                "float: quantize these, or use the format 'tflite'."
            )

    def _ports(self, source: Source) -> str:
        return "float" if source.quantized is None else "int8"


def _translate(program: Path, path: Path, ports: str) -> None:
    """Run `qat_lightning.export.tflite_convert` in a separate process."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "qat_lightning.export.tflite_convert", str(program), str(path), ports],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode == 0:
        return
    _, said, text = done.stderr.rpartition(SAID)
    how = text if said else f"its process ended with exit code {done.returncode}: {done.stderr[-_LENGTH:]}"
    raise ExportError(
        f"LiteRT cannot convert the network ({' '.join(how.split())[:_LENGTH]}). Rewrite that part with other ops, or "
        "choose another format, such as executorch, onnx or pt2."
    )


def _given(tensor: Tensor, detail: dict[str, Any]) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu().contiguous()
    scale, zero_point = detail["quantization"]
    if scale and tensor.is_floating_point():
        limits = np.iinfo(detail["dtype"])
        tensor = (torch.round(tensor.float() / scale) + zero_point).clamp(limits.min, limits.max)
    return tensor.numpy().astype(detail["dtype"], copy=False)


def _taken(array: np.ndarray[Any, Any], detail: dict[str, Any]) -> Tensor:
    tensor = torch.from_numpy(array)
    scale, zero_point = detail["quantization"]
    return (tensor.float() - zero_point) * scale if scale else tensor
