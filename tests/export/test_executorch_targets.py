"""Files of ExecuTorch for each target with a partitioner, run if the runtime is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qat_lightning import export_quantized
from qat_lightning.errors import CombinationError
from qat_lightning.export.executorch import not_delegated
from qat_lightning.export.executorch_targets import LOWERINGS
from qat_lightning.export.formats import check_formats, stand_in
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.backends import BACKENDS
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.networks import CASES, train
from tests.support.targets import skipped_without

pytest.importorskip("executorch")

DEPTHWISE = next(case for case in CASES if case.name == "depthwise")
TARGETS = [
    pytest.param(name, bits, id=f"{name}-{bits}", marks=skipped_without(name))
    for name in LOWERINGS
    for bits in BACKENDS[name].activation_bits
    if (name, bits) != ("xnnpack", 8)
]
OUTSIDE = {
    "openvino": set(),
    "tosa": {"quantized_decomposed::quantize_per_tensor", "quantized_decomposed::dequantize_per_tensor"},
    "ethosu": {"quantized_decomposed::quantize_per_tensor", "quantized_decomposed::dequantize_per_tensor"},
    "vgf": set(),
    "vulkan": {"aten::mean"},
}
"""What runs outside of each delegate; Cortex-M has none, and kernels of its own."""


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "bits"), TARGETS)
def test_a_file_is_written_and_compared(backend: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    args, kwargs, _ = DEPTHWISE.batch(8)
    recipe = Recipe("pt2e", backend, Scheme(activation_bits=bits))
    prepared = get_mode("pt2e").prepare(DEPTHWISE.network(), Example(args, kwargs), recipe)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    train(prepared, DEPTHWISE, steps=10)
    args, kwargs, _ = DEPTHWISE.batch(64)
    (result,) = export_quantized(prepared, tmp_path, ["executorch"], example=Example(args, kwargs))
    assert result.passed, result.error
    assert result.agreement is not None
    assert result.agreement >= 0.995
    if stand_in("executorch", recipe):
        assert f"no runtime for backend='{backend}' files is available here" in result.remark
    else:
        assert result.latency_ms > 0
    assert isinstance(result.path, Path)
    outside = {name.partition(".")[0] for name in not_delegated(result.path)}
    if backend in OUTSIDE:
        assert outside <= OUTSIDE[backend]
    else:
        assert {"cortex_m::quantized_conv2d", "cortex_m::quantized_linear"} <= outside


@pytest.mark.parametrize("backend", ["tosa", "ethosu", "vgf"])
def test_what_openvino_computes_wrongly_is_refused(backend: str) -> None:
    with pytest.raises(CombinationError, match="int32 biases"):
        check_formats(["openvino"], Recipe("pt2e", backend))


def test_16_bits_are_refused_where_files_have_8() -> None:
    with pytest.raises(CombinationError, match="these have 16: use executorch"):
        check_formats(["onnx"], Recipe("pt2e", "tosa", Scheme(activation_bits=16)))
