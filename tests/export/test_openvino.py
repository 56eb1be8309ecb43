"""OpenVINO's files: kernels in OpenVINO, and results."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from qat_lightning.errors import ExportError
from qat_lightning.export import onnx_rewrites
from qat_lightning.export.openvino import OpenVino
from qat_lightning.export.protocol import Source
from qat_lightning.graph.example import Example
from tests.artifact.making import batch_of, case_named, images, quantize
from tests.export.files import Odd, assert_same_outputs, quantized_case

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnx")


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


def _precisions(path: Path) -> dict[str, Counter[str]]:
    """The precision in which OpenVINO runs each type of layer."""
    found: dict[str, Counter[str]] = {}
    compiled = openvino.Core().compile_model(str(path), "CPU")
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        found.setdefault(info["layerType"].astype(str), Counter())[info["runtimePrecision"].astype(str)] += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("residual", "eager"), ("residual", "pt2e"), ("functional", "fx")])
def test_file_computes_what_the_int8_network_does_in_int8(name: str, mode: str, tmp_path: Path) -> None:
    quantized, batch = quantized_case(name, mode)
    path = tmp_path / "model.xml"
    OpenVino().write(Source(quantized, quantized.example), path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    assert_same_outputs(quantized, OpenVino().load(path), batch)
    precisions = _precisions(path)
    assert precisions["Convolution"] == {"u8": 3}
    assert precisions["FullyConnected"] == {"u8": 1}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_linear_layers_of_tokens_are_int8(mode: str, tmp_path: Path) -> None:
    quantized, batch = quantized_case("attention", mode)
    OpenVino().write(Source(quantized, quantized.example), tmp_path / "model.xml")
    assert _precisions(tmp_path / "model.xml")["FullyConnected"] == {"u8": 5}
    assert_same_outputs(quantized, OpenVino().load(tmp_path / "model.xml"), batch, least=25.0)


@pytest.mark.slow
def test_values_that_only_move_are_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only moves and one quantize op are between a linear layer and its heads' product: a kernel can write integers."""
    quantized, batch = quantized_case("attention", "fx")

    def grids(name: str) -> int:
        OpenVino().write(Source(quantized, quantized.example), tmp_path / name)
        ops = openvino.Core().read_model(str(tmp_path / name)).get_ordered_ops()
        return sum(op.get_type_name() == "FakeQuantize" for op in ops)

    once = grids("once.xml")
    assert_same_outputs(quantized, OpenVino().load(tmp_path / "once.xml"), batch, least=25.0)
    monkeypatch.setattr(onnx_rewrites, "_round_once", lambda graph: None)
    assert once < grids("as_in_the_graph.xml")


@pytest.mark.slow
def test_several_inputs_keep_their_names(tmp_path: Path) -> None:
    quantized, batch = quantized_case("several_inputs", "fx")
    OpenVino().write(Source(quantized, quantized.example), tmp_path / "model.xml")
    model = openvino.Core().read_model(str(tmp_path / "model.xml"))
    assert [given.get_any_name() for given in model.inputs] == ["x", "table"]
    assert [made.get_any_name() for made in model.outputs] == ["logits", "side"]
    assert all(given.partial_shape[0].is_dynamic for given in model.inputs)
    assert_same_outputs(quantized, OpenVino().load(tmp_path / "model.xml"), batch)


def test_float_network_goes_the_same_way_with_float_weights(tmp_path: Path) -> None:
    case = case_named("residual")
    network, (args, kwargs) = case.network().eval(), batch_of(case)(4)
    OpenVino().write(Source(network, Example(args, kwargs)), tmp_path / "float.xml")
    assert_same_outputs(network, OpenVino().load(tmp_path / "float.xml"), batch_of(case), least=90.0)
    assert "f16" not in (tmp_path / "float.xml").read_text()


def test_op_that_the_file_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no translation of .*i0: rewrite"):
        OpenVino().write(Source(Odd().eval(), Example(*images(4))), tmp_path / "model.xml")
    assert not any(tmp_path.iterdir())


def test_outputs_stay_what_they_are_when_it_is_called_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized = quantize("fx", "x86", nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)))
    OpenVino().write(Source(quantized, quantized.example), tmp_path / "model.xml")
    run = OpenVino().load(tmp_path / "model.xml")
    ((first,), _), ((other,), _) = images(2), images(2)
    (kept,) = run([first])
    copied = kept.clone()
    run([other])
    assert torch.equal(kept, copied)


_SIGNALLED = """
import faulthandler, gc, os, signal, sys
faulthandler.enable()  # its handlers, and Python's, run on a signal stack, which OpenVINO replaces by its own
signal.signal(signal.SIGCHLD, lambda *_: None)
import torch
from qat_lightning.export.openvino import OpenVino
runs = [OpenVino().load(path) for path in sys.argv[1:]]
for run in runs:
    run([torch.zeros(1, 3, 8, 8)])
del run
while runs:
    runs.pop(0)  # the first goes first
    gc.collect()
os.kill(os.getpid(), signal.SIGCHLD)
print("alive")
"""


@pytest.mark.nightly
def test_a_signal_after_several_networks_does_not_kill_the_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    paths = []
    for name in ("one", "other"):
        quantized = quantize("fx", "x86", nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)))
        paths.append(str(tmp_path / f"{name}.xml"))
        OpenVino().write(Source(quantized, quantized.example), Path(paths[-1]))
    done = subprocess.run([sys.executable, "-c", _SIGNALLED, *paths], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
