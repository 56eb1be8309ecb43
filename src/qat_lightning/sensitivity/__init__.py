"""Which layers quantization hurts, and which to leave float within a budget."""

from qat_lightning.sensitivity.budget import Budget, MixedPrecision
from qat_lightning.sensitivity.measured import LayerSensitivity, Sensitivity, sensitivity

__all__ = ["Budget", "LayerSensitivity", "MixedPrecision", "Sensitivity", "sensitivity"]
