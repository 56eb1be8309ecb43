"""Features of mode pt2e only; those of every mode are in test_every_pair."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import load_quantized
from qat_lightning.artifact.quantized import QuantizedNetwork
from qat_lightning.checks import LayerCheck
from qat_lightning.errors import ConversionError, NetworkError, TraceError, VerificationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.decomposed import compiling, int8
from qat_lightning.modes.prepared import cpu_copy, fake_quantizers, set_phase
from qat_lightning.modes.protocol import Converted
from qat_lightning.modes.pt2e import Pt2eMode
from qat_lightning.modes.pt2e.network import ExportedNetwork
from qat_lightning.modes.registry import get_mode
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.rehearsal.calibration import calibrate
from qat_lightning.settings.recipe import Recipe
from qat_lightning.settings.scheme import Scheme
from tests.support.exactness import needs_onednn

BACKENDS = ("x86", "xnnpack")


@pytest.fixture(autouse=True)
def decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes seconds, so only tests of it enable it."""
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


class Small(nn.Module):
    """BatchNorm with custom settings, a residual add with gamma 0, depthwise with ReLU6, dropout twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3, momentum=0.01), nn.ReLU6(inplace=True)
        )
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(2, 2)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        x = self.stem(x)
        y = self.bn(self.conv(x))
        y += x
        x = F.relu6(self.depthwise(self.relu(y)))
        x = F.dropout(self.drop(x.mean((2, 3))), 0.1, self.training)
        return {"logits": self.head(x) * scale, "rows": x.shape[0]}


IMAGES = Example((torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))


def prepare(network: nn.Module, example: Example = IMAGES, backend: str = "x86", **recipe: Any) -> ExportedNetwork:
    prefix = recipe.pop("prefix", "")
    prepared = Pt2eMode().prepare(network, example, Recipe("pt2e", backend, **recipe), prefix=prefix)
    assert isinstance(prepared, ExportedNetwork)
    return prepared


def fit(prepared: nn.Module, example: Example = IMAGES, steps: int = 3) -> None:
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    prepared.train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(t.square().mean() for t in floats(prepared(*example.args, **example.kwargs))).backward()
        optimizer.step()


def convert(prepared: nn.Module, example: Example = IMAGES) -> Converted:
    return Pt2eMode().convert(cpu_copy(prepared), example)


def floats(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def off(prepared: nn.Module) -> nn.Module:
    set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=False)
    return prepared


# Training


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rounding_it_is_the_float_network(backend: str) -> None:
    """In training and evaluation, with dropout and BatchNorm's settings, at any batch size and phase."""
    torch.manual_seed(0)
    network = Small()
    reference = copy.deepcopy(network)
    prepared = off(prepare(network, backend=backend))
    for training, size in ((True, 4), (False, 1), (True, 7), (False, 5), (True, 2)):
        prepared.train(training)
        reference.train(training)
        x = torch.randn(size, 3, 8, 8)
        torch.manual_seed(1)
        expected = reference(x)
        torch.manual_seed(1)
        actual = prepared(x)
        assert actual["rows"] == expected["rows"] == size
        assert torch.allclose(actual["logits"], expected["logits"], atol=1e-5)
    for name, value in reference.state_dict().items():
        assert torch.allclose(prepared.state_dict()[name].double(), value.double(), atol=1e-6), name


def test_flags_may_be_set_one_by_one() -> None:
    """Lightning sets ``training`` on each module after validation, without calling train."""
    network = Small()
    prepared = off(prepare(network)).eval()
    x = IMAGES.args[0]
    still = prepared(x)["logits"]
    for module in prepared.modules():
        module.training = True
    assert not torch.allclose(prepared(x)["logits"], still)
    prepared.stem.eval()
    before = prepared.state_dict()["stem.1.running_mean"].clone()
    prepared(x)
    assert torch.equal(prepared.state_dict()["stem.1.running_mean"], before)


