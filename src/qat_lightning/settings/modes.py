"""Properties of modes that are needed without importing their code, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from qat_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class ModeTraits:
    """What a mode does with a network.

    Attributes:
        captures: Whether it captures a graph of ``forward``, which then runs instead of the user's code: always the
            same path through the network, in every process and for all values.
        replaces: Whether it replaces the user's layers with its own.
        packs: Whether its static int8 layers hold weights packed for a kernel of torch's quantized engine: they cannot
            be pickled, and are part of a TorchScript file.
        instead_of: The mode as whose fallback ``mode="auto"`` tries it.
        compiles: Whether ``torch.compile`` can compile a training step to one graph.
        exports: Whether its int8 networks can be exported to the formats of `qat_lightning.export`.
    """

    captures: bool
    replaces: bool
    packs: bool
    instead_of: str = ""
    compiles: bool = True
    exports: bool = True


_TRAITS = {
    "eager": ModeTraits(captures=False, replaces=False, packs=True),
    "fx": ModeTraits(captures=True, replaces=True, packs=True),
    "pt2e": ModeTraits(captures=True, replaces=True, packs=False),
    # Until the mode is decided, a graph may be captured.
    "auto": ModeTraits(captures=True, replaces=True, packs=True),
    "parts": ModeTraits(captures=False, replaces=True, packs=True, instead_of="fx", compiles=False, exports=False),
}


def traits_of(mode: str) -> ModeTraits:
    """The row of a mode.

    Raises:
        ConfigurationError: There is no such mode.

    Example:
        >>> traits_of("eager").captures, traits_of("pt2e").packs
        (False, False)
    """
    if mode not in _TRAITS:
        raise ConfigurationError(f"mode={mode!r} is unknown: use one of {', '.join(_TRAITS)}.")
    return _TRAITS[mode]
