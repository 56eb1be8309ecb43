"""The arithmetic of distillation, and the features of networks prepared in every mode."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat_lightning.errors import ConfigurationError
from qat_lightning.graph.example import Example
from qat_lightning.modes.prepared import prepared_state, set_phase
from qat_lightning.modes.registry import get_mode
from qat_lightning.recipes import distillation_losses
from qat_lightning.recipes.distillation import (
    DistillationSettings,
    Distiller,
    check_distillation,
    chosen_outputs,
    comparable_features,
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


_SHAPES = st.sampled_from([((5, 3), 1), ((2, 4, 3, 3), 1), ((2, 3, 7), 2), ((3, 2, 9), 1), ((1, 2, 5), -1)])


def _plain(student: Tensor, teacher: Tensor, temperature: float, axis: int) -> Tensor:
    """On whole tensors, with single operations of torch."""
    wanted, got = ((scores.float() / temperature).log_softmax(axis) for scores in (teacher, student))
    return F.kl_div(got, wanted, reduction="none", log_target=True).sum(axis).mean() * temperature**2


@settings(max_examples=60, deadline=None)
@given(
    shape=_SHAPES,
    temperature=st.floats(0.5, 10),
    chunk=st.sampled_from([1, 4, 12, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    overwrite=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_chunks_are_the_loss_on_whole_tensors(
    shape: tuple[tuple[int, ...], int],
    temperature: float,
    chunk: int,
    dtype: torch.dtype,
    overwrite: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(shape[0], generator=generator).to(dtype) for _ in range(2))
    grads, kept = [], theirs.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(distillation_losses._CHUNK, "cpu", chunk)
        for loss in (
            lambda scores: _plain(scores, kept, temperature, shape[1]),
            lambda scores: distillation_loss(scores, theirs, temperature, shape[1], overwrite_teacher=overwrite),
        ):
            student = ours.clone().requires_grad_()
            found = loss(student)
            (3.0 * found).backward()
            grads.append((found.detach(), student.grad))
    torch.testing.assert_close(grads[1][0], grads[0][0], rtol=1e-4, atol=1e-6)
    assert grads[1][1].dtype == dtype
    torch.testing.assert_close(grads[1][1], grads[0][1], **_NOISE[dtype])
    assert overwrite or torch.equal(theirs, kept)


_NOISE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-5},
    torch.float16: {"rtol": 3e-3, "atol": 1e-5},
}


@pytest.mark.parametrize(("shape", "axis"), [((4, 3), 1), ((2, 3, 4), 1), ((2, 3, 4), -1)])
def test_the_gradient_is_checked_by_differences(shape: tuple[int, ...], axis: int) -> None:
    student, teacher = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.randn(shape).double()
    assert torch.autograd.gradcheck(lambda scores: distillation_loss(scores, teacher, 2.0, axis), student)


def test_a_second_backward_pass_has_the_same_gradient() -> None:
    student = torch.randn(4, 3, requires_grad=True)
    loss = distillation_loss(student, torch.randn(4, 3))
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, student)
    torch.testing.assert_close(second, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_small_differences_in_a_large_vocabulary_reach_float16_when_the_loss_is_scaled() -> None:
    student = torch.zeros(64, 5000, dtype=torch.float16, requires_grad=True)
    teacher = torch.randn(64, 5000).half()
    (2.0**16 * distillation_loss(student, teacher, 1.0)).backward()
    assert student.grad is not None
    expected = 2.0**16 * (1 / 5000 - teacher.float().softmax(1)) / 64
    torch.testing.assert_close(student.grad.float(), expected, rtol=0.05, atol=2e-4)


def test_classes_that_the_teacher_rules_out_and_empty_batches() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.tensor([[0.0, -torch.inf, 1.0], [1.0, 2.0, 3.0]])
    loss = distillation_loss(student, teacher, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert student.grad.isfinite().all()
    empty = torch.zeros(0, 3, requires_grad=True)
    distillation_loss(empty, empty.detach()).backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)
    with pytest.raises(ConfigurationError, match=r"shape \(2, 3\) and the student's \(2, 4\)"):
        distillation_loss(torch.zeros(2, 4), teacher)


def test_no_more_than_scores_gradient_and_a_chunk_are_alive() -> None:
    """The whole tensors created in a step, forward and backward; with the teacher's scores given, none."""

    class Sizes(TorchDispatchMode):
        made: ClassVar[list[int]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                    self.made.append(leaf.numel())
            return result

    student, teacher = torch.randn(1000, 4000, requires_grad=True), torch.randn(1000, 4000)
    with Sizes() as sizes:
        distillation_loss(student, teacher, overwrite_teacher=True).backward()
    assert max(sizes.made) <= distillation_losses._CHUNK["cpu"] < student.numel() / 3
    assert student.grad is not None
    assert student.grad.data_ptr() == teacher.data_ptr()


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


def test_scores_are_those_that_are_called_so() -> None:
    logits, hidden = torch.zeros(2, 5), torch.zeros(2, 4, 8)
    outputs = {"loss": torch.zeros(()), "logits": logits, "hidden_states": (hidden, hidden)}
    assert chosen_outputs(outputs, None, "kl") == [logits]
    assert len(chosen_outputs(outputs, None, "mse")) == 3
    both = {"start_logits": logits, "end_logits": logits}
    assert len(chosen_outputs(both, None, "kl")) == 2


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
    """The check itself compares them; then they get gradients, and the network is unchanged."""
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
    with pytest.raises(
        ConfigurationError, match=r"The feature 'expnd' is no module of the network\. Features can be 'expand'"
    ):
        check_distillation(prepared, example, DistillationSettings(features=("expnd",)))


def test_a_feature_that_is_merged_away_names_what_to_take() -> None:
    prepared, example = prepare("fx", CASE["depthwise"])
    with pytest.raises(ConfigurationError, match="a different tensor in mode='fx'"):
        check_distillation(prepared, example, DistillationSettings(features=("expand.0",)))
    with pytest.raises(ConfigurationError, match=r"merged with its neighbours .* Features can be 'net\.expand', "):
        check_distillation(prepared, example, DistillationSettings(features=("expand.1",)), "net")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_that_a_message_names_is_accepted_and_no_other(mode: str, name: str) -> None:
    prepared, example = prepare(mode, CASE[name])
    possible = comparable_features(prepared, example)
    assert set(FEATURES[name]) <= set(possible)
    check_distillation(prepared, example, DistillationSettings(features=tuple(possible)))
    for other, _ in prepared_state(prepared).float_network.named_modules():
        if other and other not in possible:
            with pytest.raises(ConfigurationError, match=f"The feature 'net.{other}' .* Features can be 'net"):
                check_distillation(prepared, example, DistillationSettings(features=(other,)), "net")


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
    with pytest.raises(ConfigurationError, match="not a floating-point tensor"):
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


def test_scores_that_are_weights_or_features_are_not_overwritten() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.table

    student, teacher = Table(), Table()
    before = teacher.table.clone()
    distiller = Distiller(student, teacher, DistillationSettings())
    distiller.run(student, torch.zeros(1))
    loss = distiller.take_loss()
    assert loss is not None
    loss.backward()
    assert torch.equal(teacher.table, before)


def test_a_teacher_of_features_stops_behind_as_many_calls_as_the_student_made() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x).relu()))

    student, x, called = Twice(), torch.randn(4, 3), []
    teacher = copy.deepcopy(student)
    teacher.layer.register_forward_pre_hook(lambda *_: called.append("layer"))
    teacher.head.register_forward_pre_hook(lambda *_: called.append("head"))
    distiller = Distiller(student, teacher, DistillationSettings(weight=0.0, features=("layer",)))
    with distiller.features():
        distiller.run(student, x)
    assert called == ["layer", "layer"]
    assert distiller.take_loss() == 0
    assert not distiller._of_teacher.seen


def test_a_feature_without_gradient_is_refused() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.layer(x)
            return self.head(x)

    student = Frozen()
    distiller = Distiller(student, copy.deepcopy(student), DistillationSettings(weight=0.0, features=("layer",)))
    with distiller.features(), pytest.raises(ConfigurationError, match="computed without gradient"):
        distiller.run(student, torch.randn(4, 3))
