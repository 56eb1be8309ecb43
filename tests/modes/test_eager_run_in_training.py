"""Networks that run other layers in training than in evaluation, in mode eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_lightning.callbacks.quantization_aware_training import QuantizationAwareTraining
from qat_lightning.graph.example import Example
from qat_lightning.modes.registry import get_mode
from qat_lightning.settings.recipe import Recipe
from tests.callbacks.lit import CLASSES, Lit, loader, trainer


class Body(nn.Module):
    """Three layers with functions between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


class OnlyEvaluated(Body):
    """A layer before the others that training skips; a function or a module may follow it."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.before = nn.Conv2d(1, 1, 1)
        self.activation = activation or F.relu
        nn.init.constant_(self.before.weight, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.training else self.activation(self.before(x)))


class SkippedInEvaluation(Body):
    """A layer before the others that only training runs, such as a learned augmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.before(x) if self.training else x)


class NoisyInTraining(Body):
    """An activation follows a layer in evaluation only."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.head(F.relu(self.second(self.relu(x))).mean((2, 3)))


def _fitted(network: nn.Module, **settings: Any) -> QuantizationAwareTraining:
    """Fit and test a network, and check that int8 computes what fake-quant does."""
    qat = QuantizationAwareTraining(mode="eager", **settings)
    module, run = Lit(network), trainer(qat)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert qat.fidelity["sqnr_db"] > 40
    return qat


def _left(qat: QuantizationAwareTraining) -> dict[str, str]:
    return {row.name: row.reason for row in qat.quantized.coverage if not row.quantized}


@pytest.mark.parametrize("activation", [None, nn.ReLU()], ids=["function", "module"])
def test_a_layer_that_only_evaluation_runs_costs_no_other_layer_and_is_named_before_training(activation: Any) -> None:
    with pytest.warns(UserWarning, match=r"not in training when the example ran: net\.before"):
        qat = _fitted(OnlyEvaluated(activation))
    assert list(_left(qat)) == ["before"]
    assert "training did not call it" in _left(qat)["before"]


def test_a_layer_whose_input_only_evaluation_gives_it_costs_no_other_layer() -> None:
    left = _left(_fitted(SkippedInEvaluation()))
    assert list(left) == ["first"]
    assert "no range of its input" in left["first"]


def test_an_activation_that_follows_in_evaluation_only_leaves_its_layer_int8() -> None:
    assert not _left(_fitted(NoisyInTraining()))


def test_a_layer_without_a_range_in_the_checkpoint_costs_itself_and_the_layer_that_shared_its_grid() -> None:
    module, qat = Lit(Body()), QuantizationAwareTraining(mode="eager")
    trainer(qat).fit(module, loader())
    state = {key: value for key, value in module.state_dict().items() if not key.startswith("net.first.")}
    again, tested = Lit(Body()), QuantizationAwareTraining(mode="eager")
    run = trainer(tested)
    run.test(again, loader(), verbose=False)
    again.load_state_dict(state, strict=False)
    run.test(again, loader(), verbose=False)
    assert list(_left(tested)) == ["first", "second"]
    assert "the checkpoint has no range of it" in _left(tested)["first"]
    assert "no range of its input is known" in _left(tested)["second"]
    assert tested.fidelity["sqnr_db"] > 40


class NeedsTargets(Body):
    """Training computes the loss inside, and so does not run on the example."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        scores = super().forward(x)
        if not self.training:
            return scores
        assert targets is not None
        return F.cross_entropy(scores, targets)


def test_a_network_whose_training_needs_other_inputs_than_the_example_is_observed_in_evaluation() -> None:
    example = Example((torch.randn(4, 1, 8, 8),))
    prepared = get_mode("eager").prepare(NeedsTargets(), example, Recipe("eager", "x86"))
    prepared.train()
    prepared(*example.args, torch.arange(4)).backward()
    assert all(row.quantized for row in get_mode("eager").coverage(prepared, example) if row.what == "layer")


def test_preparation_leaves_what_training_counts_as_it_was() -> None:
    class Counting(Body):
        steps = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.steps += 1
            return super().forward(x)

    network = Counting()
    get_mode("eager").prepare(network, Example((torch.randn(4, 1, 8, 8),)), Recipe("eager", "x86"))
    assert network.steps == 0
