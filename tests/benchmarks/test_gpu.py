"""The program of ``make gpu``, run on the CPU: everything except the device."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.within import run_within

TINY = ["--device", "cpu", "--networks", "resnet18", "--rows", "fx", "ModelOpt", "--rounds", "1"]


@pytest.mark.nightly
def test_every_part_gives_rows_and_what_is_missing_is_a_row_with_the_reason(tmp_path: Path) -> None:
    status = gpu.main([*TINY, "--tests", "agrees and fx and 32-true", "--out", str(tmp_path / "found")])
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["part"], row["name"]): row for row in found["rows"]}
    assert status == 0
    assert rows["tests", "all"]["figures"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert rows["step", "resnet18, fx"]["figures"]["ratio"] > 0.5
    assert rows["memory", "resnet18, fx"]["figures"]["kept_ratio"] > 0.5
    assert "pip install nvidia-modelopt" in rows["step", "resnet18, ModelOpt"]["result"]
    assert rows["TensorRT", "resnet18"]["result"] == "not measured: TensorRT needs a GPU"
    assert set(found["seconds"]) == set(gpu.PARTS)
    table = (tmp_path / "found.md").read_text()
    assert table.startswith("no GPU: a check of the program on the CPU")
    assert table.count("\n| ") == 1 + len(rows)


@pytest.mark.slow
def test_a_part_that_takes_longer_than_its_share_is_stopped(tmp_path: Path) -> None:
    began = time.monotonic()
    status = gpu.main([*TINY, "--minutes", "0.05", "--out", str(tmp_path / "found")])
    assert time.monotonic() - began < 30
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert status == 1, "no test was run"
    assert rows[0]["result"].startswith("stopped after")
    assert {"stopped", "the"} & {row["result"].removeprefix("not measured: ").split()[0] for row in rows[1:]}


@pytest.mark.slow
def test_no_test_is_a_failure() -> None:
    rows = list(gpu.tests(gpu._parser().parse_args([*TINY, "--tests", "nothing_of_this_name"]), gpu.Clock(120)))
    assert [(row.result, row.failed) for row in rows] == [("no test was collected", True)]


def test_failed_tests_stand_out_in_the_table() -> None:
    rows = [gpu.Row("tests", "a[fx]", "failed: x | y", failed=True), gpu.Row("step", "b", "1.2 times float")]
    lines = gpu.markdown("machine", rows).splitlines()
    assert lines[-2:] == ["| tests | a[fx] | **failed: x \\| y** |", "| step | b | 1.2 times float |"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "install a CUDA build of torch" in capsys.readouterr().err


def test_what_a_stopped_command_has_started_is_killed_with_it() -> None:
    """The inner process keeps the output open, like a compiler's workers."""
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_within([sys.executable, "-c", inner], 1.0)
    assert time.monotonic() - began < 20
