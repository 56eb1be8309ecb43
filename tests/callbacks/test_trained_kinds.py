"""QuantizationAwareTraining for dynamic and weight-only grids, in a real Trainer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from qat_lightning import (
    QuantizationAwareTraining,
    QuantizationMonitor,
    QuantizedModelExport,
    Scheme,
    evaluate_variants,
    load_quantized,
)
from qat_lightning.demos.data.resumable import resumable_loader
from qat_lightning.errors import (
    CheckpointMismatchError,
    CombinationError,
    ConfigurationError,
    ExportError,
    NetworkError,
)
from qat_lightning.graph.example import Example
from qat_lightning.layers.integer import why_not
from qat_lightning.modes.uncalibrated.training import DirectMode
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import CLASSES, MODES, Lit, assert_same_state, dataset, loader, state, trainer

TOKENS = Scheme(weight_bits=4, weight_granularity="per_group", weight_group_size=16, activation_granularity="per_token")
GRIDS: dict[str, tuple[Any, Scheme]] = {
    "dynamic": ("dynamic", Scheme()),
    "dynamic, 4 bits": ("dynamic", Scheme(weight_bits=4)),
    "dynamic by token": ("dynamic", TOKENS),
    "weight-only": ("weight_only", Scheme()),
    "weight-only, 3 bits in groups": (
        "weight_only",
        Scheme(weight_bits=3, weight_symmetric=False, weight_granularity="per_group", weight_group_size=32),
    ),
}


class Rows(nn.Module):
    """Attention over the rows of an image, with linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(24, 2, dropout=0.1, batch_first=True)
        self.mix = nn.Conv1d(24, 24, 3, padding=1)
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(8 * 24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x.flatten(1, 2))
        rows = rows + self.attention(rows, rows, rows, need_weights=False)[0]
        return self.head(self.norm(self.mix(rows.transpose(1, 2))).relu().flatten(1))


@pytest.fixture(autouse=True)
def _no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", "0")


def qat(mode: str, kind: Any = "dynamic", scheme: Scheme | None = None, **settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(mode=mode, kind=kind, scheme=scheme, **settings)


IN_EVERY_RUN = {
    ("eager", "dynamic"),
    ("eager", "weight-only, 3 bits in groups"),
    ("fx", "dynamic, 4 bits"),
    ("fx", "dynamic by token"),
    ("pt2e", "dynamic"),
}


@pytest.mark.parametrize(
    ("mode", "grid"),
    [
        pytest.param(mode, grid, marks=() if (mode, grid) in IN_EVERY_RUN else pytest.mark.slow)
        for mode in MODES
        for grid in GRIDS
        if (mode, grid) != ("pt2e", "dynamic by token")
    ],
)
def test_a_fit_ends_in_the_network_that_it_trained(mode: str, grid: str, tmp_path: Path) -> None:
    kind, scheme = GRIDS[grid]
    torch.manual_seed(0)
    module, callback = Lit(Rows()), qat(mode, kind, scheme, start=2)
    keys, order = list(module.state_dict()), [name for name, _ in module.named_parameters()]
    run = trainer(callback, max_epochs=5)
    run.fit(module, loader(), loader())
    assert [name for name, _ in module.named_parameters()] == order
    assert {key for key in module.state_dict() if not key.endswith(("clip", "_extra_state"))} == set(keys)
    assert callback.variants == ("float", "fake_quant", "int8")
    assert callback.quantized.recipe.kind == kind
    summary = evaluate_variants(run, module, dataloaders=loader())
    assert summary["int8/agreement"] == 1.0
    assert summary["int8/test/acc"] == summary["fake_quant/test/acc"] > 0.8
    whole = callback.quantized.whole
    assert whole is not None
    assert whole.sqnr_db >= 60
    callback.save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=Rows() if mode == "eager" else None)
    images = dataset(5)[:][0]
    assert torch.equal(loaded(images), callback.quantized(images))


