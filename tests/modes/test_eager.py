"""Eager mode: chains found by observation, rounding in place, int8 kernels under any forward."""

import copy
import io
import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat_lightning.errors import ConversionError, NetworkError, VerificationError
from qat_lightning.graph.example import Example
from qat_lightning.measure.metrics import agreement
from qat_lightning.modes.eager.int8 import Int8Layer
from qat_lightning.modes.eager.mode import EagerMode
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers, float_keys, prepared_state, set_phase
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.backends import BACKENDS, pairs
from qat_lightning.settings.engines import engine_here, quantized_engine
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.exactness import X86_LEAST_DB

BACKEND_NAMES = [backend for mode, backend in pairs() if mode == "eager"]
LEAST_DB = {"x86": X86_LEAST_DB, "onednn": X86_LEAST_DB, "fbgemm": 50.0, "qnnpack": 50.0}


def conv_bn_relu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


class Block(nn.Module):
    def __init__(self, channels: int, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(Block(8, inplace=True), Block(8, inplace=False))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def depthwise() -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.Conv2d(16, 8, 1),
        nn.Hardtanh(0.0, 2.0),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    # Large, so that ReLU6 has something to cut.
    nn.init.constant_(network[1].weight, 4.0)
    nn.init.constant_(network[4].weight, 4.0)
    return network


def linear_only() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.Linear(16, 5)
    )


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(F.relu(self.conv1(x)), 2)
        b = torch.cat([self.conv2(a), self.conv2(a * 0.5)], 1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(b, 1), 1))


NETWORKS = [conv_bn_relu, Residual, depthwise, linear_only, Functional]


def train(prepared: nn.Module, x: Tensor, steps: int = 6) -> None:
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05, momentum=0.9)
    target = torch.arange(len(x)) % 5
    prepared.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(prepared(x), target).backward()
        optimizer.step()
    prepared.eval()


def example_of(x: Tensor) -> Example:
    return Example((x,))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(32, 3, 8, 8)


def int8_of(
    network: nn.Module, example: Example, backend: str = "x86", **recipe: object
) -> tuple[nn.Module, Converted]:
    flow = EagerMode()
    prepared = flow.prepare(network, example, Recipe("eager", backend, **recipe))  # type: ignore[arg-type]
    prepared.train()
    prepared(*example.args, **example.kwargs)
    prepared.eval()
    return prepared, flow.convert(cpu_copy(prepared), example)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("make", NETWORKS)
def test_int8_is_what_fake_quant_trained(make, backend, images):
    flow = get_mode("eager")
    prepared = flow.prepare(make(), example_of(images), Recipe("eager", backend))
    train(prepared, images)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = images.contiguous(memory_format=memory_format)
        converted = flow.convert(cpu_copy(prepared), example_of(x))
        layers = [name for name, module in converted.network.named_modules() if isinstance(module, Int8Layer)]
        assert sorted(layers) == sorted(row.name for row in converted.coverage if row.quantized)
        assert all(row.quantized for row in converted.coverage)
        assert {check.name for check in converted.checks} == set(layers)
        assert min(check.sqnr_db for check in converted.checks) >= LEAST_DB[backend]
        test = torch.cat([x, torch.randn(200, 3, 8, 8)])
        with torch.inference_mode():
            expected, actual = prepared(test), converted.network(test)
        assert type(actual) is Tensor
        assert agreement(expected, actual) >= 0.995
        assert torch.equal(converted.network(test[:3]), actual[:3])


@pytest.mark.parametrize("make", NETWORKS)
def test_state_dict_rebuilds_the_network(make, images):
    _, converted = int8_of(make(), example_of(images), "qnnpack")
    file = io.BytesIO()
    torch.save(converted.network.state_dict(), file)
    file.seek(0)
    plan = json.loads(json.dumps(converted.network.quantization_plan))
    with quantized_engine("qnnpack"):
        rebuilt = EagerMode().skeleton(make(), plan, Recipe("eager", "qnnpack"))
        rebuilt.load_state_dict(torch.load(file, weights_only=True))
        copied = copy.deepcopy(converted.network)
    expected = converted.network(images)
    assert torch.equal(rebuilt(images), expected)
    assert torch.equal(copied(images), expected)
    # No float copy of a weight is left.
    assert not [n for n, p in converted.network.named_parameters() if n.endswith("weight")]


