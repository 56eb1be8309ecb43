"""Static quantization with upstream's own flow and observers gives the same scales and zero points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.ao.quantization as upstream
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchao.quantization.pt2e import observer as pt2e_observers
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

from qat_lightning.errors import ConversionError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers
from qat_lightning.modes.registry import get_mode
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.engines import packing_engine
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.networks import CASES

OBSERVERS: dict[str, tuple[str, dict[str, float]]] = {
    "min_max": ("MinMaxObserver", {}),
    # Ours follows the first batches more closely than upstream's, unless the constant asks for as much.
    "moving_average": ("MovingAverageMinMaxObserver", {"averaging_constant": 0.95}),
}


class Chain(nn.Module):
    """Layers that both flows quantize alike: convolutions with BatchNorm and ReLU, an addition, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.body(x) + self.last(x)).flatten(1))


class ChainByHand(nn.Module):
    """The same network, written as upstream's eager mode requires."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain
        self.quant, self.dequant = upstream.QuantStub(), upstream.DeQuantStub()
        self.add = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.chain.stem(self.quant(x))
        x = self.add.add(self.chain.body(x), self.chain.last(x))
        return self.dequant(self.chain.head(x.flatten(1)))


def trained() -> nn.Module:
    torch.manual_seed(0)
    network = Chain()
    for _ in range(3):
        network(torch.randn(16, 3, 8, 8) * 2 + 1)
    return network.eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) * (1 + n) for n in range(4)]


@dataclass
class Grids:
    """Parameters of an int8 network: scale and zero point of activations, scales and integers of weights."""

    activations: dict[str, tuple[float, int]] = field(default_factory=dict)
    weights: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of_layers(cls, network: nn.Module) -> Grids:
        """Those of the int8 layers of eager and fx, by layer names in `Chain`."""
        grids = cls()
        for name, layer in network.named_modules():
            if hasattr(layer, "scale") and callable(getattr(layer, "weight", None)):
                name = name.removeprefix("chain.").removesuffix(".op")
                grids.activations[name] = float(layer.scale), int(layer.zero_point)
                weight = layer.weight()
                per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
                scales = weight.q_per_channel_scales() if per_channel else torch.tensor(weight.q_scale())
                grids.weights[name] = scales, weight.int_repr()
        return grids

    @classmethod
    def of_fx(cls, network: nn.Module) -> Grids:
        """Those of the layers and of ops between them, by the names of upstream's converter."""
        grids, state = cls.of_layers(network), network.state_dict()
        for name, scale in state.items():
            if "scale_" in name:
                grids.activations[name] = float(scale), int(state[name.replace("scale_", "zero_point_")])
        return grids

    @classmethod
    def of_graph(cls, graph: torch.fx.GraphModule) -> Grids:
        """Those of an exported graph, in the order of its ops."""
        grids = cls()
        for node in graph.graph.nodes:
            if node.target is torch.ops.quantized_decomposed.quantize_per_tensor.default:
                grids.activations[str(len(grids.activations))] = float(node.args[1]), int(node.args[2])
            elif node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
                integers, scales = node.args[1].args[:2]
                scales = getattr(graph, scales.target) if isinstance(scales, torch.fx.Node) else torch.tensor(scales)
                grids.weights[str(len(grids.weights))] = scales, getattr(graph, integers.target)
        return grids


def eager_by_hand(qconfig: upstream.QConfig) -> tuple[nn.Module, Grids]:
    network = ChainByHand(trained()).eval()
    upstream.fuse_modules(network, [[f"chain.{part}.{n}" for n in range(3)] for part in ("stem", "body")], inplace=True)
    network.qconfig = qconfig  # type: ignore[assignment]
    upstream.prepare(network, inplace=True)
    for batch in batches():
        network(batch)
    upstream.convert(network, inplace=True)
    grids = Grids.of_layers(network)
    for name, rounding in (("input", network.quant), ("add", network.add)):
        grids.activations[name] = float(rounding.scale), int(rounding.zero_point)
    return network, grids


def fx_by_hand(qconfig: upstream.QConfig) -> tuple[nn.Module, Grids]:
    mapping = upstream.get_default_qconfig_mapping("x86").set_global(qconfig)
    mapping.object_type_qconfigs.clear()
    network = prepare_fx(trained(), mapping, (batches()[0],))
    for batch in batches():
        network(batch)
    network = convert_fx(network)
    return network, Grids.of_fx(network)


