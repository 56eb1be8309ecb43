"""Static quantization by hand with upstream's own flow and observers gives the same scales and zero points."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    get_default_qconfig_mapping,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from qat_lightning.calibration import calibrate
from qat_lightning.errors import ConversionError
from qat_lightning.flows.base import Example, cpu_copy, fake_quantizers, get_flow
from qat_lightning.recipe import Recipe
from qat_lightning.scheme import Scheme
from tests.networks import CASES

OBSERVERS: dict[str, tuple[Any, dict[str, float]]] = {
    "min_max": (MinMaxObserver, {}),
    # Ours follows the first batches more closely than upstream's, unless the constant asks for as much.
    "moving_average": (MovingAverageMinMaxObserver, {"averaging_constant": 0.95}),
}


class Chain(nn.Module):
    """What both flows quantize alike: convolutions with BatchNorm and ReLU, an addition, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((self.body(x) + self.last(x)).flatten(1))


def trained() -> nn.Module:
    torch.manual_seed(0)
    network = Chain()
    for _ in range(3):
        network(torch.randn(16, 3, 8, 8) * 2 + 1)
    return network.eval()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) * (1 + n) for n in range(4)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("observer", sorted(OBSERVERS))
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_scales_and_zero_points_are_those_of_the_flow_written_by_hand(observer: Any, granularity: Any) -> None:
    network = trained()
    kind, settings = OBSERVERS[observer]
    weight = PerChannelMinMaxObserver if granularity == "per_channel" else MinMaxObserver
    scheme = torch.per_channel_symmetric if granularity == "per_channel" else torch.per_tensor_symmetric
    qconfig = QConfig(
        activation=kind.with_args(dtype=torch.quint8, quant_min=0, quant_max=255, **settings),
        weight=weight.with_args(dtype=torch.qint8, quant_min=-127, quant_max=127, qscheme=scheme),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapping = get_default_qconfig_mapping("x86").set_global(qconfig)
        mapping.object_type_qconfigs.clear()
        upstream = prepare_fx(copy.deepcopy(network), mapping, (batches()[0],))
        for batch in batches():
            upstream(batch)
        upstream = convert_fx(upstream)

    recipe = Recipe(
        "fx", "x86", Scheme(activation_observer=observer, weight_granularity=granularity, **settings), kind="static"
    )
    flow = get_flow("fx")
    prepared = flow.prepare(copy.deepcopy(network), Example((batches()[0],)), recipe)
    assert calibrate(prepared, batches()) == 4
    ours = flow.convert(cpu_copy(prepared), Example((batches()[0],))).network

    compared = 0
    theirs = dict(upstream.named_modules())
    for name, layer in ours.named_modules():
        if not hasattr(layer, "scale") or not callable(getattr(layer, "weight", None)):
            continue
        other = theirs[name]
        assert layer.scale == pytest.approx(other.scale, rel=1e-5), name
        assert layer.zero_point == other.zero_point, name
        mine, their = layer.weight(), other.weight()
        scales = (
            (mine.q_per_channel_scales(), their.q_per_channel_scales())
            if granularity == "per_channel"
            else (torch.tensor(mine.q_scale()), torch.tensor(their.q_scale()))
        )
        assert torch.allclose(scales[0].double(), scales[1].double(), rtol=1e-5)
        assert (mine.int_repr().int() - their.int_repr().int()).abs().max() <= 1
        compared += 1
    assert compared == 4
    x = batches()[0]
    assert (ours(x).argmax(1) == upstream(x).argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("mode", ["eager", "fx", "pt2e"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("depthwise", "several_inputs")], ids=lambda c: c.name
)
def test_calibration_sets_every_range_and_trains_nothing(mode: str, case: Any) -> None:
    torch.manual_seed(0)
    flow, network = get_flow(mode), case.network()
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
