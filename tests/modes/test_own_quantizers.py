"""Any PT2E quantizer in mode pt2e: its grids, our FakeQuantizes, BatchNorm folded in any case."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn
from torchao.quantization.pt2e.observer import MinMaxObserver, PlaceholderObserver
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from qat_lightning.errors import ConfigurationError, NetworkError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers, float_keys, prepared_state, set_phase
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.derived import DerivedFakeQuantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.networks import CASES, Case, train
from tests.support.quantizers import Demanding, OwnQuantizer

PATH = "tests.support.quantizers.OwnQuantizer"
QUANTIZERS: dict[str, Any] = {
    "int8": PATH,
    "symmetric int8": {"_target_": PATH, "symmetric": True, "bias": True},
    "uint8 per tensor": {"_target_": PATH, "dtype": "uint8", "per_channel": False, "bias": True},
    "int16": "tests.support.quantizers.wide_quantizer",
}
EXAMPLE = Example((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))


def fit(backend: Any, case: Case, *, steps: int = 15, **settings: Any) -> tuple[nn.Module, Converted]:
    torch.manual_seed(0)
    flow, recipe = get_mode("pt2e"), Recipe("pt2e", backend, **settings)
    args, kwargs, _ = case.batch(8)
    prepared = flow.prepare(case.network(), Example(args, kwargs), recipe)
    for fake_quant in (False, True):
        set_phase(prepared, fake_quant=fake_quant, observers=True, batchnorm_frozen=False)
        train(prepared, case, steps=steps)
    args, kwargs, _ = case.batch(64)
    return prepared, flow.convert(cpu_copy(prepared), Example(args, kwargs))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4), nn.Sigmoid()
    )


TABLE = [
    pytest.param(name, case, id=f"{name}-{case.name}", marks=() if case.name == "plain" else pytest.mark.slow)
    for name in QUANTIZERS
    for case in CASES
    if "pt2e" in case.modes
]


@pytest.mark.parametrize(("name", "case"), TABLE)
def test_int8_is_what_fake_quant_was(name: str, case: Case) -> None:
    prepared, converted = fit(QUANTIZERS[name], case)
    assert sum(row.quantized for row in converted.coverage) >= case.layers
    assert len(converted.checks) >= case.layers
    assert not [check for check in converted.checks if check.sqnr_db < 60.0]
    torch.manual_seed(1)
    args, kwargs, labels = case.batch(512)
    with torch.no_grad():
        expected = case.logits(cpu_copy(prepared)(*args, **kwargs)).argmax(1)
        actual = case.logits(converted.network(*args, **kwargs)).argmax(1)
    assert (expected == actual).float().mean() >= 0.995
    assert (actual == labels).float().mean() > 0.8


@pytest.mark.parametrize("name", QUANTIZERS)
def test_without_rounding_it_is_the_float_network(name: str) -> None:
    before = network()
    prepared = get_mode("pt2e").prepare(copy.deepcopy(before), EXAMPLE, Recipe("pt2e", QUANTIZERS[name]))
    missing, unexpected = prepared.load_state_dict(before.state_dict(), strict=False)
    assert not unexpected
    assert float_keys(prepared).isdisjoint(missing)
    set_phase(prepared, fake_quant=False, observers=False, batchnorm_frozen=False)
    for training in (False, True):
        before.train(training)
        prepared.train(training)
        expected = copy.deepcopy(before)(*EXAMPLE.args)
        assert sqnr_db(expected.detach(), prepared(*EXAMPLE.args).detach()) > 90


def grids(backend: Any, scheme: Scheme | None = None) -> dict[str, str]:
    recipe = Recipe("pt2e", backend, scheme or Scheme())
    prepared = get_mode("pt2e").prepare(network(), EXAMPLE, recipe)
    return {name.rpartition(".")[2]: str(fq.grid) for name, fq in fake_quantizers(prepared)}


def test_the_grids_are_those_that_the_quantizer_asked_for() -> None:
    found = grids({"_target_": PATH, "dtype": "int16", "symmetric": True})
    assert set(found.values()) == {
        "int16 [-32768, 32767], symmetric, per tensor",
        "int8 [-127, 127], symmetric, per channel 0",
    }
    found = grids({"_target_": PATH, "dtype": "uint8", "per_channel": False})
    assert set(found.values()) == {"uint8 [0, 255], affine, per tensor", "int8 [-127, 127], symmetric, per tensor"}


def test_a_scheme_makes_them_coarser_and_never_finer() -> None:
    scheme = Scheme(weight_bits=4, weight_granularity="per_tensor", activation_symmetric=True)
    found = set(grids(PATH, scheme).values())
    assert "int8 [-7, 7], symmetric, per tensor" in found
    assert "int8 [-128, 127], symmetric, per tensor" in found


def test_a_fixed_grid_stays_as_it_is() -> None:
    prepared = get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", PATH))
    (fixed,) = (fq for _, fq in fake_quantizers(prepared) if fq.source == "fixed")
    for _ in range(2):
        prepared(*EXAMPLE.args)
        scale, zero_point = fixed.calculate_qparams()
        assert (float(scale), int(zero_point)) == (1 / 256, -128)


def test_a_derived_bias_trains_on_the_grid_of_products() -> None:
    prepared = get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", {"_target_": PATH, "bias": True}))
    prepared(*EXAMPLE.args)
    derived = [module for module in prepared.modules() if isinstance(module, DerivedFakeQuantize)]
    assert len(derived) == 2  # of the convolution as well, whose BatchNorm leaves it a bias
    bias = prepared.get_parameter("4.bias")
    scale, _ = derived[-1].calculate_qparams()
    assert torch.allclose(derived[-1](bias), (bias / scale).round() * scale)
    assert not torch.equal(derived[-1](bias), bias)
    assert not any("derived" in key or "sources" in key for key in prepared.state_dict())
    converted = get_mode("pt2e").convert(cpu_copy(prepared), EXAMPLE)
    kinds = [buffer.dtype for buffer in converted.network.buffers()]
    assert kinds.count(torch.int32) >= 2


def test_what_is_excluded_stays_float() -> None:
    prepared = get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", PATH, exclude=("0",)))
    prepared(*EXAMPLE.args)
    rows = {row.name: row for row in get_mode("pt2e").convert(cpu_copy(prepared), EXAMPLE).coverage}
    assert not rows["0"].quantized
    assert "exclude" in rows["0"].reason
    assert rows["4"].quantized


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("dynamic", "use is_dynamic=False"),
        ("float16", "use torch.int8, torch.uint8 or torch.int16"),
        ("int32", "use torch.int8, torch.uint8 or torch.int16"),
        ("per_channel", "use a scheme per tensor for activations"),
        ("derived", "give it one of its own"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is(what: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match="What to do: in the quantizer") as error:
        get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", Demanding(what)))
    assert says in str(error.value)
    assert "leave the layer float with exclude=" in str(error.value)


class Callback(OwnQuantizer):
    """Inserts its own observer, where upstream asks it to."""

    def prepare_obs_or_fq_callback(self, model: fx.GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """The input's observer."""
        (input,) = model.graph.find_nodes(op="placeholder")
        edge_or_node_to_obs_or_fq[input] = MinMaxObserver(dtype=torch.int8)