def test_parameters_are_shared_and_keep_their_names() -> None:
    network = Small()
    network.stem[1].weight.data.uniform_(0.5, 1)
    parameters = dict(network.named_parameters())
    keys = set(network.state_dict())
    prepared = prepare(network)
    now = dict(prepared.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert keys <= set(prepared.state_dict())
    missing = prepared.load_state_dict(Small().state_dict(), strict=False)
    assert not missing.unexpected_keys


def test_batchnorm_moves_in_training_only_and_not_when_frozen() -> None:
    prepared = off(prepare(Small()))

    def statistics() -> dict[str, Tensor]:
        state = prepared.state_dict()
        return {n: v.clone() for n, v in state.items() if "running" in n or "tracked" in n}

    def moved(before: dict[str, Tensor]) -> set[bool]:
        return {not torch.equal(value, before[name]) for name, value in statistics().items()}

    for training, frozen, expected in ((False, False, False), (True, False, True), (True, True, False)):
        prepared.train(training)
        set_phase(prepared, fake_quant=False, observers=True, batchnorm_frozen=frozen)
        before = statistics()
        prepared(IMAGES.args[0])
        assert moved(before) == {expected}


def test_batchnorm_of_any_kind_has_its_flags() -> None:
    """A subclass, ``F.batch_norm`` on the network's tensors, and one without running statistics."""

    class Twice(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.twice, self.batch = Twice(3), nn.BatchNorm2d(3, track_running_stats=False)
            self.gamma = nn.Parameter(torch.full((3,), 0.5))
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.batch(self.conv2(self.twice(self.conv1(x))))
            return F.batch_norm(self.conv3(x), self.mean, self.var, self.gamma, None, self.training, 0.2, 1e-4)

    network = Kinds()
    reference = copy.deepcopy(network)
    prepared = off(prepare(network))
    for training in (True, False):
        prepared.train(training)
        reference.train(training)
        assert torch.allclose(prepared(IMAGES.args[0]), reference(IMAGES.args[0]), atol=1e-5)
    for name, value in reference.state_dict().items():
        assert torch.allclose(prepared.state_dict()[name], value), name
    fit(prepared)
    before = prepared.mean.clone()
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=True)
    prepared.train()(IMAGES.args[0])
    assert torch.equal(prepared.mean, before)
    assert min(check.sqnr_db for check in convert(prepared).checks) > 100


def test_gamma_of_zero_learns() -> None:
    torch.manual_seed(0)
    prepared = prepare(Small())
    fit(prepared, steps=1)
    # A channel whose ReLU6 is off on the whole batch has no gradient in the float network either.
    assert prepared.bn.weight.count_nonzero() >= 5
    assert prepared.bn.weight.isfinite().all()


def test_relu6_is_observed_only_behind() -> None:
    """Its range, 0 to 6, is the finer grid; before it there is no FakeQuantize."""
    for backend in BACKENDS:
        prepared = prepare(Small(), backend=backend)
        names = {node.name: node for node in prepared.graph.nodes}
        clamps = [node for node in prepared.graph.nodes if "hardtanh" in str(node.target)]
        assert len(clamps) == 2, names
        assert all("fake_quantize" not in str(node.args[0].target) for node in clamps)
        assert backend == "x86" or any("hardtanh" in name for name, _ in fake_quantizers(prepared))


def test_shared_ranges_are_a_union_observed_once_a_batch() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)
            self.large.weight.data.mul_(20)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([F.relu(self.small(x)), F.relu(self.large(x))], 1)
            return self.last(F.adaptive_avg_pool2d(x, 2))

    for backend in BACKENDS:
        network = Join()
        prepared = prepare(network, backend=backend, scheme=Scheme(averaging_constant=1.0)).train()
        off(prepared)(IMAGES.args[0])
        widest = F.relu(network.large(IMAGES.args[0])).max()
        shared = [fq for _, fq in fake_quantizers(prepared) if fq.source != "present" and "relu" in _]
        assert [fq.max_val.item() for fq in shared] == [pytest.approx(widest.item())]


