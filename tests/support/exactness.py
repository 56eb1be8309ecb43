"""What int8 kernels reach on this CPU. QNNPACK, which runs where oneDNN overflows, rounds biases to integers."""

from __future__ import annotations

import pytest

from qat_lightning import Scheme
from qat_lightning.settings.engines import onednn_is_exact

EXACT = "x86" if onednn_is_exact() else "fbgemm"
"""A backend whose kernels compute the integers of fake-quant here."""

X86_LEAST_DB = 60.0 if onednn_is_exact() else 40.0
"""Least SQNR of a layer for x86: QNNPACK is a step off in single values, which a small output shows."""

SEVEN_BITS = Scheme(weight_bits=7)
"""Weights that every runtime multiplies exactly on every x86 CPU."""

needs_onednn = pytest.mark.skipif(not onednn_is_exact(), reason="kernels for 8-bit weights overflow on this CPU")
