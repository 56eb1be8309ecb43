"""A graph that is called with other inputs than it was traced with, by a step or by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning import Example, Recipe, calibrate, convert, prepare
from qat_lightning.errors import NetworkError
from qat_lightning.numerics.fake_quantize import FakeQuantize
from tests.callbacks.lit import CLASSES, Lit, Net, loader, qat, trainer


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
        (
            ["mask", "labels"],
            ["mask"],
            "inputs x, mask, labels, and is called with x, mask and without labels",
        ),
        (["mask", "labels"], [], "is called with x and without mask and labels"),
        ([], ["mask"], "is called with x, mask, of which the trace knows no mask"),
        (["labels"], ["mask"], "is called with x, mask and without labels, of which the trace knows no mask"),
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


def test_a_step_with_other_inputs_says_so_and_mode_eager_takes_them() -> None:
    module, run = Predicts(), trainer(qat("fx"), max_epochs=1)
    run.fit(module, loader())
    with pytest.raises(NetworkError, match=r"without labels.*mode='eager'"):
        run.predict(module, loader())
    module, run = Predicts(), trainer(qat("eager"), max_epochs=1)
    run.fit(module, loader())
    assert len(run.predict(module, loader())) == 4
