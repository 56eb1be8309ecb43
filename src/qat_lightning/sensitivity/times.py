"""Latency that a float layer adds to an int8 network: the difference between two converted networks."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.graph.example import Example
from qat_lightning.graph.signature import one_sample
from qat_lightning.measure.metrics import latency_interleaved
from qat_lightning.modes.left_float import leave_float
from qat_lightning.modes.prepared import cpu_copy, prepared_state
from qat_lightning.rehearsal.faults import convert_what_can_be


def float_times(
    prepared: nn.Module, reference: QuantizedNetwork, names: Collection[str], example: Example
) -> dict[str, float]:
    """For each layer, convert the network again with that layer float, and time both networks alternately.

    The layer's own latency would not be enough: around a float layer values are dequantized and quantized again, and
    what is one int8 kernel, such as a layer with its activation function, becomes two.

    Args:
        prepared: The network, prepared and calibrated; copies of it are converted.
        reference: Its int8 network.
        names: The layers.
        example: One call; a single sample of it is timed.

    Returns:
        For each layer the milliseconds that it adds if it is float; negative if float is faster, and 0 for a layer that
        is float in both.
    """
    one = one_sample(example)
    found = {}
    for name in names:
        copied = cpu_copy(prepared)
        if not leave_float(copied, {name: "timed in float"}, example):
            found[name] = 0.0
            continue
        converted = convert_what_can_be(copied, example).converted
        other = QuantizedNetwork(converted, prepared_state(prepared).recipe, example)
        latencies = latency_interleaved({"int8": reference, "float": other}, one.args, one.kwargs)
        found[name] = latencies["float"].median_ms - latencies["int8"].median_ms
    return found