@pytest.mark.parametrize("make", NETWORKS)
def test_without_rounding_prepared_is_float(make, images):
    network = make()
    parameters = dict(network.named_parameters())
    reference = copy.deepcopy(network)
    prepared = EagerMode().prepare(network, example_of(images), Recipe("eager", "x86"))
    assert prepared is network
    assert type(prepared) is type(reference)
    assert all(parameters[name] is parameter for name, parameter in prepared.named_parameters())
    assert set(reference.state_dict()) == float_keys(prepared) <= set(prepared.state_dict())
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    for mode in (True, False):
        prepared.train(mode)
        reference.train(mode)
        expected, actual = reference(images), prepared(images)
        assert torch.equal(actual, expected)
    expected.sum().backward()
    actual.sum().backward()
    gradients = dict(prepared.named_parameters())
    assert all(torch.equal(gradients[name].grad, p.grad) for name, p in reference.named_parameters())


def test_chains_of_a_residual_network(images):
    prepared = EagerMode().prepare(Residual(), example_of(images), Recipe("eager", "x86"))
    chains = {c["name"]: (c["batchnorm"], c["activation"]) for c in prepared_state(prepared).plan["chains"]}
    assert chains == {
        "stem": (None, None),
        "blocks.0.conv1": ("blocks.0.bn1", "blocks.0.relu"),
        "blocks.0.conv2": ("blocks.0.bn2", None),
        "blocks.1.conv1": ("blocks.1.bn1", "blocks.1.relu"),
        "blocks.1.conv2": ("blocks.1.bn2", None),
        "head": (None, None),
    }


def test_zero_batchnorm_weight_learns(images):
    prepared = EagerMode().prepare(Residual(), example_of(images), Recipe("eager", "x86"))
    prepared.train()
    prepared(images).square().sum().backward()
    gradient = prepared.blocks[0].bn2.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_zero_batchnorm_weight_with_a_large_bias_converts(backend, images):
    network = Residual()
    nn.init.constant_(network.blocks[0].bn2.bias, 30.0)
    _, converted = int8_of(network, example_of(images), backend)
    assert min(check.sqnr_db for check in converted.checks) >= LEAST_DB[backend]


def test_an_input_is_rounded_once(images):
    prepared = EagerMode().prepare(conv_bn_relu(), example_of(images), Recipe("eager", "x86"))
    train(prepared, images)
    assert prepared[0].input_fake_quant.seen
    # Behind max-pooling the grid of the layer before is used, behind an average one of its own.
    assert prepared[4].input_grid is prepared[0].output_fake_quant
    assert not prepared[4].input_fake_quant.seen
    assert prepared[8].input_fake_quant.seen


