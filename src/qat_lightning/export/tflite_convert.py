"""A process that converts an exported program: ``python -m qat_lightning.export.tflite_convert program file ports``.

LiteRT's converter imports JAX, whose threads conflict with data loaders started by fork, prints its progress, and
changes torch's logging. It therefore runs in a separate process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.ao.quantization.fx._decomposed

from qat_lightning.export.tflite_rewrites import finished

SAID = "LiteRT said: "
"""Precedes the reason for a failure at the end of the process's standard error."""

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
"""Environment of this process: JAX does not look for devices."""


def translate(program: Path, path: Path, ports: str) -> None:
    """Write the file.

    Args:
        program: A file of ``torch.export.save``.
        path: The file to write.
        ports: ``"float"``: a float network; ``"quantized"``: an int8 network with float inputs and outputs;
            ``"int8"``: one with int8 inputs and outputs, where they are quantized.
    """
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    exported = torch.export.load(str(program))
    config = None
    if ports != "float":
        # Quantizes nothing; it tells the converter to turn the pairs in the graph into int8 kernels.
        config = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))
    args, _ = exported.example_inputs
    made = litert_torch.convert(exported.module(check_guards=False), args, quant_config=config)
    content = made.model_content()
    path.write_bytes(content if ports == "float" else finished(content, float_ports=ports == "quantized"))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    try:
        translate(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except Exception as error:  # noqa: BLE001 (any failure is reported to the waiting process)
        sys.exit(f"{SAID}{type(error).__name__}: {error}")
