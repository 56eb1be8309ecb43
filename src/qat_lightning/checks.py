"""What comparing an int8 network with its fake-quantized one finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerCheck:
    """How well one int8 layer reproduces fake-quant, when fed fake-quant's own input.

    Attributes:
        name: The layer, as the float network names it.
        op: The backend's op that ran.
        sqnr_db: Signal to quantization noise ratio in dB; inf if equal.
        max_steps: Largest difference, in steps of the output's grid; nan for a float output.
        fault: What is wrong with it, in words; empty if its differences are roundings.
        chance_db: What disturbing its inputs by a millionth does to it, where that was asked; inf where not.
    """

    name: str
    op: str
    sqnr_db: float
    max_steps: float = math.nan
    fault: str = ""
    chance_db: float = field(default=math.inf, repr=False, compare=False)


@dataclass(frozen=True)
class WholeCheck:
    """How well the int8 network as a whole reproduces fake-quant on the example.

    A deep network can turn a difference in the last bit of a float into decibels. So where the two differ, fake-quant
    is compared with itself as well, its values disturbed by a millionth: no right network does better than that.

    Attributes:
        sqnr_db: Of int8 against fake-quant, for the output that is farthest from what the draws explain. Of an output
            of integers, such as classes, what is in the place of noise is the share of its values that differ.
        draws: Of fake-quant against itself, disturbed, for the same output; empty if that was not needed.
        output: Which one that is, as Python would write it behind the result; empty if there is only one.
        enough_db: From where on it is right, whatever the draws are.
    """

    sqnr_db: float
    draws: tuple[float, ...] = ()
    output: str = ""
    enough_db: float = field(default=50.0, repr=False, compare=False)
