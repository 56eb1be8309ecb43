"""The file of an int8 network."""

from qat_lightning.artifact.file import (
    artifact_bytes,
    artifact_size_mb,
    load_quantized,
    quantized_from_bytes,
    save_quantized,
)

__all__ = ["artifact_bytes", "artifact_size_mb", "load_quantized", "quantized_from_bytes", "save_quantized"]
