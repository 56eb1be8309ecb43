"""The errors of qat-lightning: each says what was wrong, where, and what to type instead."""

from __future__ import annotations

from collections.abc import Sequence

from qat_lightning.checks import LayerCheck


class QuantizationError(Exception):
    """Base of every error that qat-lightning raises on purpose."""


class ConfigurationError(QuantizationError, ValueError):
    """A setting, or a combination of settings, is not possible."""


class CombinationError(ConfigurationError):
    """Settings that are possible by themselves do not go together; a sweep skips such a trial and lists it."""


class NetworkError(QuantizationError):
    """The network to quantize cannot be found in the LightningModule, or cannot be run on an example."""


class TraceError(QuantizationError):
    """The network cannot be captured as a graph in the chosen mode."""


class ConversionError(QuantizationError):
    """A prepared network cannot be turned into an int8 network."""


class VerificationError(ConversionError):
    """The int8 network does not compute what fake-quant computed in training.

    Args:
        message: What was found, and what to do.
        layers: See below.
        checks: See below.

    Attributes:
        layers: Names in the float network, as ``named_modules`` has them, worst first: the layers at fault; of an op in
            a graph its name, then those of the nearest layers that feed it; if only the network as a whole is at fault,
            the layers where the difference begins.
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
    """A file of an int8 network cannot be written, or is not one that this release reads."""


class ExportError(QuantizationError):
    """An int8 network does not go into a format, or its runtime does not take what was written."""


class CheckpointFileError(QuantizationError, OSError):
    """The file of a checkpoint cannot be read, or is none."""


class RunFileError(QuantizationError, OSError):
    """What a run left behind cannot be found or read."""
