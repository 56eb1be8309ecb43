"""Optuna through Hydra, and W&B's own sweep."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from tests.sweep.running import ENVIRONMENT, ROOT, TINY, TRAIN, offline_runs, results, statuses, sweep


@pytest.mark.slow
def test_optuna_gets_both_objectives_and_resume_repeats_the_search(tmp_path: Path) -> None:
    words = ["hparams_search=accuracy_latency", "hydra.sweeper.n_trials=3", "backend=x86", "mode=fx", "logger=csv"]
    done = sweep(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert set(statuses(tmp_path).values()) == {"completed"}
    found = results(tmp_path)
    for result in found.values():
        assert result["objective"] == [result["fit_metrics"]["val/acc"], result["metrics"]["int8/latency_ms"]]
    front = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml").solutions
    assert 1 <= len(front) <= 3
    assert {tuple(point["values"]) for point in front} <= {tuple(result["objective"]) for result in found.values()}

    (tmp_path / "sweep" / "2" / "result.json").unlink()
    again = sweep(tmp_path, *words, "resume=true")
    assert again.returncode == 0, again.stderr
    after = results(tmp_path)
    assert (after[0], after[1]) == (found[0], found[1])
    assert after[2]["overrides"] == found[2]["overrides"], "the same search"


def agent_command() -> list[str]:
    """The command line that W&B's agent creates from sweep.yaml, for the first of the values."""
    sweep_file = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    values = {
        name: {"value": parameter["values"][0] if "values" in parameter else parameter["min"]}
        for name, parameter in sweep_file["parameters"].items()
    }
    made = create_sweep_command_args({"args": values})
    made |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [str(TRAIN)]}
    words: list[str] = []
    for chunk in create_sweep_command(sweep_file["command"]):
        words += made[chunk[2:-1]] if chunk.startswith("${") and chunk.endswith("}") else [chunk]
    return words


@pytest.mark.slow
def test_the_command_of_a_wandb_agent_runs_as_the_run_that_the_agent_names(tmp_path: Path) -> None:
    environment = {**ENVIRONMENT, "WANDB_RUN_ID": "agent123", "WANDB_SWEEP_ID": "sweep123"}
    command = [*agent_command(), *TINY]
    assert "model.module.lr=0.0003" in command
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = offline_runs(tmp_path / "outputs" / "wandb_sweep" / "agent123")
    assert run["run_id"] == "agent123"
    assert (run["config"]["model"]["module"]["lr"], run["config"]["mode"]["name"]) == (0.0003, "eager")
    assert run["summary"]["int8/test/acc"] >= 0
