"""The file format of int8 networks."""

from qat_lightning.artifact.read import load_quantized, quantized_from_bytes
from qat_lightning.artifact.write import artifact_bytes, artifact_size_mb, save_quantized

__all__ = ["artifact_bytes", "artifact_size_mb", "load_quantized", "quantized_from_bytes", "save_quantized"]