class Branches(nn.Module):
    """Branches and loops on its data, and has layers that the example does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.repeat = nn.Conv2d(8, 8, 3, padding=1)
        self.never = nn.Linear(8, 5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        y = self.left(y) if x.mean() > 0 else self.right(y)
        for _ in range(1 + int(x.abs().mean() > 1)):
            y = torch.tanh(self.repeat(y))
        y = y.mean((2, 3))
        return self.never(y) if x.mean() > 100 else self.head(y)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_data_dependent_control_flow(backend, images):
    up, down, far = images.abs(), -images.abs(), 3 * images.abs()
    flow = EagerMode()
    prepared = flow.prepare(Branches(), example_of(up), Recipe("eager", backend))
    for x in (up, down, far):
        train(prepared, x, steps=3)
    converted = flow.convert(cpu_copy(prepared), example_of(up))
    rows = {row.name: row for row in converted.coverage}
    assert rows["right.0"].quantized
    assert not rows["never"].quantized
    assert "never observed" in rows["never"].reason
    assert any("right.0" in note for note in converted.notes)
    for x in (up, down, far):
        with torch.inference_mode():
            expected, actual = prepared(x), converted.network(x)
        assert sqnr_db(expected, actual) > 25
        assert agreement(expected, actual) > 0.95


class Stray(nn.Module):
    """Uses the output of a fused convolution without its BatchNorm if a flag is set."""

    stray = ""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.stray == "function":
            y = y + 1
        elif self.stray == "layer":
            return self.head(y)
        elif self.stray == "output":
            return y
        y = self.relu(self.bn(y))
        return self.head(y)


@pytest.mark.parametrize(("stray", "where"), [("function", "add"), ("layer", "another layer"), ("output", "caller")])
def test_another_branch_through_a_fused_chain_is_an_error(stray, where, images):
    prepared, converted = int8_of(Stray(), example_of(images))
    reference = copy.deepcopy(prepared_state(prepared).float_network)
    prepared.stray = converted.network.stray = reference.stray = stray
    with torch.no_grad():
        if stray != "output":
            assert sqnr_db(reference.eval()(images), prepared(images)) > 15
        with pytest.raises(NetworkError, match=rf"'conv' has computed 'bn' and 'relu'.*{where}"):
            converted.network(images)


def test_a_batchnorm_whose_layer_did_not_run_is_an_error(images):
    _, converted = int8_of(Stray(), example_of(images))
    with pytest.raises(NetworkError, match="'bn' is folded"):
        converted.network.bn(torch.randn(2, 8, 4, 4))


class InPlace(nn.Module):
    """Adds, reads and writes the outputs of int8 layers, in place and through views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv1(x)
        y[:, :2] += 1
        z = self.conv2(y)
        z += y
        z.narrow(1, 0, 4).mul_(0.5)
        z.view(len(z), -1)[:, 0] = 0
        features = z.flatten(2).permute(0, 2, 1).mean(1)
        return {"logits": self.head(features), "features": features}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_in_place_functions_and_views_reach_the_tensor(context, images):
    prepared, converted = int8_of(InPlace(), example_of(images))
    with context():
        expected, actual = prepared(images), converted.network(images)
    assert all(sqnr_db(expected[key], actual[key]) > 40 for key in expected)
    assert not torch.equal(expected["features"], prepared_state(prepared).float_network.eval()(images)["features"])


class SharedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.also = self.conv
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.layers = [self.conv]
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv(x)))
        x = self.relu(self.bn2(self.also(x)))
        return self.head(self.layers[0](x).mean((2, 3)))


def test_shared_layers_stay_shared(images):
    prepared, converted = int8_of(SharedConv(), example_of(images))
    network = converted.network
    assert prepared_state(prepared).plan["chains"][0]["batchnorm"] is None
    assert network.conv is network.also is network.layers[0]
    assert isinstance(network.conv, Int8Layer)
    assert sqnr_db(prepared(images), network(images)) > 30


