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


def first_line(said: object, limit: int = 160) -> str:
    r"""Return the first line of a message or of an error's message, shortened to ``limit`` characters.

    For an error without a message it is the error's type.

    Example:
        >>> first_line("cannot trace\nGraphModule(...)"), first_line(KeyError())
        ('cannot trace', 'KeyError')
    """
    lines = str(said).strip().splitlines()
    line = lines[0] if lines else type(said).__name__ if isinstance(said, BaseException) else ""
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def in_brief(error: BaseException) -> str:
    r"""Return the type of an error and the first line of its message.

    Example:
        >>> in_brief(ValueError("bad shape\nin layer 3")), in_brief(KeyError())
        ('ValueError: bad shape', 'KeyError')
    """
    return _with_type(error, first_line(error, limit=200))


def in_full(error: BaseException, limit: int = 300) -> str:
    r"""Return the type of an error and its message in one line, shortened to ``limit`` characters.

    Example:
        >>> in_full(ValueError("bad shape\nin layer 3"))
        'ValueError: bad shape in layer 3'
    """
    return _with_type(error, first_line(" ".join(str(error).split()), limit))


def _with_type(error: BaseException, said: str) -> str:
    return f"{type(error).__name__}: {said}" if str(error).strip() else type(error).__name__
