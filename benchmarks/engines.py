"""The engines of `benchmarks.latency`, ours and other tools': each returns a function that runs a batch of images.

Networks have random weights and BatchNorm statistics of random batches, and are calibrated on the same random images;
kernel times depend on neither. Other tools are used as their documentation shows for server CPUs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import NETWORKS

Run = Callable[[Tensor], Any]
_KEPT = tempfile.TemporaryDirectory()
FOLDER = Path(_KEPT.name)
"""Folder for this process's files; those of int8 networks begin with ``int8``."""

SIDE = 224
CALIBRATION_BATCHES = 4


def images(batch: int, seed: int = 0) -> Tensor:
    """Return random images, float32, of shape (batch, 3, `SIDE`, `SIDE`)."""
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def calibration() -> list[Tensor]:
    """Return the calibration batches of all int8 engines."""
    return [images(8, seed) for seed in range(1, 1 + CALIBRATION_BATCHES)]


def network(name: str) -> nn.Module:
    """Return the float network in evaluation mode, with BatchNorm statistics that keep activations in range."""
    torch.manual_seed(0)
    made = NETWORKS[name]().train()
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # cumulative average over batches
            module.reset_running_stats()
    with torch.no_grad():
        for batch in calibration():
            made(batch)
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1
    return made.eval()


# Ours


def int8_network(name: str, mode: str, backend: str, runtime: Any = None) -> Any:
    """Return our int8 network, calibrated."""
    from qat_lightning.artifact.quantized import QuantizedNetwork
    from qat_lightning.export.plain_tensors import in_its_runtime
    from qat_lightning.graph.example import Example
    from qat_lightning.modes.prepared import cpu_copy, observe_in_evaluation, set_phase
    from qat_lightning.modes.registry import get_mode
    from qat_lightning.settings.recipe import Recipe

    flow, recipe, example = get_mode(mode), Recipe(mode, backend, runtime=runtime), Example((images(4),))
    prepared = flow.prepare(network(name), example, recipe).eval()
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=True)
    observe_in_evaluation(prepared, True)
    with torch.no_grad():
        for batch in calibration():
            prepared(batch)
    return in_its_runtime(QuantizedNetwork(flow.convert(cpu_copy(prepared), example), recipe, example))


def fp32_eager(name: str) -> Run:
    """Return PyTorch's float network, the baseline of every ratio."""
    return network(name)


def int8_module(mode: str, runtime: Any = None, backend: str = "x86") -> Callable[[str], Run]:
    """Return our int8 module, as `trainer.test` runs it."""

    def make(name: str) -> Run:
        int8 = int8_network(name, mode, backend, runtime)
        int8(images(2))
        return int8

    return make


def artifact(format_name: str, mode: str, backend: str = "x86") -> Callable[[str], Run]:
    """Return our int8 network as a file of this format, run by its runtime."""

    def make(name: str) -> Run:
        from qat_lightning.export import get_format
        from qat_lightning.export.protocol import Source

        chosen, path = get_format(format_name), FOLDER / f"int8{get_format(format_name).suffix}"
        int8 = int8_network(name, mode, backend)
        chosen.write(Source(int8, int8.example), path)
        run = chosen.load(path)
        if chosen.batch is None:
            return lambda batch: run([batch])
        return lambda batch: [run([one]) for one in batch.split(chosen.batch)]

    return make


# Peers


def _onnx(name: str) -> Path:
    path = FOLDER / "float.onnx"
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.onnx.export(
        network(name), (images(2),), dynamo=True, dynamic_shapes=dynamic, input_names=["x"], verbose=False
    )
    program.save(str(path))
    return path


