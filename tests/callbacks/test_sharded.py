"""Two processes on the CPU (gloo) with parameters sharded by ModelParallelStrategy (FSDP2) are bit-equal to DDP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")  # which the program trains, too

from qat_lightning.settings.engines import onednn_is_exact
from tests.callbacks.two_processes import read_both, run_two
from tests.support.nightly import nightly_except

Both = tuple[dict[str, Any], dict[str, Any]]
KINDS = ("dynamic", "weight-only", "weight-only, 4 bits in clipped groups", "static")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    """The results of both processes for a section, which runs once."""
    found: dict[str, Both] = {}

    def run(section: str) -> Both:
        if section not in found:
            folder: Path = tmp_path_factory.mktemp(section)
            found[section] = read_both(run_two("tests.callbacks.sharded_run", folder, section))
        return found[section]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
@pytest.mark.parametrize("kind", nightly_except(KINDS, "static"))
def test_a_sharded_fit_ends_where_ddp_ends(kind: str, tied: bool, ran: Callable[[str], Both]) -> None:
    """Weights, integer network and the losses of each variant, of a small language model."""
    first, second = (found[str(tied)] for found in ran(f"beside, {kind}"))
    assert first == second
    assert first["sharded"]
    assert first["weights"] == first["int8"] == 0.0
    assert first["losses"] == first["losses of ddp"]
    assert first["losses"].keys() == {"float", "fake_quant", "int8", "validated"}
    assert first["losses"]["validated"] == first["losses"]["fake_quant"] < first["losses"]["float"]
    assert first["fidelity"] >= (0.999 if onednn_is_exact() else 0.995)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS[2:])
def test_checkpoints_of_each_form_resume_bit_by_bit(kind: str, ran: Callable[[str], Both]) -> None:
    """Sharded, whole and DDP checkpoints, from steps within an epoch and at its end, with either strategy."""
    first, second = ran(f"resumed, {kind}")
    assert first == second
    assert first.pop("fits") == [0.0, 0.0, 0.0]
    assert len(first) == 14
    assert all(first.values()), [name for name, same in first.items() if not same]


@pytest.mark.nightly
def test_other_networks_end_where_ddp_ends(ran: Callable[[str], Both]) -> None:
    """BatchNorm that freezes, the LightningModule's own forward, attention, other modes, distillation."""
    first, second = ran("images")
    assert first == second
    assert len(first) == 7
    for name, difference in first.items():
        assert difference <= 1e-5, name


@pytest.mark.nightly
def test_recomputed_activations_and_adapters_change_nothing(ran: Callable[[str], Both]) -> None:
    first, second = ran("variations")
    for name in ("recomputing", "adapters, merged", "adapters, float"):
        assert first[name] == second[name] == 0.0


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_bfloat16_are_as_near_to_int8_as_bfloat16_is(kind: str, ran: Callable[[str], Both]) -> None:
    first, second = (found[f"bfloat16, {kind}"] for found in ran("variations"))
    assert first == second
    assert first["sqnr_db"] > 28
    assert first["agreement"] > 0.95


@pytest.mark.nightly
def test_what_looks_at_weights_beside_a_fit(ran: Callable[[str], Both]) -> None:
    """Monitor, export, evaluation, coverage and manual conversion; some of them run in the first process only."""
    first, second = ran("tools")
    assert first["monitored"] == ["embed", "attention", "head"]
    assert first["coverage"] == second["coverage"] == ["net.embed", "net.attention", "net.head"]
    assert first["exported"] == {"torchscript": True}
    assert first["summary"]["int8/test/acc"] == first["summary"]["fake_quant/test/acc"] > 0.9
    assert first["network"] < 1e-5
    assert first["without"] == first["again"] == second["again"] == ["embed", "attention"]
    assert second["monitored"] == []


BUILD = "build the network in __init__ or setup, with its weights, and let configure_model only shard it"
REFUSED = {
    "tensor parallel": "use data_parallel_size=2, tensor_parallel_size=1",
    "static in fx": "use mode='eager', kind='dynamic' or 'weight_only', or strategy='ddp'",
    "bias correction": "use bias_correction_batches=0, or strategy='ddp'",
    "calibration": "quantize what was trained in one process",
    "late": BUILD,
    "late, named": BUILD,
    "meta": BUILD,
    "replacing": BUILD,
    "apart": "call fully_shard on a module that contains both",
    "taken over": "continue with that one, or give this one example_inputs=",
    "sharded before": "use a new LightningModule",
    "other kind, sharded": "kind: 'dynamic' here, 'weight_only' there",
    "other kind, whole": "kind: 'dynamic' here, 'weight_only' there",
    "float, sharded": "model.load_state_dict(qat_lightning.float_state_dict(path)), instead of ckpt_path=",
    "float, whole": "model.load_state_dict(qat_lightning.float_state_dict(path)), instead of ckpt_path=",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_refused_before_the_first_step(name: str, ran: Callable[[str], Both]) -> None:
    first, second = ran("refused")
    assert first[name] == second[name]
    assert REFUSED[name] in first[name]
    steps, error, *_ = first[name].replace(":", "").split()
    assert steps == "0"
    assert error in ("ConfigurationError", "NetworkError", "CheckpointMismatchError")


@pytest.mark.slow
def test_what_messages_say_to_do_works(ran: Callable[[str], Both]) -> None:
    first, _ = ran("refused")
    assert first["float, sharded, remedied"] == first["float, whole, remedied"] == "True"
    assert float(first["float, whole, nothing added"]) == 0.0
    assert "not refused" not in first
    assert "taken over with an example" not in first
