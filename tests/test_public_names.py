"""The package's public names, and the cost of importing them."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import qat_lightning


@pytest.mark.parametrize("name", qat_lightning.__all__)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(qat_lightning, name)
    assert callable(value)
    assert inspect.getdoc(value)


def test_sensitivity_is_callable_whichever_was_imported_first() -> None:
    import qat_lightning.sensitivity.measured as module

    wanted = inspect.signature(module.sensitivity)
    assert inspect.signature(qat_lightning.sensitivity) == wanted


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Quantizer'"):
        _ = qat_lightning.Quantizer


PROGRAM = """
import sys, time
import lightning.pytorch
import torch.ao.quantization  # what torch itself has of it
began = time.process_time()
from qat_lightning import QuantizationAwareTraining
QuantizationAwareTraining()
print(time.process_time() - began)
print([name for name in sys.modules if name.split(".")[0] in ("torchao", "executorch", "onnx", "openvino")])
print([name for name in sys.modules if name.startswith("qat_lightning.modes.pt2e")])
"""


def test_a_callback_costs_no_import_of_a_mode_that_is_not_used() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    seconds, others, modes = done.stdout.strip().splitlines()[-3:]
    assert (others, modes) == ("[]", "[]")
    assert float(seconds) < 3.0, "seconds of CPU, of which one was measured on a quiet machine"
