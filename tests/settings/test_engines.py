"""The quantized engine of the process, also on a CPU where oneDNN's kernels overflow."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch

from qat_lightning import Recipe, Scheme
from qat_lightning.settings import engines
from qat_lightning.settings.engines import engine_here, overflows, quantized_engine
from tests.support.exactness import SEVEN_BITS

X86 = platform.machine().lower() in ("x86_64", "amd64")

WITHOUT_VNNI = """
import copy, json, sys, unittest.mock, warnings
import torch
from torch import nn
from qat_lightning import Example, Recipe, Scheme, calibrate, convert, load_quantized, prepare
from qat_lightning.errors import QuantizationError
from qat_lightning.numerics.sqnr import sqnr_db

mode, said = sys.argv[1], []
warnings.showwarning = lambda message, *where, **more: said.append(str(message))
torch.manual_seed(0)
layers = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 1), nn.Flatten(), nn.Linear(1024, 8))
network = nn.Sequential(*layers)
images = torch.rand(8, 16, 8, 8)

def made(scheme):
    prepared = prepare(copy.deepcopy(network), Example((images,)), Recipe(mode, "x86", scheme, kind="static"))
    calibrate(prepared, [images])
    return prepared, convert(prepared, Example((images,)))

prepared, int8 = made(Scheme())
prepared.eval()
found = {
    "equal": sqnr_db(prepared(images), int8(images)),
    "float_layers": [row.name for row in int8.coverage if row.reason],
    "said": [line for line in said if "VNNI" in line],
}
int8.save("net.int8")
loaded = load_quantized("net.int8", network=network)
found["loaded"] = bool(torch.equal(loaded(images), int8(images)))
if mode != "pt2e":
    with unittest.mock.patch("qat_lightning.settings.engines.onednn_is_exact", lambda: True):
        try:
            made(Scheme())
        except QuantizationError as error:
            found["with_onednn"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.skipif(not X86, reason="only x86 CPUs have oneDNN kernels that overflow")
@pytest.mark.parametrize("mode", ["fx", pytest.param("eager", marks=pytest.mark.slow), "pt2e"])
def test_without_vnni_networks_for_x86_are_int8_and_exact(mode: str, tmp_path: Any) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", WITHOUT_VNNI, mode]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["equal"] > 45
    assert not found["float_layers"]
    assert found["loaded"]
    how = "Float ops compute" if mode == "pt2e" else "QNNPACK computes"
    assert found["said"][0].startswith("This CPU has no VNNI")
    assert f"{how} the same integers here instead: exactly" in found["said"][0]
    assert "choose backend='fbgemm'" in found["said"][0]
    if mode != "pt2e":
        assert "it differs from fake-quant" in found["with_onednn"], "oneDNN itself overflows here"


def test_weights_of_7_bits_never_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "onednn_is_exact", lambda: False)
    assert engine_here("onednn") == "qnnpack"
    assert [engine_here(name) for name in ("fbgemm", "qnnpack", None)] == ["fbgemm", "qnnpack", None]
    assert [overflows(torch.tensor([0, weight], dtype=torch.int8)) for weight in (-63, 64, 65, -127)] == [
        *(False, False),
        *(True, True),
    ]
    assert not overflows(torch.zeros(0, dtype=torch.int8))
    assert "QNNPACK" in Recipe("fx", "x86").detour
    assert "Float ops" in Recipe("pt2e", "x86").detour
    exact = [("fx", "fbgemm", Scheme()), ("pt2e", "xnnpack", Scheme()), ("pt2e", "x86", SEVEN_BITS)]
    assert not any(Recipe(*settings).detour for settings in exact)
    assert not Recipe("fx", "x86", kind="weight_only").detour, "float arithmetic"
    monkeypatch.setattr(engines, "onednn_is_exact", lambda: True)
    assert engine_here("onednn") == "onednn"
    assert not Recipe("fx", "x86").detour
    assert not overflows(torch.tensor([127], dtype=torch.int8))


def test_the_engine_of_the_process_is_restored_also_after_an_error() -> None:
    before = torch.backends.quantized.engine

    def fail() -> None:
        with quantized_engine("qnnpack"):
            assert torch.backends.quantized.engine == "qnnpack"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.backends.quantized.engine == before