def test_a_part_cannot_be_called_and_other_inputs_are_refused() -> None:
    prepared = prepare(Small())
    assert prepared.unused.in_features == 2
    assert isinstance(prepared.conv, nn.Conv2d)
    with pytest.raises(NetworkError, match="merged into one graph"):
        prepared.stem(IMAGES.args[0])
    with pytest.raises(NetworkError, match=r"x = \(batch, 3, 8, 8\).*\(4, 3, 9, 9\)"):
        prepared(torch.randn(4, 3, 9, 9))
    with pytest.raises(NetworkError, match="with the inputs x"):
        prepared(IMAGES.args[0], scale=2.0)


def test_inputs_by_any_name_and_order() -> None:
    class Inputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, data: dict[str, Tensor], pair: tuple[Tensor, Tensor], *, flag: bool = True) -> dict[str, Any]:
            x = self.one(data["a"]) + self.two(data["b"])
            x = x + pair[0][:, None] if flag else x
            return {"out": x, "more": (pair[1], [x * 2]), "none": None, "three": 3}

    a, b, u, v = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4), torch.randn(4, 2)
    example = Example(({"a": a, "b": b},), {"pair": (u, v), "flag": True})
    network = Inputs()
    expected = copy.deepcopy(network)({"a": a, "b": b}, (u, v), flag=True)
    prepared = off(prepare(network, example)).eval()
    actual = prepared(pair=(u, v), flag=True, data={"b": b, "a": a})
    assert actual["none"] is None
    assert actual["three"] == 3
    assert all(torch.equal(x, y) for x, y in zip(floats(actual), floats(expected), strict=True))
    with pytest.raises(NetworkError, match="flag = True"):
        prepared({"a": a, "b": b}, (u, v), flag=False)


def test_no_grad_blocks_are_quantized_and_stay_without_gradient() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = F.relu(self.body(x))
            return self.head(x)

    example = Example((torch.randn(4, 8),))
    prepared = prepare(Frozen(), example)
    fit(prepared, example)
    assert prepared.body.weight.grad is None
    assert prepared.head.weight.grad is not None
    assert all(row.quantized for row in convert(prepared, example).coverage)


# Refusing


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > 0:
            return self.layer(x)
        return x


class FixedBatch(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(4, 2, 2)


class Random(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * torch.rand(4) if self.training else x)


class TwoWays(Branch):
    def forward(self, x: Tensor) -> Any:
        return (self.layer(x), x) if self.training else self.layer(x)


class MaximumNorm(Branch):
    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data = torch.renorm(self.layer.weight.data, p=2, dim=0, maxnorm=0.3)
        return self.layer(x)


class WritesData(Branch):
    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data.clamp_(-0.3, 0.3)
        return self.layer(x)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Branch, r"test_pt2e\.py:\d+ in forward: if float\(x\.mean\(\)\) > 0.*mode='eager'"),
        (FixedBatch, "only for the batch size 4"),
        (Random, r"draws random numbers.*test_pt2e\.py:\d+"),
        (TwoWays, r"different values in evaluation"),
        (MaximumNorm, r"uses the \.data of a parameter, which is not part of a graph.*mode='eager'"),
        (WritesData, r"uses the \.data of a parameter, which is not part of a graph.*mode='eager'"),
    ],
)
def test_what_cannot_be_captured_is_refused(network: type[nn.Module], message: str) -> None:
    made = network().eval()
    with pytest.raises(TraceError, match=message):
        prepare(made, Example((torch.randn(4, 4),)))
    assert not made.training