class Attention(nn.Module):
    """A transformer block; torch's own encoder layer has a fast path around its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        if scale is not None:
            tokens = tokens * scale
        y = self.norm(tokens)
        tokens = tokens + self.attention(y, y, y, need_weights=False)[0]
        tokens = tokens + self.mlp(self.norm(tokens))
        return self.head(self.encoder(tokens)[:, 0]), tokens


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_transformer_with_keyword_inputs(backend, images):
    example = Example((images,), {"scale": torch.rand(32, 1, 1)})
    prepared, converted = int8_of(Attention(), example, backend)
    rows = {row.name: row for row in converted.coverage}
    assert [name for name, row in rows.items() if row.quantized] == [
        "patches",
        "attention",
        "attention.out_proj",
        "mlp.0",
        "mlp.3",
        "encoder.layers.0.self_attn",
        "encoder.layers.0.self_attn.out_proj",
        "encoder.layers.0.linear1",
        "encoder.layers.0.linear2",
        "head",
    ]
    maps = {
        f"{name}.{part}" for name in ("attention", "encoder.layers.0.self_attn") for part in ("query", "key", "value")
    }
    layers = {name for name, row in rows.items() if row.quantized and row.kind != "MultiheadAttention"}
    assert {check.name for check in converted.checks} == layers | maps
    with torch.inference_mode():
        expected, actual = prepared(*example.args, **example.kwargs), converted.network(*example.args, **example.kwargs)
    assert isinstance(actual, tuple)
    assert all(sqnr_db(a, b) > 30 for a, b in zip(expected, actual, strict=True))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = nn.Conv2d(3, 8, 3), nn.Linear(4, 8)
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, batch: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        y = self.image(batch["image"]).mean((2, 3)) + self.table(batch["table"]) + self.embedding(ids)
        return {"logits": self.head(F.relu(y)), "sum": y.sum()}


def test_several_inputs_and_dicts(images):
    example = Example(({"image": images, "table": torch.randn(32, 4)}, torch.arange(32) % 10))
    prepared, converted = int8_of(TwoInputs(), example)
    expected, actual = prepared(*example.args), converted.network(*example.args)
    assert sqnr_db(expected["logits"], actual["logits"]) > 40
    assert [(row.name, row.quantized) for row in converted.coverage] == [
        ("image", True),
        ("table", True),
        ("embedding", True),
        ("head", True),
    ]


def test_a_network_that_is_one_layer():
    x = torch.randn(16, 4)
    prepared, converted = int8_of(nn.Linear(4, 3), example_of(x))
    assert sqnr_db(prepared(x), converted.network(x)) > 60
    assert type(converted.network(x)) is Tensor
    # As the float layer, it also takes one sample without a batch dimension.
    assert torch.equal(converted.network(x[0]), converted.network(x)[0])


@pytest.mark.parametrize(("make", "shape"), [(nn.Conv1d, (9,)), (nn.Conv3d, (5, 5, 5))])
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_other_dimensions(make, shape, backend):
    bn = nn.BatchNorm1d if make is nn.Conv1d else nn.BatchNorm3d
    network = nn.Sequential(make(3, 8, 3), bn(8), nn.ReLU(), make(8, 4, 1), nn.Flatten())
    x = torch.randn(8, 3, *shape)
    if make is nn.Conv3d and engine_here(BACKENDS[backend].engine) == "qnnpack":
        with pytest.raises(NetworkError, match="QNNPACK cannot save the weight of a Conv3d"):
            EagerMode().prepare(network, example_of(x), Recipe("eager", backend))
        return
    prepared, converted = int8_of(network, example_of(x), backend)
    assert prepared_state(prepared).plan["chains"][0]["activation"] == "2"
    assert min(check.sqnr_db for check in converted.checks) >= LEAST_DB[backend]


def test_excluded_layers_stay_float(images):
    prepared, converted = int8_of(conv_bn_relu(), example_of(images), exclude=("4", "1"))
    chains = {chain["name"]: chain["batchnorm"] for chain in prepared_state(prepared).plan["chains"]}
    assert chains == {"0": None, "8": None}
    assert type(converted.network[4]) is nn.Conv2d
    assert [(row.name, row.reason) for row in converted.coverage if not row.quantized] == [("4", "excluded")]


def test_globs_are_relative_to_the_prefix(images):
    with pytest.raises(NetworkError, match="0: excluded"):
        EagerMode().prepare(
            conv_bn_relu(), example_of(images), Recipe("eager", "x86", exclude=("model.*",)), prefix="model"
        )


def test_nothing_to_quantize():
    with pytest.raises(NetworkError, match="no convolution and no linear layer"):
        EagerMode().prepare(nn.Sequential(nn.ReLU()), example_of(torch.ones(2, 2)), Recipe("eager", "x86"))


def test_a_network_that_does_not_run(images):
    with pytest.raises(NetworkError, match="does not run on its example inputs"):
        EagerMode().prepare(nn.Linear(4, 4), example_of(images), Recipe("eager", "x86"))


def test_a_layer_used_as_a_function_stays_float(images):
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.direct = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.conv(x).mean((2, 3)), self.direct.weight)

    prepared, converted = int8_of(Direct(), example_of(images))
    assert "used by a function" in {row.name: row.reason for row in converted.coverage}["direct"]
    assert sqnr_db(prepared(images), converted.network(images)) > 60


def test_what_int8_kernels_lack_stays_float(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 1))
    _, converted = int8_of(network, example_of(images))
    reasons = {row.name: row.reason for row in converted.coverage}
    assert "padding_mode='reflect'" in reasons["0"]
    assert reasons["1"] == ""


def test_preparing_leaves_no_trace_of_the_example(images):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
    network[2].eval()
    before = copy.deepcopy(network.state_dict())
    inputs, rng = images.clone(), torch.get_rng_state()
    prepared = EagerMode().prepare(network, example_of(images), Recipe("eager", "x86"))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(images, inputs)
    assert all(torch.equal(prepared.state_dict()[key], value) for key, value in before.items())
    assert [prepared.training, prepared[0].training, prepared[2].training] == [True, True, False]


def test_statistics_and_ranges_move_in_training_only_and_stop(images):
    prepared = EagerMode().prepare(Residual(), example_of(images), Recipe("eager", "x86"))

    def moves(mode: bool) -> tuple[bool, bool]:
        prepared.train(mode)
        mean = prepared.blocks[0].bn1.running_mean.clone()
        ranges = [fq.max_val.clone() for _, fq in fake_quantizers(prepared) if fq.source == "moving_average"]
        prepared(torch.randn_like(images) * 2 + 1)
        after = [fq.max_val for _, fq in fake_quantizers(prepared) if fq.source == "moving_average"]
        moved = any(not torch.equal(a, b) for a, b in zip(ranges, after, strict=True))
        return not torch.equal(mean, prepared.blocks[0].bn1.running_mean), moved

    assert moves(True) == (True, True)
    assert moves(False) == (False, False)
    set_phase(prepared, fake_quant=True, observers=False, batchnorm_frozen=False)
    assert moves(True) == (True, False)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=True)
    assert moves(True) == (False, True)


def test_prepared_networks_reload_copy_and_evaluate_alike(images):
    def prepare() -> nn.Module:
        return EagerMode().prepare(Residual(), example_of(images), Recipe("eager", "x86"))

    prepared, other = prepare(), prepare()
    train(prepared, images)
    other.load_state_dict(prepared.state_dict())
    copied = copy.deepcopy(prepared)
    with torch.inference_mode():
        inferred = prepared(images)
    expected = prepared(images)
    assert torch.equal(inferred, expected)
    assert torch.equal(other.eval()(images), expected)
    train(copied, images, steps=1)
    assert torch.equal(prepared(images), expected)
    assert not torch.equal(copied(images), expected)


def test_the_same_entries_whatever_the_example(images):
    keys = [
        set(EagerMode().prepare(Branches(), example_of(x), Recipe("eager", "x86")).state_dict())
        for x in (images.abs(), -images.abs())
    ]
    assert keys[0] == keys[1]


def test_converting_before_training_is_an_error(images):
    flow = EagerMode()
    prepared = flow.prepare(conv_bn_relu(), example_of(images), Recipe("eager", "x86"))
    with pytest.raises(ConversionError, match="No range was ever observed"):
        flow.convert(cpu_copy(prepared), example_of(images))


def test_a_wrong_kernel_is_named(images, monkeypatch):
    run = Int8Layer.run

    def broken(self: Int8Layer, quantized: Tensor, call: int = 0) -> Tensor:
        output = run(self, quantized, call)
        return output.flip(0) if self.chain.name == "4" else output

    monkeypatch.setattr(Int8Layer, "run", broken)
    with pytest.raises(VerificationError, match=r"'4'.*onednn"):
        int8_of(conv_bn_relu(), example_of(images))


@pytest.mark.parametrize(
    "scheme", [Scheme(weight_bits=4), Scheme(weight_granularity="per_tensor"), Scheme(activation_symmetric=True)]
)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_schemes(scheme, backend, images):
    _, converted = int8_of(depthwise(), example_of(images), backend, scheme=scheme)
    assert min(check.sqnr_db for check in converted.checks) >= LEAST_DB[backend]


def test_the_target_engine_is_left_as_it_was(images):
    before = torch.backends.quantized.engine
    int8_of(conv_bn_relu(), example_of(images), "qnnpack")
    assert torch.backends.quantized.engine == before
    assert BACKENDS["qnnpack"].engine != before


class ReadsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x.to(self.conv.weight.dtype))).mean((2, 3))
        return self.head(y.to(self.head.weight.device))


def test_a_forward_may_ask_for_the_dtype_of_a_weight(images):
    prepared, converted = int8_of(ReadsWeights(), example_of(images))
    assert sqnr_db(prepared(images), converted.network(images)) > 60
    assert torch.isfinite(converted.network.head.weight.sum())
    with pytest.raises(NetworkError, match="'conv' has computed 'bn'"):
        converted.network.conv.weight.sum()


def test_batchnorm_folded_into_a_linear_layer_takes_matrices_only():
    x = torch.randn(8, 6)
    _, converted = int8_of(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), example_of(x))
    with pytest.raises(NetworkError, match="needs a 2-d input"):
        converted.network(torch.randn(4, 6, 6))


def test_bfloat16_networks_train_and_convert(images):
    flow = EagerMode()
    example = example_of(images.bfloat16())
    prepared = flow.prepare(conv_bn_relu().bfloat16(), example, Recipe("eager", "x86"))
    train(prepared, example.args[0], steps=2)
    converted = flow.convert(cpu_copy(prepared), example)
    assert min(check.sqnr_db for check in converted.checks) > 60


def test_training_under_autocast_and_activation_checkpoints(images):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.more, self.head = conv_bn_relu()[:3], nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.more, self.body(x), use_reentrant=False).mean((2, 3)))

    flow = EagerMode()
    prepared = flow.prepare(Checkpointed(), example_of(images), Recipe("eager", "x86"))
    with torch.autocast("cpu", torch.bfloat16):
        train(prepared, images, steps=2)
    assert not prepared.more.input_fake_quant.seen
    converted = flow.convert(cpu_copy(prepared), example_of(images))
    assert sqnr_db(prepared(images), converted.network(images)) > 60


@dataclass
class Output:
    logits: Tensor
    features: list[Tensor]


def test_any_batch_size_and_dataclass_outputs(images):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_bn_relu()

        def forward(self, x: Tensor) -> Output:
            return Output(self.net(x), [self.net[0](x)])

    _, converted = int8_of(Wrapped(), example_of(images))
    for batch in (0, 1, 7):
        output = converted.network(images[:batch])
        assert output.logits.shape == (batch, 5)
        assert type(output.logits) is type(output.features[0]) is Tensor


def test_a_forward_that_counts_its_children_is_refused(images):
    class Last(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self[:-1]:
                x = F.relu(layer(x))
            return self[-1](x)

    network = Last(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.raises(NetworkError, match="computes different values once its layers are prepared"):
        EagerMode().prepare(network, example_of(images), Recipe("eager", "x86"))


def test_random_numbers_in_the_forward_are_no_difference(images):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x + torch.randn_like(x))

    _, converted = int8_of(Noisy(), example_of(images))
    assert converted.checks[0].sqnr_db > 60


def test_float_copies_keep_their_fast_path(images):
    prepared = EagerMode().prepare(Attention(), example_of(images), Recipe("eager", "x86"))
    assert prepared_state(prepared).float_network.encoder.layers[0].activation_relu_or_gelu
    assert not prepared.encoder.layers[0].activation_relu_or_gelu


def test_functions_that_stay_float_are_told(images):
    _, converted = int8_of(Functional(), example_of(images))
    assert "Functions stay float in mode='eager': adaptive_avg_pool2d (1), mul (1)." in converted.notes
