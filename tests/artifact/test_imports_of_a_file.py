"""A process that only loads and runs a file imports torch and the code that runs the network, and no other package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_lightning.artifact.frozen import CALLS_BEFORE
from tests.artifact.making import quantize
from tests.support.exactness import SEVEN_BITS

NETWORK = "nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))"
PROGRAM = f"""
import sys
import torch
from torch import nn
from qat_lightning import load_quantized
path, mode = sys.argv[1:]
network = {NETWORK} if mode == "eager" else None
quantized = load_quantized(path, network=network)
for _ in range({CALLS_BEFORE + 2}):
    quantized(torch.zeros(2, 3, 8, 8))
kept = list(quantized._frozen._made.values())
print("recorded", len(kept), kept[0] is not None)
heavy = ("lightning", "torchao", "transformers", "sympy", "torch._dynamo", "torch._inductor", "torch.onnx", "scipy")
print("imported", [name for name in heavy if name in sys.modules])
"""
COMPILES = """
import sys
import torch
from qat_lightning import load_quantized
quantized = load_quantized(sys.argv[1])
x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
wanted = quantized.network.decomposed(x)[0]
noise = (quantized(x) - wanted).square().sum() / wanted.square().sum()
print(quantized.network.runs, bool(noise < 1e-4), "torch._inductor" in sys.modules)
"""


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
def test_a_file_is_run_without_a_compiler_and_without_lightning(mode: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantize(mode, "x86", eval(NETWORK, {"nn": nn})).save(tmp_path / "model.int8")
    environment = os.environ | {"QAT_LIGHTNING_COMPILE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "model.int8"), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-2:] == ["recorded 1 True", "imported []"]


@pytest.mark.nightly
def test_the_compiler_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantize("pt2e", "x86", eval(NETWORK, {"nn": nn}), scheme=SEVEN_BITS).save(tmp_path / "model.int8")
    command = [sys.executable, "-W", "ignore", "-c", COMPILES, str(tmp_path / "model.int8")]
    environment = {name: value for name, value in os.environ.items() if name != "QAT_LIGHTNING_COMPILE"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "aotinductor True False"
    assert "AOTInductor compiles the int8 network" in done.stderr