def test_batchnorm_that_averages_over_all_batches_is_named() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    with pytest.raises(TraceError, match=r"momentum=None.*: '1'\. .*momentum=0\.1.*mode='fx'"):
        prepare(network, Example((torch.randn(4, 4),)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_quantize_is_an_error(backend: str) -> None:
    with pytest.raises(NetworkError, match=r"nothing to quantize.*Conv2d"):
        prepare(Small(), backend=backend, include=("nowhere",))


# Converting


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "scheme",
    [Scheme(), Scheme(weight_bits=4), Scheme(weight_granularity="per_tensor"), Scheme(activation_symmetric=True)],
)
@pytest.mark.slow
def test_int8_equals_fake_quant(backend: str, scheme: Scheme) -> None:
    torch.manual_seed(0)
    prepared = prepare(Small(), backend=backend, scheme=scheme)
    fit(prepared)
    converted = convert(prepared)
    assert min(check.sqnr_db for check in converted.checks) > 100
    reference = cpu_copy(prepared)
    for size in (1, 16):
        x = torch.randn(size, 3, 8, 8)
        expected, actual = reference(x), converted.network(x)
        assert sqnr_db(expected["logits"], actual["logits"]) > 60
        assert actual["rows"] == size
    weights = [t for t in converted.network.state_dict().values() if t.dtype is torch.int8 and t.dim() > 1]
    assert len(weights) == 4
    assert max(t.abs().max() for t in weights) == scheme.weight_quant_max
    assert not list(converted.network.parameters())


def test_batchnorm_folds_into_every_kind_of_layer() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8, affine=False)
            self.up, self.bn2 = nn.ConvTranspose1d(8, 4, 2), nn.BatchNorm1d(4)
            self.linear, self.bn3 = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn2(self.up(F.relu(self.bn1(self.conv1(x))))))
            return self.bn3(self.linear(x.mean(2)))

    for backend in BACKENDS:
        example = Example((torch.randn(8, 4, 9),))
        prepared = prepare(Kinds(), example, backend=backend)
        fit(prepared, example)
        converted = convert(prepared, example)
        assert not any("batch_norm" in str(node.target) for node in converted.network.decomposed.graph.nodes)
        assert min(check.sqnr_db for check in converted.checks) > 100
        reasons = {row.name: row.reason for row in converted.coverage}
        assert reasons["conv1"] == reasons["linear"] == reasons["up"] == ""


def test_a_layer_called_twice_is_stored_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
            self.other = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.block[0](self.block(self.block(x))))

    for backend in BACKENDS:
        prepared = prepare(Twice(), backend=backend)
        fit(prepared)
        converted = convert(prepared)
        weights = [t for t in converted.network.state_dict().values() if t.dtype is torch.int8 and t.dim() > 1]
        assert len(weights) <= 2, "at most one with each BatchNorm"
        assert min(check.sqnr_db for check in converted.checks) > 100
        assert all(row.quantized for row in converted.coverage)


def test_selection_is_relative_to_the_lightning_module() -> None:
    prepared = prepare(Small(), prefix="net", exclude=("net.head", "net.stem.*"))
    fit(prepared)
    converted = convert(prepared)
    rows = {row.name: row for row in converted.coverage}
    assert {name for name, row in rows.items() if row.quantized} == {"conv", "depthwise"}
    assert rows["head"].reason == rows["stem.0"].reason == "excluded"
    assert rows["unused"].reason == "not used by forward"


def test_unseen_ranges_leave_layers_float() -> None:
    prepared = prepare(Small())
    with pytest.raises(ConversionError, match="No finite range"):
        convert(prepared)
    fit(prepared)
    names = [name for name, fq in fake_quantizers(prepared) if fq.source == "moving_average"]
    fq = prepared.get_submodule(names[-1])
    fq.forget()
    converted = convert(prepared)
    rows = {row.name: row for row in converted.coverage}
    assert rows["stem.0"].quantized
    assert not rows["head"].quantized
    assert "range" in rows["head"].reason
    assert any("range" in note for note in converted.notes)


def test_a_wrong_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_lightning.modes.pt2e import mode as flow

    prepared = prepare(Small())
    fit(prepared)
    right = flow.decompose

    def wrong(*args: Any) -> Any:
        result = right(*args)
        buffers = dict(result.graph_module.named_buffers())
        buffers["depthwise_bias"].add_(1.0)
        return result

    monkeypatch.setattr(flow, "decompose", wrong)
    with pytest.raises(VerificationError, match=r"'depthwise'.*conv2d"):
        convert(prepared)


def test_int8_is_an_ordinary_module() -> None:
    prepared = prepare(Small())
    fit(prepared)
    network = convert(prepared).network
    x = IMAGES.args[0]
    expected = network.eval().train().eval()(x)["logits"]
    assert torch.equal(copy.deepcopy(network)(x)["logits"], expected)
    network.load_state_dict(network.state_dict())
    assert not network(x)["logits"].requires_grad
    unpickled = pickle.loads(pickle.dumps(network))
    assert torch.equal(unpickled(x)["logits"], expected)
    integers = [value.dtype for value in network.state_dict().values()]
    assert [value.dtype for value in unpickled.state_dict().values()] == integers
    assert torch.int8 in integers


