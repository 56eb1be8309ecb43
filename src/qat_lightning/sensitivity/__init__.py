"""Which layers quantization hurts, and which to leave float within a budget."""

import sys
from types import ModuleType

from qat_lightning.sensitivity.bit_choice import BitChoice, BitLimits, LayerBits, Measured
from qat_lightning.sensitivity.bits import bits_within
from qat_lightning.sensitivity.budget import Budget, MixedPrecision
from qat_lightning.sensitivity.choice import Cost, Limits, choose
from qat_lightning.sensitivity.measured import LayerSensitivity, Sensitivity, sensitivity

__all__ = [
    "BitChoice",
    "BitLimits",
    "Budget",
    "Cost",
    "LayerBits",
    "LayerSensitivity",
    "Limits",
    "Measured",
    "MixedPrecision",
    "Sensitivity",
    "bits_within",
    "choose",
    "sensitivity",
]


class _CallablePackage(ModuleType):
    """``qat_lightning.sensitivity`` is this package once it is imported, and the function of that name to its users."""

    __call__ = staticmethod(sensitivity)
    __wrapped__ = staticmethod(sensitivity)


sys.modules[__name__].__class__ = _CallablePackage