@pytest.mark.parametrize("grid", ["dynamic by token", "weight-only, 3 bits in groups"])
def test_a_fit_is_resumed_bit_by_bit(grid: str, tmp_path: Path) -> None:
    def fit(*callbacks: Any, seed: int = 0, resumed: Path | None = None) -> dict[str, Any]:
        seed_everything(seed, verbose=False)
        module, callback = Lit(Rows()), qat("eager", *GRIDS[grid], start={"step": 3}, freeze_batchnorm={"step": 6})
        train = resumable_loader(dataset(), batch_size=16, seed=1, shuffle=True)
        run = trainer(callback, *callbacks, enable_checkpointing=bool(callbacks))
        # Dropout draws from the global generator, whose state a checkpoint of Lightning does not hold.
        module.net.attention.dropout = 0.0
        run.fit(module, train, ckpt_path=resumed and str(resumed))
        kept = {f"float.{key}": value for key, value in callback.float_weights("net").items()}
        return state(module) | kept | {"int8": callback.quantized(dataset()[:8][0])}

    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    expected = fit(saving)
    for step in (2, 3, 5):
        assert_same_state(fit(seed=step, resumed=tmp_path / f"step={step}.ckpt"), expected)


def test_before_the_start_a_fit_is_a_float_fit() -> None:
    def fit(*callbacks: Any) -> dict[str, Any]:
        torch.manual_seed(0)
        module = Lit(Rows())
        trainer(*callbacks, max_epochs=1).fit(module, loader())
        return state(module)

    alone = fit()
    prepared = fit(qat("eager", "weight_only", start=1, rehearse=False))
    assert_same_state(alone, {key: prepared[key] for key in alone})


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, save_last=True)
    trainer(qat("eager"), saving, max_epochs=1, enable_checkpointing=True).fit(Lit(Rows()), loader())
    with pytest.raises(CheckpointMismatchError, match="kind: 'weight_only' here, 'dynamic' there"):
        trainer(qat("eager", "weight_only")).fit(Lit(Rows()), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_the_monitor_has_a_row_for_each_rounded_weight(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callbacks = qat("eager", "dynamic", TOKENS), QuantizationMonitor(every_n_steps=2)
    trainer(*callbacks, max_epochs=1, logger=logger).fit(Lit(Rows()), loader())
    text = (Path(logger.log_dir) / "quantization_layers.csv").read_text()
    assert "embed" in text
    assert "head" in text


def test_auto_takes_a_mode_whose_network_a_file_holds() -> None:
    callback = qat("auto", "dynamic", start=1)
    trainer(callback).fit(Lit(Rows()), loader())
    assert callback.quantized.recipe.mode == "fx"


class Recurrent(nn.Module):
    """An LSTM, and a loop over values that cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.lstm(x.flatten(1, 2))[0]
        for _ in range(1 + int(x.sum() > 1e9)):
            rows = rows.tanh()
        return self.head(rows[:, -1])


def test_code_that_no_graph_has_trains_in_eager_and_says_what_stays_float() -> None:
    callback = qat("eager", "dynamic", start=1)
    trainer(callback).fit(Lit(Recurrent()), loader())
    reasons = {row.name: row.reason for row in callback.coverage if row.what == "layer"}
    assert "cannot be trained for its dynamic kernel" in reasons["net.lstm"]
    assert not reasons["net.head"]
    weights = qat("eager", "weight_only", start=1)
    trainer(weights).fit(Lit(Recurrent()), loader())
    assert all(row.quantized for row in weights.coverage)


class Shares(Lit):
    """Its head is the transposed table of its embedding."""

    def __init__(self) -> None:
        super().__init__(Tied())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(CLASSES, 64), nn.Linear(64, CLASSES, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) + self.table(torch.zeros(len(x), dtype=torch.long)))


@pytest.mark.parametrize("mode", ["eager", "fx"])
def test_tied_weights_stay_tied_and_are_rounded_alike(mode: str) -> None:
    module: LightningModule = Shares()
    callback = qat(mode, "weight_only", Scheme(weight_bits=4), start=1)
    trainer(callback).fit(module, loader())
    network: Any = module.net
    assert network.table.weight is network.head.weight
    assert callback.quantized.whole.sqnr_db >= 60


def test_averaged_weights_of_a_functional_call_are_rounded() -> None:
    network = nn.Sequential(nn.Embedding(5, 8), nn.LSTM(8, 4))
    tokens, recipe = torch.arange(5), Recipe("eager", "x86", Scheme(weight_bits=4), kind="weight_only", trained=True)
    prepared = DirectMode().prepare(copy.deepcopy(network), Example((tokens,)), recipe).eval()
    table = {"0.weight": network[0].weight.detach() * 0.5}
    rounded = torch.func.functional_call(prepared[0], {"weight": table["0.weight"]}, (tokens,))
    assert not torch.equal(rounded, table["0.weight"])
    network.load_state_dict(table, strict=False)
    expected = DirectMode().prepare(network, Example((tokens,)), recipe).eval()
    assert torch.equal(torch.func.functional_call(prepared, table, (tokens,))[0], expected(tokens)[0])


@pytest.mark.parametrize("mode", ["eager", "fx"])
@pytest.mark.parametrize("kind", ["dynamic", "weight_only"])
def test_hooks_on_layers_stay_with_their_integer_layers(mode: str, kind: str) -> None:
    module = Lit(Rows())
    module.net.embed.register_forward_hook(lambda layer, args, output: 2 * output)
    module.net.head.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    callback = qat(mode, kind)
    run = trainer(callback, max_epochs=1)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert {row.name for row in callback.coverage if row.quantized} >= {"net.embed", "net.head"}
    assert callback.fidelity["sqnr_db"] > 60


@pytest.mark.parametrize("hook", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_a_hook_computes_stays_float(hook: Any) -> None:
    recipe = Recipe("eager", "x86", kind="weight_only", trained=True)
    assert "computed from other parameters" in why_not(hook(nn.Linear(4, 4)), recipe)


def test_a_format_that_does_not_take_a_layer_is_named_before_the_first_step(tmp_path: Path) -> None:
    class Ends(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise InterruptedError("the first step")

    for on_fault, error in (("leave_float", InterruptedError), ("error", ExportError)):
        export = QuantizedModelExport(["exported_program"], dirpath=str(tmp_path))
        run = trainer(qat("eager", on_fault=on_fault), export, Ends())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(error) as raised:
                run.fit(Lit(Rows()), loader())
        said = [*(str(warning.message) for warning in caught), str(raised.value)]
        assert any("1 of 1 formats cannot hold" in text and "DynamicAttention" in text for text in said)
        assert "formats=[]" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "match", "settings"),
    [
        (ConfigurationError, "kind='int8' is unknown: use one of static", {"kind": "int8"}),
        (CombinationError, "mode='pt2e'.*use mode='fx' or 'eager'", {"mode": "pt2e", "scheme": TOKENS}),
        (CombinationError, "use kind=", {"mode": "pt2e", "backend": "xnnpack", "kind": "weight_only"}),
        (ConfigurationError, "kind='weight_only' or kind='dynamic'", {"kind": "static", "scheme": TOKENS}),
        (ConfigurationError, "learned_step", {"scheme": Scheme(learned_step="lsq")}),
        (ConfigurationError, "bias_correction_batches", {"bias_correction_batches": 2}),
        (ConfigurationError, "weight_symmetric", {"scheme": Scheme(weight_symmetric=False)}),
    ],
)
def test_what_cannot_be_is_refused_at_construction(
    error: type[Exception], match: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        QuantizationAwareTraining(**{"mode": "eager", "kind": "dynamic"} | settings)


def test_a_network_without_a_layer_of_the_kind_is_refused_before_a_step() -> None:
    module = Lit(nn.Sequential(nn.Conv2d(1, CLASSES, 8), nn.Flatten()))
    with pytest.raises(NetworkError, match="Conv2d has no dynamic kernel"):
        trainer(qat("eager")).fit(module, loader())
