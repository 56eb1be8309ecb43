"""The arithmetic of distillation, and the features of networks prepared in every mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import prepared_state, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes.distillation import (
    DistillationSettings,
    Distiller,
    check_distillation,
    chosen_outputs,
    distillation_loss,
    feature_loss,
    make_teacher,
)
from qat_lightning.recipes.features import Features
from qat_lightning.settings.recipe import Recipe
from tests.support.networks import CASES, Case

MODES = ("eager", "fx", "pt2e")


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(5, 3), (2, 7), (2, 4, 3, 3)]),
    temperature=st.floats(0.5, 10),
    seed=st.integers(0, 1000),
)
def test_the_gradient_is_that_of_soft_targets(shape: tuple[int, ...], temperature: float, seed: int) -> None:
    """Hinton et al., equation 2: T (softmax(student / T) - softmax(teacher / T)), over the rows."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    distillation_loss(student, teacher, temperature).backward()
    rows = student.numel() / shape[1]
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1)) / rows
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected.detach(), atol=1e-6, rtol=1e-5)


def test_the_loss_is_that_of_torch() -> None:
    student, teacher = torch.randn(8, 5), torch.randn(8, 5)
    expected = F.kl_div((student / 3).log_softmax(1), (teacher / 3).softmax(1), reduction="batchmean")
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), 9 * expected)


def test_losses_are_in_float32_under_autocast() -> None:
    scores = torch.randn(4, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert distillation_loss(scores, scores + 1).dtype == torch.float32
        assert feature_loss(scores, scores * 2).dtype == torch.float32


def test_feature_loss_has_no_scale_and_takes_zeros() -> None:
    ours, theirs = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(feature_loss(ours * 1e3, theirs * 1e3), feature_loss(ours, theirs))
    assert feature_loss(torch.zeros(3), torch.zeros(3)) == 0


def test_outputs_are_chosen_by_key_position_and_attribute() -> None:
    logits, boxes = torch.zeros(2, 5), torch.zeros(2, 4)
    assert chosen_outputs({"logits": logits, "boxes": boxes}, ("logits",), "kl")[0] is logits
    assert chosen_outputs((boxes, logits), ("1",), "kl")[0] is logits
    assert len(chosen_outputs((boxes, logits), None, "kl")) == 2
    named = type("Output", (), {"logits": logits})()
    assert chosen_outputs(named, ("logits",), "mse")[0] is logits
    with pytest.raises(ConfigurationError, match=r"'scores' is not a tensor of scores.*keys 'logits'"):
        chosen_outputs({"logits": logits}, ("scores",), "kl")
    with pytest.raises(ConfigurationError, match="use loss='mse'"):
        chosen_outputs(torch.zeros(3, 1), None, "kl")


def prepare(mode: str, case: Case) -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    network = case.network()
    args, kwargs, _ = case.batch(8)
    # Statistics of the data, so that BatchNorm does something.
    network.train()(*args, **kwargs)
    example = Example(args, kwargs)
    return get_mode(mode).prepare(network, example, Recipe(mode, "x86")), example


CASE = {case.name: case for case in CASES}
FEATURES = {
    "plain": ["head"],
    "residual": ["stem", "pool"],
    "depthwise": ["expand", "depthwise", "project"],
    "several_inputs": ["side"],
    "attention": ["norm2", "mlp"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FEATURES)
def test_features_are_those_of_the_float_network(mode: str, name: str) -> None:
    """The check itself compares them; then they get gradients, and the network is as it was."""
    prepared, example = prepare(mode, CASE[name])
    wanted = DistillationSettings(features=tuple(FEATURES[name]))
    check_distillation(prepared, example, wanted)
    plain = prepared.__dict__.get("_run")
    hooks = [len(module._forward_hooks) for module in prepared.modules()]
    distiller = Distiller(prepared, make_teacher(prepared, prepared_state(prepared).float_network.state_dict()), wanted)
    set_phase(prepared, fake_quant=True, observers=True, batchnorm_frozen=False)
    with distiller.features():
        distiller.run(prepared.train(), *example.args, **example.kwargs)
    loss = distiller.take_loss()
    assert loss is not None
    assert loss > 0
    loss.backward()
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in prepared.parameters())
    distiller.close()
    assert prepared.__dict__.get("_run") is plain
    assert [len(module._forward_hooks) for module in prepared.modules()] == hooks


@pytest.mark.parametrize("mode", MODES)
def test_features_that_are_not_there(mode: str) -> None:
    prepared, example = prepare(mode, CASE["depthwise"])
    with pytest.raises(ConfigurationError, match="no module 'expnd'"):
        check_distillation(prepared, example, DistillationSettings(features=("expnd",)))


def test_a_feature_that_is_merged_away_names_what_to_take() -> None:
    prepared, example = prepare("fx", CASE["depthwise"])
    with pytest.raises(ConfigurationError, match="another tensor in mode='fx'"):
        check_distillation(prepared, example, DistillationSettings(features=("expand.0",)))
    with pytest.raises(ConfigurationError, match=r"merged with its neighbours .* 'expand'"):
        check_distillation(prepared, example, DistillationSettings(features=("expand.1",)))


def test_a_feature_that_is_no_tensor() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"x": x}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.pair, self.head = nn.Linear(4, 4), Pair(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pair(self.layer(x))["x"])

    example = Example((torch.randn(4, 4),))
    prepared = get_mode("eager").prepare(Net(), example, Recipe("eager", "x86"))
    with pytest.raises(ConfigurationError, match="not one floating tensor"):
        check_distillation(prepared, example, DistillationSettings(features=("pair",)))


@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_copies_know_nothing_of_features(mode: str) -> None:
    prepared, example = prepare(mode, CASE["depthwise"])
    features = Features(prepared, ["expand"])
    with features.open():
        copied = copy.deepcopy(prepared)
        prepared.eval()(*example.args)
        kept = features.seen["expand"]
        copied.eval()(*example.args)
    assert features.seen["expand"] is kept
    names = [node.name for node in copied.graph.nodes]  # type: ignore[union-attr]
    assert names == [node.name for node in prepared.graph.nodes]  # type: ignore[union-attr]


def test_inputs_that_are_changed_in_place_reach_the_teacher_unchanged() -> None:
    class InPlace(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.add_(1))

    student = InPlace(3, 2)
    distiller = Distiller(student, copy.deepcopy(student), DistillationSettings())
    distiller.run(student, torch.randn(4, 3))
    loss = distiller.take_loss()
    assert loss is not None
    assert abs(loss.item()) < 1e-6
    with torch.no_grad():
        distiller.run(student, torch.randn(4, 3))
    assert distiller.take_loss() is None
