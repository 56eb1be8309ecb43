"""Networks of backend ``tensorrt`` as ONNX files in TensorRT: ``python -m benchmarks.tensorrt --network resnet18``.

Two engines are built from files that this library wrote: the int8 network, and the float network that it was made from.
They alternate, round after round, on batches that stay on the GPU. Needs a GPU, and ``pip install tensorrt onnx onnx-ir
onnxscript``. Engines use the types in the file (strongly typed networks): the float engine runs in float32, for which
TensorRT may use TF32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines import FOLDER, images, int8_network, network
from benchmarks.machine import describe
from benchmarks.networks import NETWORKS


class Engine:
    """An ONNX file with one input and one output, run by TensorRT.

    Args:
        path: The file.
        batch: The batch size that it is built for.

    Raises:
        ImportError: TensorRT is not installed.
        RuntimeError: TensorRT cannot read the file, or cannot build an engine of it.
    """

    def __init__(self, path: Path, batch: int) -> None:
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        graph = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(graph, logger)
        if not parser.parse_from_file(str(path)):
            errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
            raise RuntimeError(f"TensorRT cannot read the file: {errors}")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        shape = (batch, *tuple(graph.get_input(0).shape)[1:])
        profile.set_shape(graph.get_input(0).name, shape, shape, shape)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(graph, config)
        if plan is None:
            raise RuntimeError("TensorRT cannot build an engine of the file; its log has the reason")
        self.names = graph.get_input(0).name, graph.get_output(0).name
        self.runtime = trt.Runtime(logger)  # must live as long as the engine
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()

    def __call__(self, batch: Tensor) -> Tensor:
        """Return float32 outputs for a batch on the GPU."""
        given, made = self.names
        self.context.set_input_shape(given, tuple(batch.shape))
        output = torch.empty(tuple(self.context.get_tensor_shape(made)), device=batch.device)
        self.context.set_tensor_address(given, batch.data_ptr())
        self.context.set_tensor_address(made, output.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT did not run the engine; its log has the reason")
        torch.cuda.synchronize()
        return output


def files(name: str) -> tuple[Any, Path, Path]:
    """Return the int8 network of backend ``tensorrt``, its ONNX file, and that of the float network."""
    from qat_lightning.export import get_format
    from qat_lightning.export.protocol import Source

    int8, onnx = int8_network(name, "pt2e", "tensorrt"), get_format("onnx")
    paths = FOLDER / f"{name}_int8.onnx", FOLDER / f"{name}_float.onnx"
    onnx.write(Source(int8, int8.example), paths[0])
    onnx.write(Source(network(name), int8.example, int8.recipe), paths[1])
    return int8, *paths


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Return times of both engines in ms, and the int8 engine's SQNR in dB relative to the int8 network."""
    from qat_lightning.numerics.sqnr import sqnr_db

    int8, quantized, plain = files(name)
    given = images(batch)
    engines = {"int8": Engine(quantized, batch), "float": Engine(plain, batch)}
    on_gpu = given.cuda()
    with torch.no_grad():
        close = sqnr_db(int8(given), engines["int8"](on_gpu).cpu())
    times: dict[str, list[float]] = {key: [] for key in engines}
    for index in range(rounds + 3):
        for key, engine in engines.items():
            begin = time.perf_counter()
            engine(on_gpu)
            if index >= 3:
                times[key].append(1e3 * (time.perf_counter() - begin))
    return {"sqnr_db": close, **times}


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="resnet18", choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    found = measure(options.network, options.batch, options.rounds)
    medians = {key: statistics.median(found[key]) for key in ("int8", "float")}
    print(f"{describe()}; {torch.cuda.get_device_name()}")
    print("result", json.dumps({"sqnr_db": found["sqnr_db"], **medians}))


if __name__ == "__main__":
    main()
