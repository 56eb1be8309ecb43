"""From a prepared network to the int8 network that is shipped."""

from __future__ import annotations

from torch import nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.export.plain_tensors import in_its_runtime
from qat_lightning.graph.example import Example
from qat_lightning.modes.left_float import leaving_float
from qat_lightning.modes.prepared import prepared_state
from qat_lightning.rehearsal.faults import convert_what_can_be


def int8_of(prepared: nn.Module, example: Example, source: str) -> QuantizedNetwork:
    """Convert a prepared network to int8 and verify it, in the runtime of its recipe.

    Args:
        prepared: A prepared network; layers that cannot be int8 are left float in it too.
        example: A real call, on which it is verified.
        source: Where its weights are from, in words.

    Raises:
        ConversionError: Conversion fails even with all layers float.
        NetworkError: No layer can be int8.
    """
    conversion = convert_what_can_be(prepared, example)
    state = prepared_state(prepared)
    recipe = leaving_float(state.recipe, state.left_float, state.prefix)
    return in_its_runtime(QuantizedNetwork(conversion.converted, recipe, example, source=source))
