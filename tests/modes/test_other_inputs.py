"""A graph that is called with other inputs than it was traced with, by a step or by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import (
    Example,
    QuantizedModelExport,
    Recipe,
    calibrate,
    convert,
    evaluate_variants,
    load_quantized,
    prepare,
)
from qat_lightning.errors import ExportError, NetworkError
from qat_lightning.export.run import export_quantized, open_artifact
from qat_lightning.numerics.fake_quantize import FakeQuantize
from qat_lightning.numerics.sqnr import sqnr_db
from qat_lightning.settings.engines import onednn_is_exact
from tests.callbacks.lit import CLASSES, Lit, Net, loader, qat, trainer
from tests.support.exactness import SEVEN_BITS


class WithLoss(nn.Module):
    """As networks of transformers: a mask that may be left out, and a loss where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.first(x).relu()
        scores = self.second(x if mask is None else x * mask)
        return {"logits": scores} if labels is None else {"logits": scores, "loss": F.cross_entropy(scores, labels)}


GIVEN = {"mask": torch.ones(4, 8), "labels": torch.arange(4)}


@pytest.mark.parametrize(
    ("traced", "called", "says"),
    [
        (["mask", "labels"], ["labels"], "inputs x, mask, labels, and is called with x, labels and without mask"),
        (["mask", "labels"], [], "is called with x and without mask and labels"),
        (
            [],
            ["mask"],
            r"inputs x, mask=None, and is called with x, mask=float32 tensor \[4, 8\]; .* fixes the value of mask",
        ),
        (
            ["labels"],
            ["mask"],
            r"x, mask=float32 tensor \[4, 8\] and without labels; the trace fixes the value of mask\.",
        ),
    ],
)
def test_the_error_names_the_inputs_of_the_trace_and_those_of_the_call(
    traced: list[str], called: list[str], says: str
) -> None:
    x = torch.randn(4, 4)
    example = Example((x,), {name: GIVEN[name] for name in traced})
    prepared = prepare(WithLoss().eval(), example, Recipe("fx", "x86", kind="static"))
    calibrate(prepared, [example])
    for network in (prepared, convert(prepared, example)):
        assert "logits" in network(*example.args, **example.kwargs)
        with pytest.raises(NetworkError, match=f"{says}.*mode='eager', which needs no graph"):
            network(x, **{name: GIVEN[name] for name in called})


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_an_error_that_is_not_of_the_inputs_stays_as_it_is(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)

        def forward(self, data: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.first(data["a"]) + pair[0] * pair[1]

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("of the device")

    example = Example(({"a": torch.randn(4, 4)}, (torch.randn(4, 8), torch.randn(4, 8))))
    prepared = prepare(Structured(), example, Recipe(mode, "x86"))
    monkeypatch.setattr(FakeQuantize, "forward", fails)
    with pytest.raises(MemoryError, match="of the device"):
        prepared(*example.args)


class OfABatch(nn.Module):
    """Takes a batch as one container, in which some entries are not tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, batch: Any) -> Tensor:
        x, mask, how = (batch["x"], batch["mask"], batch["how"]) if isinstance(batch, dict) else batch
        hidden = self.first(x).relu()
        if mask is not None:
            hidden = hidden * mask
        if how == "double":
            hidden = hidden * 2
        scores: Tensor = self.second(hidden)
        return scores


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
@pytest.mark.parametrize("mask", [None, torch.ones(4, 8)], ids=["no mask", "mask"])
@pytest.mark.parametrize("how", [None, "double"])
@pytest.mark.parametrize("kind", [dict, tuple])
def test_entries_of_a_container_that_are_no_tensors_are_as_traced(
    mode: str, mask: Tensor | None, how: str | None, kind: type, tmp_path: Path
) -> None:
    entries = {"x": torch.randn(4, 4), "mask": mask, "how": how}
    batch = entries if kind is dict else tuple(entries.values())
    network, example = OfABatch().eval(), Example((batch,))
    prepared = prepare(network, example, Recipe(mode, "x86", kind="static"))
    wanted = OfABatch.forward(network, batch)
    calibrate(prepared, [example])
    convert(prepared, example).save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8")
    assert sqnr_db(wanted, loaded(batch)) > 25
    other = "tripled" if how else "double"
    changed = entries | {"how": other}
    with pytest.raises(NetworkError, match=other):
        loaded(changed if kind is dict else tuple(changed.values()))


def test_strings_beside_the_inputs_may_change_from_batch_to_batch(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, CLASSES)

        def forward(self, batch: Any) -> Tensor:
            scores: Tensor = self.second(self.first(batch["x"]).relu())
            return scores

    def batch(number: int) -> Any:
        return {"x": torch.randn(4, 4), "path": [f"{number}-{place}.png" for place in range(4)], "split": str(number)}

    example = Example((batch(0),))
    prepared = prepare(Named(), example, Recipe("fx", "x86", kind="static"))
    calibrate(prepared, [Example((batch(number),)) for number in range(3)])
    convert(prepared, example).save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8")
    assert loaded(batch(7)).shape == (4, CLASSES)


class Predicts(Lit):
    """Its prediction leaves out the labels, which training gives."""

    def __init__(self) -> None:
        super().__init__(Labelled())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0], batch[1])["loss"]

    def _evaluate(self, stage: str, batch: Any) -> None:
        self.log(f"{stage}/loss", self.net(batch[0], batch[1])["loss"])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])["logits"]


class Labelled(Net):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        scores = super().forward(x)
        return {"logits": scores} if labels is None else {"logits": scores, "loss": F.cross_entropy(scores, labels)}


@pytest.mark.parametrize("mode", ["eager", "fx", pytest.param("pt2e", marks=pytest.mark.slow)])
def test_a_step_may_leave_out_labels(mode: str, tmp_path: Path) -> None:
    module, callback = Predicts(), qat(mode)
    trainer(callback, max_epochs=1).fit(module, loader())
    predicted = torch.cat(trainer(callback).predict(module, loader()))
    int8, (batch, *_) = callback.quantized, loader()
    assert torch.equal(predicted[: len(batch[0])], int8(batch[0], batch[1])["logits"])
    callback.save(tmp_path / "net.int8")
    loaded = load_quantized(tmp_path / "net.int8", network=Labelled() if mode == "eager" else None)
    assert torch.equal(loaded(batch[0])["logits"], int8(batch[0])["logits"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("fx", "torchscript"),
        pytest.param("fx", "onnx", marks=pytest.mark.nightly),
        pytest.param("pt2e", "pt2", marks=pytest.mark.nightly),
    ],
)
def test_files_are_for_inference_and_a_step_that_reads_the_loss_runs_them(mode: str, form: str, tmp_path: Path) -> None:
    module, export = Predicts(), QuantizedModelExport([form], dirpath=str(tmp_path), batches=2)
    run = trainer(qat(mode, scheme=SEVEN_BITS), export, max_epochs=1)
    run.fit(module, loader())
    result = export.results[form]
    assert result.passed, result.error
    batch = next(iter(loader()))
    with open_artifact(result) as artifact:
        assert artifact(batch[0]).keys() == {"logits"}
        assert artifact(*batch).keys() == {"logits", "loss"}
    figures = evaluate_variants(run, module, dataloaders=loader())
    assert figures[f"{form}/test/loss"] == pytest.approx(
        figures["int8/test/loss"], rel=1e-4 if onednn_is_exact() else 0.02
    )


class NeedsMore(Labelled):
    """Its loss reads a layer's output that is not among the results."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        scores = Net.forward(self, x)
        logits = scores.softmax(-1)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(scores, labels)}


