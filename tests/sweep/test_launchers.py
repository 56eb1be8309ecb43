"""Real sweeps with each launcher: each trial is one W&B run, all in one group; failures do not affect others."""

import importlib.util
from pathlib import Path

import pytest

from tests.sweep.running import ROOT, TRAIN, offline_runs, results, statuses, sweep

LAUNCHERS = ["basic", "joblib", "submitit_local", "ray"]
WORDS = {"joblib": ["hydra.launcher.n_jobs=2"]}


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_each_trial_is_one_run_and_a_failed_one_loses_no_other(launcher: str, tmp_path: Path) -> None:
    if launcher == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip(
            "Ray wants a cloudpickle that does not go with the lock: pip install 'qat-lightning[ray]' elsewhere"
        )
    grid = ["mode=fx,eager", "seed=0,oops"]
    done = sweep(tmp_path, f"hydra/launcher={launcher}", *WORDS.get(launcher, []), "method=qat", *grid)
    assert done.returncode == 1, done.stderr
    assert statuses(tmp_path) == {0: "completed", 1: "failed", 2: "completed", 3: "failed"}, done.stderr
    assert "4 trials: 2 completed, 2 failed" in done.stdout
    assert "resume=true" in done.stdout

    runs = {run["run_id"]: run for run in offline_runs(tmp_path / "sweep")}
    found = results(tmp_path)
    completed = [found[0], found[2]]
    assert {result["wandb"]["id"] for result in completed} <= runs.keys()
    assert len({result["wandb"]["id"] for result in completed}) == 2
    groups = set()
    for mode, result in zip(("fx", "eager"), completed, strict=True):
        run = runs[result["wandb"]["id"]]
        assert (run["config"]["mode"]["name"], run["config"]["seed"]) == (mode, 0)
        assert result["metrics"].items() <= run["summary"].items()
        groups.add(run["config"]["logger"]["wandb"]["group"])
    assert groups == {f"{tmp_path.name}-sweep"}


@pytest.mark.slow
def test_a_killed_trial_loses_no_other_and_resume_finishes_it_as_the_same_run(tmp_path: Path) -> None:
    """The second trial kills itself after its first epoch the first time, as if out of memory."""
    script = tmp_path / "train_killed.py"
    script.write_text(
        "import os, runpy, signal, sys\n"
        "from pathlib import Path\n"
        "from lightning.pytorch import Callback\n"
        "class Kill(Callback):\n"
        "    def __init__(self, seed): self.seed = seed\n"
        "    def on_train_epoch_start(self, trainer, pl_module):\n"
        "        said = Path(f'killed-{self.seed}')\n"
        "        if self.seed == 1 and trainer.current_epoch == 1 and not said.exists():\n"
        "            said.write_text('')\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.modules['kill_callback'] = type(sys)('kill_callback')\n"
        "sys.modules['kill_callback'].Kill = Kill\n"
        f"sys.argv[0] = {str(TRAIN)!r}\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    words = [
        "method=float",
        "seed=0,1,2",
        "+callbacks.kill._target_=kill_callback.Kill",
        "+callbacks.kill.seed=${seed}",
    ]
    done = sweep(tmp_path, *words, script=script)
    assert done.returncode == 1, done.stderr
    assert statuses(tmp_path) == {0: "completed", 1: "failed", 2: "completed"}, done.stdout
    assert "killed by SIGKILL" in " ".join(done.stdout.split())
    before = results(tmp_path)
    (begun,) = (tmp_path / "sweep" / "1" / "wandb").glob("offline-run-*")

    refused = sweep(tmp_path, *words, script=script)
    assert refused.returncode == 1
    assert "resume=true" in refused.stderr
    assert results(tmp_path) == before

    finished = sweep(tmp_path, *words, "resume=true", script=script)
    assert finished.returncode == 0, finished.stderr
    after = results(tmp_path)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1]["status"] == "completed"
    assert begun.name.endswith(f"-{after[1]['wandb']['id']}"), "the same W&B run"
    assert Path(after[1]["wandb"]["dir"]) != begun
    printed = (tmp_path / "sweep" / "1" / "output.log").read_text()
    assert "checkpoints/last.ckpt" in printed, "it went on from its checkpoint"
