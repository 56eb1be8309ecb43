"""The errors of qat-lightning. Each message says what was wrong, where, and what to do instead."""

from __future__ import annotations

from collections.abc import Sequence

from qat_lightning.checks import LayerCheck


class QuantizationError(Exception):
    """Base of every error that qat-lightning raises on purpose."""


class ConfigurationError(QuantizationError, ValueError):
    """A setting is invalid."""


class CombinationError(ConfigurationError):
    """Settings that are valid alone cannot be combined. A sweep skips such a trial and lists it."""


class NetworkError(QuantizationError):
    """The network to quantize cannot be found in the LightningModule, or cannot be run on an example."""


class TraceError(QuantizationError):
    """The network cannot be captured as a graph in the chosen mode."""


class ConversionError(QuantizationError):
    """A prepared network cannot be converted to int8."""


class VerificationError(ConversionError):
    """The int8 network does not compute what fake-quant computed in training.

    Args:
        message: What was found, and what to do.
        layers: Names of the layers at fault.
        checks: The comparison of each layer.

    Attributes:
        layers: Names of the layers at fault as in ``named_modules`` of the float network, worst first. For an op in a
            graph its name, then those of the nearest layers before it. If only the network as a whole is at fault, the
            layers where the difference begins.
        checks: A `LayerCheck` for each layer that was compared.
    """

    def __init__(self, message: str, layers: Sequence[str] = (), checks: Sequence[LayerCheck] = ()) -> None:
        super().__init__(message)
        self.layers = tuple(layers)
        self.checks = tuple(checks)


class CheckpointMismatchError(QuantizationError):
    """A checkpoint was written by a run with another mode, backend, scheme or module set."""


class MissingExtraError(QuantizationError, ImportError):
    """An optional dependency is needed and not installed."""


class ArtifactError(QuantizationError):
    """An int8 file cannot be written, or cannot be read by this release."""


class ExportError(QuantizationError):
    """An int8 network cannot be exported to a format, or its runtime rejects the file."""


class CheckpointFileError(QuantizationError, OSError):
    """A checkpoint file cannot be read, or is not a checkpoint."""


class RunFileError(QuantizationError, OSError):
    """The files of a run cannot be found or read."""