@pytest.mark.slow
def test_a_loss_that_a_file_lacks_values_for_is_refused_in_words(tmp_path: Path) -> None:
    x, labels = next(iter(loader()))
    example = Example((x,), {"labels": labels})
    prepared = prepare(NeedsMore().eval(), example, Recipe("fx", "x86", kind="static"))
    calibrate(prepared, [example])
    (result,) = export_quantized(prepared, tmp_path, ["torchscript"], example=example)
    assert result.passed, result.error
    with open_artifact(result) as artifact:
        assert artifact(x).keys() == {"logits"}
        with pytest.raises(ExportError, match="for inference and has no labels among its inputs"):
            artifact(x, labels)


class Masked(Net):
    """An optional input adds a result for each sample, which is no loss."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        scores = super().forward(x)
        return {"logits": scores} if mask is None else {"logits": scores, "masked": scores * mask}


@pytest.mark.slow
def test_a_file_keeps_an_input_that_adds_results_for_each_sample(tmp_path: Path) -> None:
    x, _ = next(iter(loader()))
    example = Example((x,), {"mask": torch.ones(len(x), CLASSES)})
    prepared = prepare(Masked().eval(), example, Recipe("fx", "x86", kind="static"))
    calibrate(prepared, [example])
    int8 = convert(prepared, example)
    assert int8(x).keys() == {"logits"}
    (result,) = export_quantized(int8, tmp_path, ["torchscript"], example=example)
    with open_artifact(result) as artifact:
        assert artifact(*example.args, **example.kwargs).keys() == {"logits", "masked"}


class Looks(nn.Module):
    """Ids and a mask of integers, as a tokenizer gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.first(self.table(ids)).relu() * mask[:, :, None]
        scores: Tensor = self.second(hidden.sum(1))
        return scores


def looked_up() -> tuple[Example, Any, Any]:
    """A call, and the prepared and the int8 network of it."""
    torch.manual_seed(0)
    example = Example((torch.randint(9, (4, 6)), torch.randint(2, (4, 6))))
    prepared = prepare(Looks().eval(), example, Recipe("pt2e", "x86", SEVEN_BITS, kind="static"))
    calibrate(prepared, [example])
    return example, prepared, convert(prepared, example)


@pytest.mark.parametrize("compiled", ["0", pytest.param("1", marks=pytest.mark.slow)], ids=["graph", "compiled"])
def test_narrower_integers_are_the_same_ids(compiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_LIGHTNING_COMPILE", compiled)
    example, prepared, int8 = looked_up()
    ids, mask = example.args
    int8.save(tmp_path / "net.int8")
    for network in (prepared.eval(), int8, load_quantized(tmp_path / "net.int8")):
        wanted = network(ids, mask)
        assert torch.equal(network(ids.int(), mask.bool()), wanted)
        assert torch.equal(network(ids.to(torch.uint8), mask.to(torch.int8)), wanted)
        with pytest.raises(NetworkError, match=r"captured for mask of torch.int64 and is called with torch.float32"):
            network(ids, mask.float())


@pytest.mark.slow
def test_a_file_is_called_with_narrower_integers(tmp_path: Path) -> None:
    example, _, int8 = looked_up()
    ids, mask = example.args
    (result,) = export_quantized(int8, tmp_path, ["pt2"], example=example)
    with open_artifact(result) as artifact:
        assert torch.equal(artifact(ids.int(), mask.bool()), artifact(ids, mask))
        with pytest.raises(ExportError, match=r"exported for an input of torch.int64 .*with torch.float32"):
            artifact(ids, mask.float())