def pt2e_by_hand(activation: Any, weight: Any, *, per_channel: bool) -> tuple[nn.Module, Grids]:
    inputs = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=activation,
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,
        observer_or_fake_quant_ctr=weight,
    )
    quantizer = X86InductorQuantizer().set_global(QuantizationConfig(inputs, None, weights, None, is_qat=False))
    network = prepare_pt2e(torch.export.export(trained(), (batches()[0],), strict=True).module(), quantizer)
    for batch in batches():
        network(batch)
    network = convert_pt2e(network)
    return network, Grids.of_graph(network)


def by_hand(mode: str, observer: str, *, per_channel: bool) -> tuple[nn.Module, Grids]:
    """Upstream's int8 network of a mode, and its quantization parameters."""
    name, settings = OBSERVERS[observer]
    kinds = pt2e_observers if mode == "pt2e" else upstream
    activation = getattr(kinds, name).with_args(**settings)
    weight = getattr(kinds, "PerChannelMinMaxObserver" if per_channel else "MinMaxObserver")
    if mode == "pt2e":
        return pt2e_by_hand(activation, weight, per_channel=per_channel)
    qconfig = upstream.QConfig(
        activation=activation.with_args(dtype=torch.quint8, quant_min=0, quant_max=255),
        weight=weight.with_args(
            dtype=torch.qint8,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ),
    )
    return (eager_by_hand if mode == "eager" else fx_by_hand)(qconfig)


def ours(mode: str, scheme: Scheme) -> tuple[nn.Module, Grids]:
    """Our int8 network of a mode, and its quantization parameters under upstream's names."""
    flow, example = get_mode(mode), Example((batches()[0],))
    prepared = flow.prepare(trained(), example, Recipe(mode, "x86", scheme, kind="static"))
    assert calibrate(prepared, batches()) == 4
    network: Any = flow.convert(cpu_copy(prepared), example).network
    if mode == "pt2e":
        return network, Grids.of_graph(network.decomposed)
    if mode == "fx":
        return network, Grids.of_fx(network)
    grids = Grids.of_layers(network)
    for name, layer in (("input", network.stem[0]), ("add", network.head)):
        grids.activations[name] = float(layer.input_scale), int(layer.input_zero_point)
    return network, grids


@pytest.fixture
def _as_x86_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    with packing_engine("onednn"):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_as_x86_runs")
@pytest.mark.parametrize(
    ("mode", "observer"),
    # Upstream's eager and pt2e show some batches to an observer twice, which moves an average twice.
    [("eager", "min_max"), ("fx", "min_max"), ("pt2e", "min_max"), ("fx", "moving_average")],
)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_scales_and_zero_points_are_those_of_the_flow_written_by_hand(
    mode: str, observer: Any, granularity: Any
) -> None:
    scheme = Scheme(activation_observer=observer, weight_granularity=granularity, **OBSERVERS[observer][1])  # type: ignore[arg-type]
    network, mine = ours(mode, scheme)
    by_upstream, theirs = by_hand(mode, observer, per_channel=granularity == "per_channel")

    assert mine.activations.keys() == theirs.activations.keys()
    assert len(mine.activations) >= 5
    for name, (scale, zero_point) in theirs.activations.items():
        assert mine.activations[name][0] == pytest.approx(scale, rel=1e-5), name
        assert mine.activations[name][1] == zero_point, name
    assert mine.weights.keys() == theirs.weights.keys()
    assert len(mine.weights) == 4
    for name, (scales, integers) in theirs.weights.items():
        assert torch.allclose(mine.weights[name][0].double(), scales.double(), rtol=1e-5), name
        assert mine.weights[name][0].numel() == (len(integers) if granularity == "per_channel" else 1)
        assert (mine.weights[name][1].int() - integers.int()).abs().max() <= 1, name
    x = batches()[0]
    assert (network(x).argmax(1) == by_upstream(x).argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("depthwise", "several_inputs")], ids=lambda c: c.name
)
def test_calibration_sets_every_range_and_trains_nothing(mode: str, case: Any) -> None:
    torch.manual_seed(0)
    flow, network = get_mode(mode), case.network()
    args, kwargs, _ = case.batch(8)
    prepared = flow.prepare(network, Example(args, kwargs), Recipe(mode, "x86", kind="static"))
    before = {key: value.clone() for key, value in prepared.state_dict().items() if "running" in key or "weight" in key}
    calls = [case.batch(32) for _ in range(3)]
    assert calibrate(prepared, [Example(args, kwargs) for args, kwargs, _ in calls]) == 3
    after = prepared.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    seen = [fq for _, fq in fake_quantizers(prepared) if fq.observed and fq.seen]
    assert all(int(fq.batches) == 3 for fq in seen)
    converted = flow.convert(cpu_copy(prepared), Example(args, kwargs))
    assert min(check.sqnr_db for check in converted.checks) > 55
    with pytest.raises(ConversionError, match="no finite activation"):
        calibrate(prepared, [])
