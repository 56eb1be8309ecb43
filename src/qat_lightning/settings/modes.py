"""What is known of a mode without its code: one table, which everything asks that is not a mode."""

from __future__ import annotations

from dataclasses import dataclass

from qat_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class ModeTraits:
    """What a mode does with a network.

    Attributes:
        captures: Whether it captures a graph of ``forward``, which then runs instead of the user's code: the same way
            through the network in every process, whatever the values are.
        replaces: Whether it puts layers of its own in the place of the user's.
        packs: Whether its static int8 layers hold weights packed for a kernel of torch's quantized engine: they do not
            pickle, and are part of a TorchScript file.
        instead_of: The mode in whose place ``mode="auto"`` tries it, where that refuses the network.
        compiles: Whether a training step can be one graph of ``torch.compile``.
        exports: Whether its int8 networks go into the formats of `qat_lightning.export`.
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
    # As long as it is not decided, a graph may be captured.
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
