"""Layers with integer weights that need no calibration: kinds dynamic and weight_only."""

from qat_lightning.layers.integer.integer_layer import IntegerLayer
from qat_lightning.layers.integer.make import integer_layer, lacks_kernel, why_not
from qat_lightning.layers.integer.weights import WeightGrid

__all__ = ["IntegerLayer", "WeightGrid", "integer_layer", "lacks_kernel", "why_not"]