def _ort(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    return lambda batch: session.run(None, {given: batch.numpy()})


def ort_fp32(name: str) -> Run:
    """Return ONNX Runtime with the float network."""
    return _ort(_onnx(name))


def ort_static(layout: str) -> Callable[[str], Run]:
    """Return ONNX Runtime's own static quantization, after its pre-processing: uint8 activations, int8 per channel.

    Args:
        layout: ``"QDQ"`` or ``"QOperator"``.
    """

    def make(name: str) -> Run:
        from onnxruntime import quantization as ort
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(ort.CalibrationDataReader):
            def __init__(self) -> None:
                self.batches = iter(calibration())

            def get_next(self) -> dict[str, Any] | None:
                batch = next(self.batches, None)
                return None if batch is None else {"x": batch.numpy()}

        ready, int8 = FOLDER / "ready.onnx", FOLDER / "int8.onnx"
        quant_pre_process(str(_onnx(name)), str(ready))
        ort.quantize_static(
            str(ready),
            str(int8),
            Reader(),
            quant_format=ort.QuantFormat[layout],
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
        )
        return _ort(int8)

    return make


def _openvino(model: Any) -> Run:
    import openvino

    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled: dict[int, Any] = {}

    def run(batch: Tensor) -> Any:
        if len(batch) not in compiled:  # fixed shapes are faster, and are used for our files too
            fixed = model.clone()
            fixed.reshape([len(batch), 3, SIDE, SIDE])
            compiled[len(batch)] = core.compile_model(fixed, "CPU", settings).create_infer_request()
        return compiled[len(batch)].infer([batch.numpy()])

    return run


def _openvino_float(name: str) -> Any:
    import openvino

    return openvino.convert_model(network(name), example_input=images(2), input=[-1, 3, SIDE, SIDE])


def openvino_fp32(name: str) -> Run:
    """Return OpenVINO with the float network."""
    return _openvino(_openvino_float(name))


def openvino_nncf(name: str) -> Run:
    """Return NNCF's post-training quantization of the OpenVINO model."""
    import nncf
    import openvino

    model_type = nncf.ModelType.TRANSFORMER if "vit" in name else None
    data = nncf.Dataset([batch.numpy() for batch in calibration()])
    int8 = nncf.quantize(_openvino_float(name), data, model_type=model_type)
    openvino.save_model(int8, str(FOLDER / "int8.xml"))
    return _openvino(int8)


@dataclass(frozen=True)
class Engine:
    """One row of the table.

    Attributes:
        make: Creates the engine for a network name.
        whose: ``"base"``, ``"ours"`` or ``"peer"``.
        int8: Whether it is compared with int8 engines.
        needs: Packages to install.
    """

    make: Callable[[str], Run]
    whose: str
    int8: bool = True
    needs: str = ""


ENGINES = {
    "fp32 eager": Engine(fp32_eager, "base", int8=False),
    "int8 fx": Engine(int8_module("fx"), "ours"),
    "int8 eager": Engine(int8_module("eager"), "ours"),
    "int8 fx, fbgemm": Engine(int8_module("fx", backend="fbgemm"), "ours"),
    "int8 eager, fbgemm": Engine(int8_module("eager", backend="fbgemm"), "ours"),
    "int8 pt2e (pt2)": Engine(int8_module("pt2e"), "ours"),
    "int8 fx, plain": Engine(int8_module("fx", "plain"), "ours"),
    "int8 pt2e, plain": Engine(int8_module("pt2e", "plain"), "ours"),
    "torchscript (fx)": Engine(artifact("torchscript", "fx"), "ours"),
    "torchscript (eager)": Engine(artifact("torchscript", "eager"), "ours"),
    "torchscript (fx, fbgemm)": Engine(artifact("torchscript", "fx", "fbgemm"), "ours"),
    "onnx (fx, fbgemm)": Engine(artifact("onnx", "fx", "fbgemm"), "ours", needs="onnx onnxscript onnxruntime"),
    "openvino (fx, fbgemm)": Engine(artifact("openvino", "fx", "fbgemm"), "ours", needs="openvino onnx onnxscript"),
    "executorch (pt2e, xnnpack)": Engine(artifact("executorch", "pt2e", "xnnpack"), "ours", needs="executorch"),
    "tflite (fx)": Engine(artifact("tflite", "fx"), "ours", needs="litert-torch"),
    "tflite (pt2e, xnnpack)": Engine(artifact("tflite", "pt2e", "xnnpack"), "ours", needs="litert-torch"),
    "onnx (fx)": Engine(artifact("onnx", "fx"), "ours", needs="onnx onnxscript onnxruntime"),
    "onnx (pt2e)": Engine(artifact("onnx", "pt2e"), "ours", needs="onnx onnxscript onnxruntime"),
    "openvino (fx)": Engine(artifact("openvino", "fx"), "ours", needs="openvino onnx onnxscript"),
    "openvino (pt2e)": Engine(artifact("openvino", "pt2e"), "ours", needs="openvino onnx onnxscript"),
    "openvino (pt2e, openvino)": Engine(
        artifact("openvino", "pt2e", "openvino"), "ours", needs="openvino onnx onnxscript executorch nncf"
    ),
    "ONNX Runtime fp32": Engine(ort_fp32, "peer", int8=False, needs="onnx onnxscript onnxruntime"),
    "ONNX Runtime static PTQ, QDQ": Engine(ort_static("QDQ"), "peer", needs="onnx onnxscript onnxruntime"),
    "ONNX Runtime static PTQ, QOperator": Engine(ort_static("QOperator"), "peer", needs="onnx onnxscript onnxruntime"),
    "OpenVINO fp32": Engine(openvino_fp32, "peer", int8=False, needs="openvino"),
    "NNCF int8, OpenVINO": Engine(openvino_nncf, "peer", needs="openvino nncf"),
}
