"""A process that translates an exported program: ``python -m qat_lightning.export.tflite_convert program file ports``.

LiteRT's converter brings JAX, whose threads a process that starts data loaders by fork must not have, prints what it
does, and changes torch's logging. So it has a process of its own, which ends with the file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.ao.quantization.fx._decomposed

from qat_lightning.export.tflite_rewrites import finished

SAID = "LiteRT said: "
"""Stands in front of why there is no file, at the end of what the process writes to its standard error."""

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
"""Of this process: no device is looked for."""


def translate(program: Path, path: Path, ports: str) -> None:
    """Write the file.

    Args:
        program: A file of ``torch.export.save``.
        path: The file to write.
        ports: ``"float"``: a float network; ``"quantized"``: an int8 network with float inputs and outputs;
            ``"int8"``: one whose inputs and outputs are int8, where they are on a grid.
    """
    import litert_torch
    from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
    from litert_torch.quantize.quant_config import QuantConfig

    exported = torch.export.load(str(program))
    config = None
    if ports != "float":
        # Not used to quantize, only to say that the pairs in the graph are to become int8 kernels.
        config = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))
    args, _ = exported.example_inputs
    made = litert_torch.convert(exported.module(check_guards=False), args, quant_config=config)
    content = made.model_content()
    path.write_bytes(content if ports == "float" else finished(content, float_ports=ports == "quantized"))


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    try:
        translate(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    except Exception as error:  # noqa: BLE001 (whatever it is, the process that waits says it)
        sys.exit(f"{SAID}{type(error).__name__}: {error}")