def test_an_observer_besides_the_annotations_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="let it annotate the place instead"):
        get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", Callback()))


class WeightsAlone(OwnQuantizer):
    """Activations are float, as in some runtimes."""

    def _annotate_weighted(self, node: fx.Node) -> None:
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation({node.args[1]: self.weight})

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate weights of linear layers."""
        for node in model.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            self._annotate_weighted(node)
        return model


def test_weights_alone_are_int8_where_the_quantizer_wants_nothing_else() -> None:
    case = next(case for case in CASES if case.name == "plain")
    prepared, converted = fit(WeightsAlone(), case)
    rows = {row.name: row for row in converted.coverage}
    assert [type(dict(prepared.named_modules())[name]).__name__ for name, row in rows.items() if row.quantized] == [
        "Linear"
    ]
    assert any(buffer.dtype is torch.int8 for buffer in converted.network.buffers())


class Nothing(OwnQuantizer):
    """Annotates nothing."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Annotate this graph."""
        return model


def test_a_quantizer_that_annotates_nothing_is_an_error() -> None:
    with pytest.raises(NetworkError, match="Nothing annotated none of its operations"):
        get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", Nothing()))


def test_an_instance_is_copied_and_one_from_a_checkpoint_is_asked_for_again() -> None:
    class Counting(OwnQuantizer):
        calls = 0

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            self.calls += 1
            return super().annotate(model)

    quantizer = Counting()
    recipe = Recipe("pt2e", quantizer)
    prepared = get_mode("pt2e").prepare(network(), EXAMPLE, recipe)
    assert quantizer.calls == 0
    kept = Recipe.from_dict(prepared_state(prepared).recipe.to_dict())
    with pytest.raises(ConfigurationError, match="was given as an instance, which checkpoints and files cannot store"):
        get_mode("pt2e").prepare(network(), EXAMPLE, kept)


def test_arguments_that_it_does_not_take_are_said() -> None:
    with pytest.raises(ConfigurationError, match=r"OwnQuantizer\(bits=3\) fails .*bits"):
        get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", {"_target_": PATH, "bits": 3}))
    with pytest.raises(ConfigurationError, match=r"makes builtins.str, and not a torchao"):
        get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", "os.getcwd"))


def test_an_observer_is_only_asked_for_its_grid() -> None:
    """Also one that cannot observe."""
    quantizer = OwnQuantizer()
    quantizer.activation = QuantizationSpec(torch.int8, PlaceholderObserver, qscheme=torch.per_tensor_affine)
    prepared = get_mode("pt2e").prepare(network(), EXAMPLE, Recipe("pt2e", quantizer))
    sources = {fq.source for _, fq in fake_quantizers(prepared)}
    assert sources == {"moving_average", "present", "fixed"}
