"""Latencies measured while other work was running are detected, and not used to decide."""

from __future__ import annotations

from typing import Any

import pytest

from qat_lightning.compare import Limits, Run, compare, decide
from qat_lightning.compare.noise import fastest_floats, why_noisy
from qat_lightning.compare.spread import Spread
from qat_lightning.compare.table import cells, markdown
from tests.compare.making import qat


def seeds(mode: str, latencies: list[float]) -> list[Run]:
    return [qat(mode, seed, latency=latency) for seed, latency in enumerate(latencies)]


def test_a_sweep_of_impossible_speed_ups_is_marked_and_not_decided_by() -> None:
    """0.02 ± 0.01 and 16.6 ± 23, neither of which is plausible for a network."""
    runs = seeds("fx", [200.0, 400.0, 150.0]) + seeds("pt2e", [0.1, 0.5, 8.0])
    comparison = compare(runs)
    assert all("varies by" in c.noise for c in comparison.configurations)
    assert all(c.on_front for c in comparison.configurations), "their scores and sizes are equal"
    header, rows = cells(comparison)
    assert all(row[header.index("latency (ms)")].endswith(" ?") for row in rows)
    assert all(row[header.index("speed-up")].endswith(" ?") for row in rows)
    text = markdown(comparison, decide(comparison, Limits(max_drop=50)))
    assert "measured while other work was running" in text
    assert "Latency is ignored" in text


def test_latencies_that_repeat_are_not_marked() -> None:
    comparison = compare(seeds("fx", [2.0, 2.2, 2.1]) + seeds("pt2e", [1.0, 1.1, 1.05]))
    assert not comparison.noisy
    _, rows = cells(comparison)
    assert not any("?" in cell for row in rows for cell in row)


@pytest.mark.parametrize(
    ("metrics", "speedup", "says"),
    [
        ({"latency_spread": 0.4}, None, "it varied by 40% while it was measured"),
        ({"float/latency_ms": 8.0, "float/size_mb": 4.0}, None, "float took 4.0 times as long in one run"),
        ({"float/latency_ms": 2.5, "float/size_mb": 4.0}, None, ""),
        ({"float/latency_ms": 80.0, "float/size_mb": 40.0}, None, ""),
        ({}, Spread(2.0, 1.0, 3), "the speed-up varies by 50% over seeds"),
    ],
)
def test_each_sign_is_said(metrics: dict[str, float], speedup: Spread | None, says: str) -> None:
    quiet = Run("quiet", "quiet", metrics={"float/latency_ms": 2.0, "float/size_mb": 4.0})
    run = Run("run", "run", metrics=metrics)
    found = why_noisy([run], None, speedup, fastest_floats([quiet, run]))
    assert found.startswith(says)
    assert bool(found) == bool(says)


def timed(name: str, latency: float, **config: Any) -> Run:
    return Run(name, name, config=config, metrics={"float/latency_ms": latency, "float/size_mb": 4.0})


def test_networks_of_equal_size_with_other_inputs_or_strides_are_not_the_same_network() -> None:
    runs = [timed("a", 1.0, data={"image_size": 32}), timed("b", 4.0, data={"image_size": 64})]
    runs += [timed("c", 8.0, data={"image_size": 64}, model={"stride": 1})]
    assert [why_noisy([run], None, None, fastest_floats(runs)) for run in runs] == ["", "", ""]


def test_networks_that_differ_in_their_training_only_are_the_same_network() -> None:
    quiet = timed("a", 2.0, model={"width": 8, "optimizer": {"lr": 0.1}}, trainer={"max_epochs": 3})
    config = {"_target_": "qat_lightning.QuantizationAwareTraining", "mode": "fx"}
    busy = timed("b", 8.0, model={"width": 8, "optimizer": {"lr": 0.2}}, trainer={}, quantization=config, note="x")
    assert why_noisy([busy], None, None, fastest_floats([quiet, busy])) == "", "the note may be about the network"
    ignore = ["note"]
    assert "4.0 times" in why_noisy([busy], None, None, fastest_floats([quiet, busy], ignore), ignore)
