"""Train a network and convert it to int8, as configured in conf/.

python train.py
python train.py mode=pt2e model=resnet20 data=cifar10
python train.py -m mode=eager,fx,pt2e seed=0,1,2
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

if TYPE_CHECKING:
    from qat_lightning.run.app import Objects
    from qat_lightning.sweep.trial import Objective


def train(cfg: DictConfig) -> tuple[dict[str, float], Objects]:
    """Fit, convert and compare.

    Args:
        cfg: The composed configuration.

    Returns:
        Every metric of the comparison, and the objects of the run.
    """
    from lightning.pytorch import seed_everything

    from qat_lightning.run import app
    from qat_lightning.run.evaluate import evaluate_variants
    from qat_lightning.sweep.baseline import fit, with_baseline

    app.check(cfg)
    if cfg.method.name == "auto":
        from qat_lightning.ladder.app import climb

        return climb(cfg)
    cfg = with_baseline(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    run = app.build(cfg)
    app.log_configuration(cfg, run.loggers)
    fit(cfg, run)
    metrics = evaluate_variants(run.trainer, run.model, datamodule=run.datamodule, fused=cfg.model.get("fused", False))
    app.keep_int8(cfg, run, metrics)
    app.close(run.loggers)
    return metrics, run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> Objective:
    """Run once, or as a trial of a sweep; return the objective."""
    # Imported here, so that --help, --cfg and errors in the configuration need no import of torch.
    from qat_lightning.sweep.refusal import refuse_impossible_pair

    refuse_impossible_pair(cfg)
    from qat_lightning.sweep.trial import run_trial

    return run_trial(train, cfg)


if __name__ == "__main__":
    main()