# Recurrent layers


class Sequence(nn.Module):
    """A recurrent layer between two linear ones, with given arguments."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.rnn = kind(8, 12, **settings)
        self.head = nn.Linear(24 if self.rnn.bidirectional else 12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.rnn.batch_first:
            return self.head(self.rnn(x)[0].mean(1))
        return self.head(self.rnn(x.transpose(0, 1))[0].mean(0))


ROWS = Example((torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)),))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_first": True},
        {"batch_first": True, "bidirectional": True},
        {"num_layers": 2, "bias": False},
        {"batch_first": True, "dropout": 0.3},  # behind each layer but the last, so behind none
    ],
    ids=["one way", "both ways", "two layers", "dropout"],
)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_recurrent_layers_train_and_stay_float(
    backend: str, kind: type[nn.RNNBase], settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = Sequence(kind, **settings)
    reference = copy.deepcopy(network)
    prepared = off(prepare(network, ROWS, backend=backend))
    for training, size in ((True, 7), (False, 3)):
        x = torch.randn(size, 5, 6)
        torch.testing.assert_close(prepared.train(training)(x), reference.train(training)(x), rtol=1e-5, atol=1e-6)
    fit(prepared, ROWS)
    trained = dict(prepared.named_parameters())
    assert not any(torch.equal(trained[name], value) for name, value in reference.named_parameters())
    converted = convert(prepared, ROWS)
    rows = {row.name: row for row in converted.coverage}
    assert {name for name, row in rows.items() if row.quantized} == {"embed", "head"}
    assert rows["rnn"].kind == kind.__name__
    assert "has no rule for aten." in rows["rnn"].reason
    x = torch.randn(9, 5, 6)
    with torch.no_grad():
        assert sqnr_db(prepared.eval()(x), converted.network(x)) > 60
    saved = QuantizedNetwork(converted, Recipe("pt2e", backend), ROWS)
    saved.save(tmp_path / "model.int8")
    assert torch.equal(load_quantized(tmp_path / "model.int8")(x), saved(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_calibrated_around(kind: type[nn.RNNBase]) -> None:
    prepared = prepare(Sequence(kind, num_layers=2, batch_first=True), ROWS, kind="static")
    calibrate(prepared, [ROWS])
    rows = {row.name: row for row in convert(prepared, ROWS).coverage}
    assert {name for name, row in rows.items() if row.quantized} == {"embed", "head"}
    excluded = prepare(Sequence(kind, batch_first=True), ROWS, exclude=("rnn", "embed"))
    rows = {row.name: row for row in Pt2eMode().coverage(excluded, ROWS) if row.what == "layer"}
    assert rows["rnn"].reason == rows["embed"].reason == "excluded"
    assert rows["head"].quantized


def test_cells_are_reported_float() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.gru(self.lstm(x[:, 0])[0])))

    prepared = prepare(Step(), ROWS)
    fit(prepared, ROWS)
    rows = {row.name: row for row in convert(prepared, ROWS).coverage}
    assert {name for name, row in rows.items() if row.quantized} == {"head"}
    assert "aten.lstm_cell" in rows["lstm"].reason
    assert "aten.gru_cell" in rows["gru"].reason
    assert "aten.rnn_tanh_cell" in rows["rnn"].reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_inside_a_recurrent_layer_is_refused(kind: type[nn.RNNBase]) -> None:
    network = Sequence(kind, num_layers=2, batch_first=True, dropout=0.3)
    with pytest.raises(TraceError, match=r"dropout=0\.3 between its layers.*fixed in the graph.*mode='fx'") as caught:
        prepare(network, ROWS)
    assert "random numbers" not in str(caught.value)
    for mode in ("fx", "eager"):  # what the message says
        assert get_mode(mode).prepare(copy.deepcopy(network), ROWS, Recipe(mode, "x86"))


# Compiling


@pytest.mark.slow
@needs_onednn
def test_compiled_equals_decomposed_at_any_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One library for all batch sizes, shared by copies."""
    torch.manual_seed(0)
    prepared = prepare(Small())
    fit(prepared)
    network = convert(prepared).network
    reference = copy.deepcopy(network)
    assert network.runs == "not compiled yet"
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")
    network(torch.randn(1, 3, 8, 8))
    assert network.runs == "aotinductor", network.why_decomposed
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")
    copied = copy.deepcopy(network)
    assert copied.runs == "aotinductor"
    for size in (1, 3, 16):
        x = torch.randn(size, 3, 8, 8).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            expected, actual = reference(x), copied(x)
        assert actual["rows"] == size
        assert sqnr_db(expected["logits"], actual["logits"]) > 45
    network.load_state_dict(network.state_dict())
    assert network.runs == "not compiled yet"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@needs_onednn
