"""Two processes on the CPU (gloo) train like one process on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.layer_sync import LayerSync
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from qat_lightning import Distillation, PostTrainingQuantization
from qat_lightning.callbacks.parts.layer_sync import BatchNormSync
from qat_lightning.errors import ConfigurationError
from qat_lightning.layers.qat_modules import FreezableBatchNorm1d, FreezableBatchNorm2d, make_batchnorm_freezable
from tests.callbacks.ddp_run import LEARNED, Plain, run_halves, run_synchronized
from tests.callbacks.lit import MODES, Lit, loader, qat, state, trainer
from tests.callbacks.two_processes import read_both, run_two
from tests.support.exactness import needs_onednn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of both processes."""
    return _run_two(tmp_path_factory.mktemp("processes"), compile="0")


def _run_two(folder: Path, *arguments: str, compile: str) -> Path:
    return run_two("tests.callbacks.ddp_run", folder, *arguments, compile=compile)


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return read_both(folder)


@pytest.mark.slow
@pytest.mark.parametrize("make", ["Lit", "OwnForward"])
@pytest.mark.parametrize("mode", MODES)
def test_both_end_alike(mode: str, make: str, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Weights, statistics, ranges after every step and int8 are equal; both test every variant and can continue."""
    first, second = (found[f"{mode} {make}"] for found in both)
    assert first == second
    assert first["steps"] == 4
    assert first["variants"] == ["float", "fake_quant", "int8"]
    assert first["fidelity"]["agreement"] == 1.0
    # Ranges move until they freeze, before the fourth batch of the first fit, and in both at once.
    steps = first["every step"]
    assert len(set(steps[:3])) == 3
    assert steps[3].split("] [")[0] == steps[2].split("] [")[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_monitor_measures_in_the_first_and_changes_nothing(mode: str, both: tuple[dict[str, Any], ...]) -> None:
    first, second = (found[f"{mode} monitored"] for found in both)
    assert first["alone"] == first["monitored"] == second["monitored"]
    assert {"features.0", "head"} <= set(first["layers"])
    assert second["layers"] == []


@pytest.mark.slow
def test_processes_that_go_different_ways(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """In eager mode each layer's range is known in both processes, whichever ran the layer."""
    first, second = (found["different ways"] for found in both)
    assert first == second
    for layer in ("dark", "bright"):
        assert f"'net.{layer}.output_fake_quant.max_val', inf" not in first["every step"][0]
        assert f"'net.{layer}.output_fake_quant.max_val', -inf" not in first["every step"][0]


@pytest.mark.slow
def test_a_process_with_nothing_to_observe_takes_part(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert both[0]["nothing"] == both[1]["nothing"] == [-1.0, 2.0, 1.0]


@pytest.mark.slow
def test_only_the_first_process_converts(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The first process converts, in the rehearsal and for the fit of each run that trains; the other tests it."""
    first, second = (found["conversions"] for found in both)
    assert first == [mode for mode in MODES for _ in range(4)]  # the second fit of each run takes no step
    assert second == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_process_may_be_asked_for_int8_by_itself(mode: str, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first, second = (found["asked in one"][mode] for found in both)
    assert first == second


@pytest.mark.slow
def test_an_error_of_the_first_process_is_known_in_all_and_costs_no_fit(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    first, second = (found["fails in the first"] for found in both)
    assert "VerificationError: layer 'net.head' is at 9.0 dB" in first.pop("why not")
    assert "VerificationError: Process 0 of this training: layer 'net.head' is at 9.0 dB" in second.pop("why not")
    # The test after it converts, and all go on.
    assert first == second


@pytest.mark.slow
def test_an_error_of_another_process_is_known_in_all_and_costs_no_fit(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    first, second = (found["fails in the second"] for found in both)
    assert "ConversionError: Process 1 of this training failed with OSError: no memory" in first.pop("why not")
    assert "OSError: no memory" in second.pop("why not")
    assert first == second


@pytest.mark.slow
def test_what_no_file_can_hold_is_converted_in_every_process(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first, second = (found["without file"] for found in both)
    assert first == second
    assert first["conversions"] == 1


@pytest.mark.slow
@needs_onednn
def test_only_the_first_process_compiles(tmp_path: Path) -> None:
    first, second = read_both(_run_two(tmp_path, "compiled", compile="1"))
    assert first.pop("compiled") == 1
    assert second.pop("compiled") == 0
    assert first["runs"] == "aotinductor"
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True], ids=["plain", "distilled"])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_are_one_with_the_doubled_batch(mode: str, distilled: bool, folder: Path) -> None:
    """Weights, ranges and int8 of a network without BatchNorm, up to the rounding of sums."""
    key = f"{mode} distilled" if distilled else mode
    one = run_halves(mode, 1, *([Distillation(2.0, 0.5)] if distilled else []))
    assert_one_fit(folder, key, one, near=mode == "eager")


@pytest.mark.slow
def test_two_processes_end_as_one_with_the_doubled_batch(tmp_path: Path) -> None:
    assert_one_fit(_run_two(tmp_path, "halves", compile="0"), "fx", run_halves("fx", 1))


def assert_one_fit(folder: Path, fit: str, one: dict[str, Tensor], *, near: bool = False) -> None:
    """Both processes end equal, and like one process."""
    first, second = (torch.load(folder / f"{rank}.pt")[fit] for rank in (0, 1))
    assert one.keys() == first.keys()
    for key, expected in one.items():
        assert torch.equal(first[key], second[key]), key
        if not near:
            torch.testing.assert_close(first[key], expected, rtol=1e-4, atol=1e-5, msg=key)
        elif key.endswith("max_val") and expected.isfinite():
            # There the averages are merged after the batch, and not what they are averages of: near, and not the same.
            assert 0.9 * expected <= first[key] <= 1.2 * expected, key


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fx", "pt2e"])
def test_learned_scales_are_those_of_one_process_with_the_doubled_batch(mode: str, folder: Path) -> None:
    """Up to what the last bit of a float decides: a value between two points of a grid is rounded to either of them,
    which moves the gradient of the scale by a whole step.

    So one process, whose weights are disturbed by 1e-7 in the beginning, ends with other scales as well: in mode fx by
    up to 7e-3 of ``log_ratio``, with values around 3. Two processes are 1e-2 away, and may be four times as far.
    """
    one = run_halves(mode, 1, scheme=LEARNED)
    first, second = (torch.load(folder / f"{rank}.pt")[f"learned {mode}"] for rank in (0, 1))
    assert one.keys() == first.keys()
    assert any(key.endswith("log_ratio") and bool(value.any()) for key, value in one.items())
    allowed: dict[str, float] = {}
    for seed in (1, 2):
        for key, value in run_halves(mode, 1, scheme=LEARNED, network=lambda seed=seed: disturbed(seed)).items():
            kind = key.rpartition(".")[2]
            allowed[kind] = max(allowed.get(kind, 0.0), 4 * _distance(value, one[key]))
    assert allowed["log_ratio"] < 0.1
    for key, expected in one.items():
        assert torch.equal(first[key], second[key]), key
        within = allowed[key.rpartition(".")[2]] + 1e-4 * (1 + float(expected.abs().nan_to_num(posinf=0.0).max()))
        assert _distance(first[key], expected) <= within, key


def disturbed(seed: int) -> nn.Module:
    """The network of these fits, with weights that are other in the last bits."""
    network, generator = Plain(), torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data *= 1 + 1e-7 * torch.randn(parameter.shape, generator=generator)
    return network


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().nan_to_num().max()) if one.numel() else 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "sync_batchnorm", "compiler"),
    [
        ("fx", True, "aot_eager"),
        *(pytest.param(mode, sync, "inductor", marks=pytest.mark.nightly) for mode in MODES for sync in (False, True)),
    ],
)
def test_compiled_steps_of_two_processes_train_alike(
    mode: str, sync_batchnorm: bool, compiler: str, tmp_path: Path
) -> None:
    """Like uncompiled, except for the compiler's rounding; a resumed fit ends like the uninterrupted one."""
    _run_two(tmp_path, "compiled steps", mode, str(int(sync_batchnorm)), compiler, compile="0")
    assert [found["compiled"] for found in read_both(tmp_path)] == [12, 12]
    # In eager mode nothing is reduced within the network, unless BatchNorm is.
    alone = mode == "eager" and not sync_batchnorm
    assert [found["looked at"] for found in read_both(tmp_path)] == [0, 12 if alone else 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    plain = first["plain"]
    for name in ("compiled", "resumed", "looked at"):
        for key, expected in plain.items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            torch.testing.assert_close(first[name][key], expected, rtol=2e-3, atol=1e-2 if key == "int8" else 2e-3)


@pytest.mark.nightly
def test_both_freeze_the_same_weights(tmp_path: Path) -> None:
    """They end with equal weights, although BatchNorm statistics differ between two forward passes."""
    _run_two(tmp_path, "oscillating", compile="0")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for mode in MODES:
        assert sum(int(tensor.sum()) for key, tensor in first[mode].items() if key.endswith(" frozen")) > 0
    assert_alike(first, second)
    learning = [bool(tensor) for key, tensor in first["few bits"].items() if key.endswith("step.learning")]
    assert learning
    assert all(learning), "and scales of few bits begin alike"


def assert_alike(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[name][key]), (name, key)


def test_learned_scales_in_eager_mode_are_refused() -> None:
    fitting = trainer(qat("eager", scheme=LEARNED), strategy="ddp", devices=2)
    with pytest.raises(ConfigurationError, match="use mode='fx' or mode='pt2e'"):
        fitting.callbacks[0].setup(fitting, Lit(), "fit")


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_are_refused(name: str) -> None:
    callback, module = qat(), Lit()
    before = state(module)
    fitting = trainer(callback)
    strategy = FSDPStrategy() if name == "FSDPStrategy" else type(name, (DDPStrategy,), {})()
    fitting._accelerator_connector.strategy = strategy
    with pytest.raises(ConfigurationError, match=rf"{name} shards the network .* use strategy='ddp'"):
        callback.setup(fitting, module, "fit")
    assert state(module).keys() == before.keys()


@pytest.mark.parametrize("make", [qat, PostTrainingQuantization])
def test_processes_that_bring_no_network_back_are_refused(make: Callable[[], Any]) -> None:
    """Lightning passes exceptions of child processes on as text; our error is raised in this process."""
    with pytest.raises(
        ConfigurationError, match=r"^DDPStrategy\(start_method='fork'\) .* use strategy='ddp' in a script"
    ):
        trainer(make(), strategy="ddp_notebook", devices=2).fit(Lit(), loader())


@pytest.mark.slow
def test_processes_that_are_spawned_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^DDPStrategy\(start_method='spawn'\)"):
        trainer(qat(), strategy=DDPStrategy(start_method="spawn"), devices=1).fit(Lit(), loader())


def test_another_error_in_started_processes_stays_what_it_is() -> None:
    class Broken(Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            raise LookupError("not ours")

    with pytest.raises(ProcessRaisedException, match="not ours"):
        trainer(Broken(), qat(), strategy="ddp_notebook", devices=1).fit(Lit(), loader())


@pytest.mark.slow
def test_synchronized_batchnorm_is_that_of_one_process_with_the_doubled_batch(tmp_path: Path) -> None:
    assert_one_fit(_run_two(tmp_path, "synchronized", "fx", compile="0"), "fx", run_synchronized("fx", 1))


@pytest.mark.nightly
def test_synchronized_batchnorm_in_the_other_modes(tmp_path: Path) -> None:
    _run_two(tmp_path, "synchronized", "eager", "pt2e", compile="0")
    assert_one_fit(tmp_path, "pt2e", run_synchronized("pt2e", 1))
    assert_one_fit(tmp_path, "eager", run_synchronized("eager", 1), near=True)


class OwnBatchNorm(nn.BatchNorm1d):
    """A BatchNorm subclass with its own computation."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"plugins": type("OwnSync", (LayerSync,), {"apply": None, "revert": None})()}, "OwnSync replaces layers"),
        ({"strategy": ModelParallelStrategy()}, "ModelParallelStrategy synchronizes no BatchNorm"),
    ],
)
def test_what_synchronizes_otherwise_is_refused(settings: dict[str, Any], match: str) -> None:
    more = {"strategy": "ddp"} | ({} if "plugins" in settings else {"sync_batchnorm": True})
    fitting = trainer(qat(), **more | settings)
    with pytest.raises(ConfigurationError, match=match):
        fitting.callbacks[0].setup(fitting, Lit(), "fit")


def test_synchronizing_leaves_every_layer_the_one_it_is_and_refuses_those_of_other_classes() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm1d(2))
    make_batchnorm_freezable(network[1])
    before = [(type(module), id(module), dict(module.__dict__)) for module in network]
    sync = BatchNormSync()
    assert sync.apply(network) is network
    assert [type(module) for module in network[1:]] == [FreezableBatchNorm2d, FreezableBatchNorm1d]
    assert all(module.synchronized for module in network[1:])
    sync.revert(network)
    assert [(type(module), id(module), dict(module.__dict__)) for module in network] == before
    with pytest.raises(ConfigurationError, match="cannot synchronize '3', a BatchNorm of the class OwnBatchNorm"):
        sync.apply(network.append(OwnBatchNorm(2)))


def test_observing_evaluations_is_refused() -> None:
    fitting = trainer(qat(observe_stages=["train", "validate"]), strategy="ddp", devices=2)
    with pytest.raises(ConfigurationError, match=r"use observe_stages=\['train'\]"):
        fitting.callbacks[0].setup(fitting, Lit(), "fit")
