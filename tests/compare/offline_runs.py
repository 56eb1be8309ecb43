"""Offline runs written by W&B."""

from pathlib import Path

import wandb


def log_offline(folder: Path, run_id: str, *, last_step: int = 3, finish: bool = True, **config: object) -> Path:
    """An offline run written by W&B."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(mode="offline", quiet=True, silent=True)
    run = wandb.init(project="p", dir=folder, id=run_id, name=f"run {run_id}", config=config, settings=settings)
    for step in range(last_step):
        run.log(
            {"val/acc": 0.5 + 0.1 * step, "trainer/global_step": 10 * step, "quant/fake_quant_enabled": int(step > 0)}
        )
    run.log({"quant/layers": wandb.Table(columns=["layer", "weight_sqnr_db"], data=[["stem", 41.5], ["head", 38.25]])})
    run.summary.update({"int8/test/acc": 0.75, "int8/latency_ms": 1.5, "int8/size_mb": 0.5})
    written = Path(run.dir).parent
    run.finish(exit_code=0 if finish else 1)
    return written
