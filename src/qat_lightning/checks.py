"""Results of comparing an int8 network with its fake-quantized one."""

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
        chance_db: SQNR of the layer against itself when its inputs are disturbed by a millionth, where that was
            measured; otherwise inf.
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

    A deep network can amplify a difference in the last bit of a float to several decibels. So where the two differ,
    fake-quant is also compared with itself, its values disturbed by a millionth: a correct network cannot do better.

    Attributes:
        sqnr_db: SQNR of int8 against fake-quant, for the output that differs most from what the draws explain. For an
            integer output, such as classes, the share of values that differ takes the place of the noise.
        draws: SQNR of fake-quant against its own disturbed runs, for the same output; empty if it was not needed.
        output: Which output that is, as a Python expression appended to the result; empty if there is only one.
        enough_db: SQNR from which on the network counts as correct, whatever the draws are.
    """

    sqnr_db: float
    draws: tuple[float, ...] = ()
    output: str = ""
    enough_db: float = field(default=50.0, repr=False, compare=False)