def test_recurrent_layers_are_compiled(monkeypatch: pytest.MonkeyPatch, kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    prepared = prepare(Sequence(kind, batch_first=True, bidirectional=True), ROWS)
    fit(prepared, ROWS)
    network = convert(prepared, ROWS).network
    reference = copy.deepcopy(network)
    x = torch.randn(9, 5, 6)
    expected = reference(x)
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")
    network(*ROWS.args)
    assert network.runs == "aotinductor", network.why_decomposed
    assert sqnr_db(expected, network(x)) > 45


@pytest.mark.slow
@needs_onednn
def test_compiled_layers_equal_on_images_of_one_channel() -> None:
    """Inductor reads the output of the first convolution in the wrong layout if the batch size is dynamic."""
    layers = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 1), nn.ReLU())
    example = Example((torch.randn(4, 1, 8, 8),))
    prepared = prepare(nn.Sequential(*layers, nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()), example)
    fit(prepared, example)
    network = convert(prepared, example).network
    with torch.no_grad():
        checks = compiling.check_kernels(network.decomposed, network.spec, list(example.args))
    assert {check.name for check in checks} >= {"0", "3"}
    assert min(check.sqnr_db for check in checks) > 60


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["compiler", "values"])
@needs_onednn
def test_falling_back_says_so_once(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    prepared = prepare(Small())
    fit(prepared)
    network = convert(prepared).network
    x = IMAGES.args[0]
    expected = network(x)["logits"]
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "1")

    def compile(decomposed: Any, spec: Any, tensors: list[Tensor]) -> Any:
        if failure == "compiler":
            raise RuntimeError("no g++")
        return lambda *inputs: [torch.randn(len(inputs[0]), 4), 4]

    monkeypatch.setattr(int8, "compile_library", compile)
    wrong = [LayerCheck("head", "aten.linear.default", 9.0, 40.0)]
    monkeypatch.setattr(compiling, "check_kernels", lambda *inputs: wrong)
    with pytest.warns(UserWarning, match="no g\\+\\+" if failure == "compiler" else "layer 'head'.*9.0 dB"):
        assert sqnr_db(expected, network(x)["logits"]) > 60
    assert network.runs == "onednn"
    assert network.compiled_package(x) == b""
    assert network.why_decomposed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(x)


def test_xnnpack_runs_decomposed_and_says_so() -> None:
    prepared = prepare(Small(), backend="xnnpack")
    fit(prepared)
    converted = convert(prepared)
    assert converted.network.runs == "decomposed"
    assert any("xnnpack" in note for note in converted.notes)


def test_the_file_of_a_network_with_a_region_without_autocast_loads(tmp_path: Path) -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            with torch.autocast(x.device.type, enabled=False):
                return x * x.float().mean((2, 3), keepdim=True)  # export checks the dtype of what .float() is given

    example = Example((torch.randn(2, 3, 8, 8),))
    prepared = prepare(Guarded(), example)
    calibrate(prepared, [example.args[0]])
    quantized = QuantizedNetwork(convert(prepared, example), Recipe("pt2e", "x86"), example)
    quantized.save(tmp_path / "guarded.int8")
    assert torch.equal(load_quantized(tmp_path / "guarded.int8")(*example.args), quantized(*example.args))
